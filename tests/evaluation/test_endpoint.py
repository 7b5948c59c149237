"""The endpoint backend against servers that answer, delay, fail and talk nonsense."""

import base64
import io
import itertools
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import openai
import pytest
from PIL import Image

from huatuo_vision import openai_endpoint
from huatuo_vision.evaluation import endpoint as backend
from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.schema import ImageRef, UserError
from tests.evaluation.helpers import REPOSITORY, read_lines
from tests.evaluation.server import Sent, completion, endpoint
from tests.evaluation.tiny import mixed_rows, picture

DEFAULT = PROTOCOLS["default"]
SAME_COMMAND = "run the same command again"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Retries without pauses, no key, no proxy."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(backend, "MAX_RETRIES", 2)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def question_of(body: dict) -> str:
    return body["messages"][0]["content"][-1]["text"]


def echo(body: dict) -> Sent:
    return Sent(completion("re: " + question_of(body)))


def ask(rows, url, out, *, blind=False, concurrency=4, protocol=DEFAULT, model="m"):
    backend.answer(rows, protocol, model, url, out, blind=blind, concurrency=concurrency)
    return answers(out)


def answers(out) -> dict[str, dict]:
    path = out / "responses.endpoint.jsonl"
    return {line["id"]: line for line in read_lines(path)} if path.exists() else {}


def named(n: int) -> list:
    """Rows whose questions say which they are."""
    return [replace(row, question=f"<{i}> {row.question}") for i, row in enumerate(mixed_rows(n))]


def test_every_row_is_answered_with_its_own_reply(tmp_path):
    rows = named(12)
    with endpoint(lambda body: replace(echo(body), delay=0.03)) as server:
        found = ask(rows, server.url, tmp_path)
    assert {id: answer["response"] for id, answer in found.items()} == {
        row.id: "re: " + DEFAULT.render(row) for row in rows
    }
    assert 1 < server.most_at_once <= 4
    answer = found["row 1"]
    assert list(answer)[-3:] == ["case", "seconds", "new_tokens"]
    assert answer["new_tokens"] == 3 and answer["seconds"] > 0.02


def test_the_protocols_decoding_is_what_is_asked_for(tmp_path):
    with endpoint(echo) as server:
        ask(named(1), server.url, tmp_path)
        ask([replace(named(1)[0], id="again")], server.url, tmp_path, protocol=PROTOCOLS["huatuo-2024"])
    greedy, sampled = ({k: v for k, v in body.items() if k != "messages"} for body in server.requests)
    assert greedy == {"model": "m", "temperature": 0.0, "max_tokens": 32, "seed": 0}
    assert sampled == {
        "model": "m", "temperature": 0.2, "max_tokens": 256, "seed": 42, "repetition_penalty": 1.2,
    }  # fmt: skip


def test_images_come_before_the_text_as_they_are_stored_and_not_when_blind(tmp_path):
    row = replace(named(4)[2], images=(picture(1, "PNG"), picture(2, "JPEG")), question="What is <image>?")
    with endpoint(echo) as server:
        ask([row], server.url, tmp_path)
        ask([replace(row, id="blind")], server.url, tmp_path, blind=True)
    sighted, blind = (body["messages"] for body in server.requests)
    assert len(sighted) == len(blind) == 1 and sighted[0]["role"] == "user"
    parts = sighted[0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    for part, ref, kind in zip(parts, row.images, ("png", "jpeg"), strict=False):
        head, _, encoded = part["image_url"]["url"].partition(",")
        assert head == f"data:image/{kind};base64" and base64.b64decode(encoded) == ref.data
    assert parts[-1]["text"].startswith("What is < image >?")
    assert blind[0]["content"] == parts[-1:]


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "16 bit", "rotated", "palette", "archive", "file"])
def test_what_an_endpoint_may_misread_is_sent_as_the_pixels_our_model_sees(tmp_path, kind):
    file = io.BytesIO()
    pixels = np.arange(20 * 30).reshape(20, 30)
    if kind == "16 bit":
        Image.fromarray((pixels * 7).astype(np.uint16)).save(file, "PNG")
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", exif=exif)
    elif kind == "palette":
        Image.fromarray(pixels.astype(np.uint8)).convert("P").save(file, "PNG")
    else:
        file.write(picture(1, kind if kind in ("TIFF", "BMP") else "PNG").data)
    ref = ImageRef(data=file.getvalue())
    if kind == "archive":
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            archive.writestr("a/1.png", file.getvalue())
        ref = ImageRef(archive=str(tmp_path / "images.zip"), member="a/1.png")
    elif kind == "file":
        (tmp_path / "1.png").write_bytes(file.getvalue())
        ref = ImageRef(path=str(tmp_path / "1.png"))
    head, _, encoded = backend.data_uri(ref, "1").partition(",")
    sent = base64.b64decode(encoded)
    assert head == "data:image/png;base64"
    assert (sent == file.getvalue()) == (kind in ("archive", "file"))
    with Image.open(io.BytesIO(sent)) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(backend.load_image(ref, "1").image))


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_what_passes_is_retried(tmp_path, status):
    count = itertools.count()

    def reply(body: dict) -> Sent:
        return (
            Sent({"error": {"message": "wait"}}, status, headers={"retry-after-ms": "1"})
            if next(count) < 2
            else echo(body)
        )

    with endpoint(reply) as server:
        assert len(ask(named(1), server.url, tmp_path)) == 1
    assert len(server.requests) == 3


