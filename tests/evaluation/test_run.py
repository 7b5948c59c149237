"""eval.py's other tasks: grading a file, comparing, the self-test, endpoints, rotations, likelihoods."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from huatuo_vision.evaluation import run
from huatuo_vision.evaluation.benchmarks import chosen_benchmarks
from huatuo_vision.schema import UserError
from tests.evaluation.helpers import read_lines, run_python
from tests.evaluation.server import Sent, completion, endpoint
from tests.evaluation.tiny import save_tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def command(home, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def run(*arguments: object) -> int | None:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        return importlib.import_module("eval").main()

    return run


def row(number: int, reply: str, **changed: object) -> dict:
    return {
        "benchmark": "theirs", "id": f"q{number}", "question_type": "multiple-choice", "question": "Which?",
        "options": ["liver", "spleen", "lung"], "answer": "B", "response": reply, "groups": {"organ": "abdomen"},
        "image_sha256": [], "kept": number, **changed,
    }  # fmt: skip


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scores(out: Path) -> dict:
    return json.loads((out / "scores.json").read_text())


def test_a_responses_file_is_graded_without_a_model(command, tmp_path):
    file = write(tmp_path / "answers.jsonl", [row(1, "B"), row(2, "(A)"), row(3, ""), row(4, "B", answer="?")])
    assert command("--responses", file, "--out", tmp_path / "out") == 0
    entry = scores(tmp_path / "out")["benchmarks"]["theirs"]
    assert [entry[key] for key in ("n", "correct", "unparsed", "ungraded", "comparable")] == [3, 1, 1, 1, False]
    lines = read_lines(tmp_path / "out" / "verdicts.jsonl")
    assert [(line["parsed"], line["verdict"]) for line in lines] == [
        ("B", "correct"), ("A", "wrong"), (None, "unparsed"), ("B", "ungraded"),
    ]  # fmt: skip
    assert [line["kept"] for line in read_lines(tmp_path / "out" / "responses.jsonl")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "out" / "submission-theirs.json").read_text()) == {"q4": "B"}
    assert (tmp_path / "out" / "report.html").exists()


def test_what_cut_replies_and_other_programs_leave_is_read_and_kept(command, tmp_path):
    """Half a surrogate pair, a byte order mark, line ends of Windows."""
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps(row(1, "B \ud83d")), json.dumps(row(2, "B", question="\ud83d?"))]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    for _ in range(2):
        assert command("--responses", file, "--out", tmp_path / "out") == 0
    assert [answer["response"] for answer in read_lines(tmp_path / "out" / "responses.jsonl")] == ["B \ud83d", "B"]
    assert scores(tmp_path / "out")["benchmarks"]["theirs"]["correct"] == 2


def test_open_rows_are_open_whatever_stands_in_their_options(command, tmp_path):
    rows = [row(1, "the spleen", question_type="open", options=[], answer="spleen"), row(2, "B")]
    rows.append(row(3, "liver", question_type="open", answer=["liver", "hepar"]))
    assert command("--responses", write(tmp_path / "answers.jsonl", rows), "--out", tmp_path / "out") == 0
    entry = scores(tmp_path / "out")["benchmarks"]["theirs"]
    assert entry["correct"] == 3 and entry["open"]["n"] == 2
    assert entry["baselines"]["constant_letter"] == {"A": 0, "B": 1, "C": 0}


def test_a_file_that_can_not_be_graded_leaves_the_folder_to_its_mended_copy(command, tmp_path):
    file = tmp_path / "answers.jsonl"
    for wrong in ([], [row(1, "B", answer="D")], [row(1, "B", likelihood={"letter": [1]})]):
        with pytest.raises(UserError):
            command("--responses", write(file, wrong), "--out", tmp_path / "out")
    assert command("--responses", write(file, [row(1, "B")]), "--out", tmp_path / "out") == 0


def test_grading_imports_no_torch(tmp_path):
    file = write(tmp_path / "answers.jsonl", [row(1, "B")])
    done = run_python("-X", "importtime", "eval.py", "--responses", file, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "huatuo_vision.evaluation.scores" in imported and not imported & {"torch", "transformers", "datasets"}


def test_protocols_read_the_same_reply_differently(command, tmp_path):
    file = write(tmp_path / "answers.jsonl", [row(1, "**B**"), row(2, "b")])
    correct = {}
    for name in ("default", "huatuo-2024", "mmmu-official"):
        command("--responses", file, "--out", tmp_path / name, "--protocol", name)
        entry = scores(tmp_path / name)["benchmarks"]["theirs"]
        correct[name] = (entry["correct"], entry["unparsed"])
    assert correct == {"default": (2, 0), "huatuo-2024": (1, 0), "mmmu-official": (0, 2)}
    assert scores(tmp_path / "mmmu-official")["benchmarks"]["theirs"]["expectation"] == pytest.approx(1 / 3)


def test_another_number_of_rows_is_said_and_not_comparable(command, tmp_path):
    file = write(tmp_path / "answers.jsonl", [row(n, "B", benchmark="huatuo-vqa-rad") for n in range(5)])
    command("--responses", file, "--out", tmp_path / "out", "--protocol", "huatuo-2024")
    entry = scores(tmp_path / "out")["benchmarks"]["huatuo-vqa-rad"]
    assert entry["expected_n"] == 251 and not entry["comparable"]
    assert "5" in entry["why_not_comparable"] and "251" in entry["why_not_comparable"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(1, "B", answer="D")], "theirs row 'q1' .*'D'"),
        ([row(1, "B", question_type="essay")], "theirs row 'q1' .*essay"),
        ([row(1, "B"), row(1, "B")], "line 2: theirs row 'q1' stands there twice"),
        ([], "holds no answers"),
    ],
)
def test_rows_that_can_not_be_graded_are_named(command, tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        command("--responses", write(tmp_path / "answers.jsonl", rows), "--out", tmp_path / "out")


def test_two_results_are_compared_and_requirements_are_kept(command, tmp_path, capsys):
    for name, reply in (("a", "B"), ("b", "A")):
        file = write(tmp_path / f"{name}.jsonl", [row(n, reply if n else "B") for n in range(12)])
        command("--responses", file, "--out", tmp_path / name)
    compared = ["--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "report"]
    assert command(*compared, "--require-accuracy", "1.0", "--require-gain", "0.9") == 0
    capsys.readouterr()
    assert command(*compared, "--require-gain", "0.95") == 1
    assert "below the required 95.0" in capsys.readouterr().out
    entry = json.loads((tmp_path / "report" / "comparison.json").read_text())["benchmarks"]["theirs"]
    assert entry["discordant"] == {"a_only": 11, "b_only": 0} and entry["p"] == pytest.approx(2 / 2**11)
    assert (tmp_path / "report" / "report.html").exists()


def test_graded_where_they_lie_the_folder_stays_that_evaluation(command, model, tmp_path):
    out = tmp_path / "out"
    command("--model", model, "--out", out, *ask())
    header = (out / "eval.json").read_bytes()
    command("--responses", out / "responses.jsonl", "--out", out)
    assert (out / "eval.json").read_bytes() == header
    with pytest.raises(UserError, match="asked under protocol default; give --out a new folder"):
        command("--responses", out / "responses.jsonl", "--out", out, "--protocol", "huatuo-2024")
    # By another protocol's rules they are graded elsewhere, and are no result of it.
    command("--responses", out / "responses.jsonl", "--out", tmp_path / "other", "--protocol", "huatuo-2024")
    assert scores(tmp_path / "other")["backend"] is None


def test_a_wrong_address_is_said_before_any_data_are_read(command, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_load", lambda question: pytest.fail("read the data first"))
    with pytest.raises(UserError, match="the base URL is no address"):
        command("--model", "m", "--out", tmp_path / "out", *ask("--backend", "openai", "--base-url", "localhost"))


def test_a_file_that_does_not_say_how_it_was_made_is_not_said_to_have_shown_images(command, tmp_path):
    assert command("--responses", write(tmp_path / "answers.jsonl", [row(1, "B")]), "--out", tmp_path / "out") == 0
    assert "- images: not known\n- answers: not known\n" in (tmp_path / "out" / "report.md").read_text()


def test_the_self_test_passes_and_says_so(command, capsys):
    assert command("--self-test") == 0
    assert "default" in capsys.readouterr().out


def test_the_self_test_tries_a_benchmarks_rows(command, capsys):
    assert command("--self-test", "--benchmarks", "phantom") == 0
    assert "600 rows" in capsys.readouterr().out


def ask(*arguments: object) -> list[object]:
    return ["--benchmarks", "phantom", "--limit", 6, *arguments]


def test_likelihoods_give_letters_and_calibration(command, model, tmp_path):
    command("--model", model, "--out", tmp_path / "out", *ask("--scoring", "likelihood"))
    answers = read_lines(tmp_path / "out" / "responses.jsonl")
    assert all(sum(answer["likelihood"]["text"]) == pytest.approx(1, abs=1e-3) for answer in answers)
    entry = scores(tmp_path / "out")["benchmarks"]["phantom"]
    assert entry["unparsed"] == 0 and 0 <= entry["calibration"]["letter"]["ece"] <= 1


def test_every_order_of_the_options_is_asked_and_only_the_first_counts(command, model, tmp_path):
    command("--model", model, "--out", tmp_path / "out", *ask("--rotate-options"))
    entry = scores(tmp_path / "out")["benchmarks"]["phantom"]
    assert entry["n"] == 6 and entry["rotation"]["rows"] >= 4
    assert len(read_lines(tmp_path / "out" / "responses.jsonl")) > 12


def test_an_endpoint_answers_and_a_killed_one_is_taken_up_again(command, tmp_path):
    with endpoint(lambda body: Sent(completion("The answer is A."))) as served:
        by_endpoint = ["--backend", "openai", "--base-url", served.url]
        command("--model", "m", "--out", tmp_path / "out", *ask(*by_endpoint))
        first = (tmp_path / "out" / "responses.jsonl").read_bytes()
        assert len(served.requests) == 6
        command("--model", "m", "--out", tmp_path / "out", *ask(*by_endpoint))
        assert len(served.requests) == 6 and (tmp_path / "out" / "responses.jsonl").read_bytes() == first
        judged = ["--responses", tmp_path / "out" / "responses.jsonl", "--out", tmp_path / "out"]
        served.reply = lambda body: Sent(completion("correct"))
        command(*judged, "--judge", "j", "--judge-url", served.url)
    result = scores(tmp_path / "out")
    assert result["backend"] == "openai" and result["benchmarks"]["phantom"]["judge"]["model"] == "j"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "m", "--benchmarks", "phantom"], "--out is missing"),
        (["--model", "m", "--out", "o"], "--benchmarks is missing"),
        (["--model", "m", "--out", "o", "--benchmarks", "phantm"], "phantm: no such benchmark; expected of phantom"),
        (["--model", "m", "--out", "o", "--benchmarks", "vqa-rad=/no/where"], "/no/where does not exist"),
        (["--model", "m", "--out", "o", "--benchmarks", "phantom", "--backend", "openai"], "needs --base-url"),
        (["--responses", "r", "--out", "o", "--protocol", "strict"], "strict: no such protocol; expected one of def"),
        (["--responses", "r", "--out", "o", "--blind"], "leave out the flags that say how to ask"),
        (["--responses", "r", "--out", "o", "--judge", "j"], "--judge needs --judge-url"),
    ],
)
def test_commands_that_do_not_fit_together_are_one_sentence(command, arguments, said):
    with pytest.raises(UserError, match=said):
        command(*arguments)


def test_a_set_stands_for_its_members():
    assert list(chosen_benchmarks(["huatuo-bundle", "phantom"]))[-2:] == ["huatuo-mmmu-val", "phantom"]