def error(status: int, said: str = "because") -> Sent:
    return Sent({"error": {"message": said, "type": "x"}}, status, headers={"retry-after-ms": "1"})


BROKEN = {
    "too often": (error(429), "says it is asked too often .429: because."),
    "internal": (error(500), "failed .500: because., with up to 2 retries"),
    "refused": (error(400, "maximum context length"), "refuses the request .400: maximum context length. at row"),
    "html": (Sent("<html>hello</html>"), "sent no JSON but '<html>hello</html>'; expected a chat completion"),
    "half": (Sent('{"choices": [', headers={"Content-Type": "application/json"}), "sent no JSON .*expected a chat"),
    "empty list": (Sent({"choices": []}), "sent JSON without choices"),
    "other object": (Sent({"hello": 1}), "sent JSON without choices"),
    "null": (Sent({"choices": None}), "sent JSON without choices"),
    "array": (Sent([1, 2]), "sent no JSON but|sent JSON without choices"),
    "no message": (Sent({"choices": [{"index": 0}]}), "sent JSON without choices"),
    "no text": (Sent(completion({"a": 1})), "sent a message whose content is no text"),
    "nothing": (Sent(""), "sent no JSON"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_one_failing_row_loses_no_other_and_is_asked_again(tmp_path, kind):
    rows = named(12)
    broken, message = BROKEN[kind]
    with endpoint(lambda body: broken if "<5>" in question_of(body) else echo(body)) as server:
        with pytest.raises(UserError, match=message) as refused:
            ask(rows, server.url, tmp_path)
        assert "row 'row 5'" in str(refused.value)
        assert f"11 answers are kept, 1 are missing: {SAME_COMMAND}" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert answers(tmp_path).keys() == {row.id for row in rows} - {"row 5"}
        server.reply = echo
        assert len(ask([rows[5]], server.url, tmp_path)) == 12


@pytest.mark.parametrize("kind", BROKEN)
def test_an_endpoint_that_only_fails_is_not_asked_for_ever(tmp_path, kind):
    broken, message = BROKEN[kind]
    with (
        endpoint(lambda body: broken) as server,
        pytest.raises(UserError, match=f"{message}.*0 answers are kept, 40 are missing"),
    ):
        ask(named(40), server.url, tmp_path)
    # Four in a row, and what the other three had begun meanwhile.
    assert len({question_of(body) for body in server.requests}) <= 7


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "refuses the key .401.; correct OPENAI_API_KEY"),
        (403, "refuses the key .403.; correct OPENAI_API_KEY"),
        (404, "knows no model 'm' under this base URL .404: because .* is wrong"),
    ],
)
def test_a_wrong_key_or_model_ends_the_run_at_once_and_the_key_is_nowhere(
    tmp_path, monkeypatch, capfd, status, message
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with (
        endpoint(lambda body: error(status, "because sk-very-secret is wrong")) as server,
        pytest.raises(UserError, match=message) as refused,
    ):
        ask(named(12), server.url, tmp_path, concurrency=1)
    assert len(server.requests) == 1
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    shown = capfd.readouterr()
    assert "secret" not in str(refused.value) + shown.out + shown.err


def test_rows_in_flight_are_kept_when_the_key_is_refused(tmp_path):
    def reply(body: dict) -> Sent:
        return error(401) if "<0>" in question_of(body) else replace(echo(body), delay=0.2)

    with endpoint(reply) as server, pytest.raises(UserError, match="3 answers are kept, 9 are missing"):
        ask(named(12), server.url, tmp_path)
    assert answers(tmp_path).keys() == {"row 1", "row 2", "row 3"}


def test_an_endpoint_that_is_too_slow_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "TIMEOUT", openai.Timeout(0.1))

    def reply(body: dict) -> Sent:
        return replace(echo(body), delay=0.4 if "<1>" in question_of(body) else 0)

    message = "did not answer within 0 s.*'row 1'; 2 answers are kept, 1 are missing"
    with endpoint(reply) as server, pytest.raises(UserError, match=message):
        ask(named(3), server.url, tmp_path)


def test_an_endpoint_that_is_down_is_one_sentence(tmp_path):
    with endpoint(echo) as server:
        ask(named(2), server.url, tmp_path)
    with pytest.raises(UserError, match=r"127.0.0.1:\d+ can't be reached, .*is it running\?.* 2 answers are kept"):
        ask(named(4)[2:], server.url, tmp_path)
    assert len(answers(tmp_path)) == 2


def test_where_no_connection_was_ever_had_the_rest_is_not_tried(tmp_path, monkeypatch):
    tried = []
    complete = backend.complete

    async def counted(*arguments, **settings):
        tried.append(1)
        return await complete(*arguments, **settings)

    monkeypatch.setattr(backend, "complete", counted)
    with endpoint(echo) as server:
        gone = server.url
    with pytest.raises(UserError, match="can't be reached"):
        ask(named(40), gone, tmp_path, concurrency=4)
    assert len(tried) == 4


def test_answers_are_on_disk_before_the_run_ends(tmp_path):
    """While the last row is still being answered, all others can be read."""
    seen = []

    def reply(body: dict) -> Sent:
        if "<7>" in question_of(body):
            seen.append(len(answers(tmp_path)))
        return echo(body)

    with endpoint(reply) as server:
        ask(named(8), server.url, tmp_path, concurrency=1)
    assert seen == [7]


def test_refusals_and_empty_replies_are_answers(tmp_path):
    replies = {"<0>": completion(None, refusal="I can't."), "<1>": completion(None), "<2>": completion("")}
    with endpoint(lambda body: Sent(replies[question_of(body)[:3]])) as server:
        found = ask(named(3), server.url, tmp_path)
    assert [found[f"row {i}"]["response"] for i in range(3)] == ["I can't.", "", ""]


def test_an_endpoint_that_counts_no_tokens_is_fine(tmp_path):
    with endpoint(lambda body: Sent({**completion("B"), "usage": None})) as server:
        found = ask(named(1), server.url, tmp_path)
    assert found["row 0"]["response"] == "B" and "new_tokens" not in found["row 0"]


def test_strangers_get_no_dummy_key_and_bad_addresses_are_said(tmp_path):
    with pytest.raises(UserError, match="endpoint api.example.com wants a key; set .* OPENAI_API_KEY"):
        ask(named(1), "https://user:password@api.example.com/v1", tmp_path)
    for url in ("localhost:8000", "http://", "ftp://x/v1", "http://x:port/v1"):
        with pytest.raises(UserError, match="base URL is no address"):
            ask(named(1), url, tmp_path)
    for host in ("localhost", "127.0.0.1", "10.1.2.3", "[::1]", "gpu-box", "gpu.local"):
        assert openai_endpoint._api_key(f"http://{host}:8000/v1") == "none"


def test_the_models_identity_is_host_and_name():
    assert backend.identity("a/b", "http://user:password@localhost:8000/v1") == "localhost:8000/a/b"
    assert backend.identity("gpt", "https://api.example.com/v1") == "api.example.com/gpt"


def test_no_torch_is_needed():
    code = (
        "import sys; from huatuo_vision.evaluation import answers, endpoint, judges, variants; "
        "assert not {'torch', 'transformers', 'datasets', 'accelerate'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
