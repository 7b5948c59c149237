"""The stage reformat: rows in order, each state counted, and nothing paid for twice, killed or not."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("datatrove")


from data.config import Reformat
from data.mllm.ask import Stopped
from data.mllm.cache import AnswerCache
from data.mllm.estimate import estimate
from data.mllm.prompts import prompt_version
from data.reformat import Describe, answers_folder, figure_of, reformat_pass
from data.tables import Dropped, Pair, RunFolder
from tests.data.endpoint import ANSWER, Script, good, prompt_of, said
from tests.data.rows import complete_stage, pair, stored
from tests.evaluation.server import Sent, endpoint

ROOT = Path(__file__).parents[2]
SECRET = "sk-" + "q7" * 16


def settings(url: str | None = None, **changed: object) -> Reformat:
    values = {"method": "mllm_reformatted", "model": "m", "base_url": url, "concurrency": 4, "max_retries": 0}
    return Reformat(**values | changed)


def describe(run: RunFolder, asked: Reformat, rank: int = 0, dropped: tuple[Dropped, ...] = ()) -> list[Pair | Dropped]:
    step = pickle.loads(pickle.dumps(Describe(run, asked)))  # as it travels to a worker
    return list(step.run(iter([*dropped, *run.pairs("balance", rank)]), rank, 1))


def test_rows_keep_their_order_and_every_state_its_name(tmp_path: Path) -> None:
    script = Script(
        slow=[lambda b: Sent(good(b).body, delay=0.3)],
        long=[lambda b: good(b, finish_reason="length")],
        refuse=[lambda b: said(None, refusal="no")],
        odd=[lambda b: said("no json")],
        gone=[lambda b: Sent({"error": {"message": "bad picture"}}, 400)],
    )
    words = ["slow", *["plain"] * 30, "long", "refuse", "odd", "gone"]
    rows = [pair(n, caption=f"{word} A radiograph.") for n, word in enumerate(words)]
    run = complete_stage(tmp_path, "balance", [rows])
    gone_before = Dropped("before", "few_terms")
    with endpoint(script) as served:
        out = describe(run, settings(served.url, max_failed_share=0.1), dropped=(gone_before,))
    assert out[0] is gone_before
    assert [row.id for row in out[1:]] == [row.id for row in rows]
    states = Counter(row.reason if isinstance(row, Dropped) else row.state for row in out[1:])
    assert states == {"ok": 31, "truncated": 1, "refused": 1, "invalid": 1, "failed": 1}
    assert served.most_at_once <= 4
    first = out[1]
    assert (first.description, first.query, first.answer) == tuple(ANSWER.values())[:3]
    assert (first.modality, first.body_part, first.method, first.model) == ("X-Ray", "Chest", "mllm_reformatted", "m")
    assert first.prompt_version == prompt_version("mllm_reformatted") and first.scenario
    assert "bad picture" in out[-1].detail


def test_the_right_pictures_are_sent(tmp_path: Path) -> None:
    run = complete_stage(tmp_path, "balance", [[pair(n, n_images=n % 3 + 1) for n in range(6)]])
    with endpoint(good) as served:
        describe(run, settings(served.url))
    sent = Counter(len(body["messages"][0]["content"]) - 1 for body in served.requests)
    assert sent == {1: 2, 2: 2, 3: 2}
    urls = [part["image_url"]["url"] for body in served.requests for part in body["messages"][0]["content"][:-1]]
    assert len(set(urls)) == 12


def test_native_captions_ask_nobody(tmp_path: Path) -> None:
    run = complete_stage(tmp_path, "balance", [[pair(1), pair(2, caption=" ")]])
    kept, dropped = describe(run, Reformat(method="native_caption"))
    assert (kept.description, kept.query, kept.model, kept.modality) == (pair(1).caption, None, None, None)
    assert dropped.reason == "no_caption"


def test_when_the_run_stops_the_answers_in_flight_are_kept(tmp_path: Path) -> None:
    def answer(body: dict) -> Sent:
        if "number 0." in prompt_of(body):
            return Sent({"error": {"message": "no such model"}}, 404)
        return Sent(good(body).body, delay=0.3)

    run = complete_stage(tmp_path, "balance", [[pair(n) for n in range(40)]])
    with endpoint(answer) as served, pytest.raises(Stopped, match="knows no model"):
        describe(run, settings(served.url))
    with AnswerCache(answers_folder(run)) as cache:
        assert cache.usage()[False].answers == len(served.requests) - 1 == 3


def test_a_pickled_step_holds_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    made = reformat_pass(RunFolder(tmp_path), settings("http://localhost:1/v1"), 1)
    assert SECRET.encode() not in pickle.dumps(made.steps)


def test_limits_and_places_do_not_change_what_a_run_is(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    base = reformat_pass(run, settings(), 1).settings
    prices = {"input": 1, "output": 1}
    moved = settings("http://localhost:1/v1", concurrency=9, max_cost=5, prices=prices, route="batch", timeout=1)
    assert reformat_pass(run, moved, 1).settings == base
    assert reformat_pass(run, settings(temperature=0.2), 1).settings != base
    assert reformat_pass(run, settings(seed=1), 1).settings != base
    assert "answers" not in str(reformat_pass(run, settings(), 1).folders)


def test_an_estimate_multiplies_and_its_answers_are_kept(tmp_path: Path) -> None:
    run = complete_stage(tmp_path, "balance", [[pair(n) for n in range(10)]])
    asked = {"prices": {"input": 1000, "output": 2000}}
    with endpoint(good) as served:
        with AnswerCache(answers_folder(run), "estimate") as cache, run.images(0) as images:
            figures = [figure_of(row) for row in run.pairs("balance", 0)][:5]
            read = lambda figure: [images.get(i) for i in figure.image_sha256]  # noqa: E731
            made = estimate(10, figures, settings(served.url, **asked), cache, read)
        assert (made.asked, made.states, made.new_requests) == (5, {"ok": 5}, 5)
        # 10 tokens in and 3 out a row.
        assert made.cost == pytest.approx(10 * (10 * 1000 + 3 * 2000) / 1e6)
        assert made.batch_cost == pytest.approx(made.cost / 2)
        describe(run, settings(served.url))
    assert len(served.requests) == 10


def work(run: RunFolder, url: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.data.reformat_worker", str(run.path), url]
    kept = {k: v for k, v in os.environ.items() if k not in ("OPENAI_BASE_URL", "LOGURU_DIAGNOSE")}
    return subprocess.Popen(command, cwd=ROOT, env=kept | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def rows_of(run: RunFolder) -> list[Pair]:
    return [row for rank in range(run.tasks("reformat")) for row in run.pairs("reformat", rank)]


def test_killed_and_run_again_pays_for_nothing_twice(tmp_path: Path) -> None:
    ranks = [[pair(n) for n in range(30)], [pair(n) for n in range(30, 60)]]
    run = complete_stage(tmp_path / "killed", "balance", ranks)
    with endpoint(lambda body: Sent(good(body).body, delay=0.02)) as served:
        process = work(run, served.url, OPENAI_API_KEY=SECRET)
        while len(served.requests) < 37:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        before = len(served.requests)
        log = work(run, served.url, OPENAI_API_KEY=SECRET).communicate()[0]
        times = Counter(re.search(r"number (\d+)", prompt_of(body))[1] for body in served.requests)
    assert before < 60 and len(times) == 60
    twice = [n for n, count in times.items() if count > 1]
    assert len(twice) <= 4 and max(times.values()) <= 2, times
    undisturbed = complete_stage(tmp_path / "undisturbed", "balance", ranks)
    with endpoint(good) as served:
        expected = [row for rank in (0, 1) for row in describe(undisturbed, settings(served.url), rank)]
    assert rows_of(run) == expected and len(expected) == 60
    # No key, and no picture, in a log, a pickle, a cache or a table of the stage.
    pictures = [stored(10 * n).data for n in (0, 59)]
    left = [path for path in run.path.rglob("*") if path.is_file() and "images" not in path.parts]
    assert len(left) > 8
    for content in (log, *(path.read_bytes() for path in left)):
        assert SECRET.encode() not in content
        assert b";base64," not in content and not any(picture in content for picture in pictures)


def test_no_key_and_no_picture_in_the_log_of_a_run_that_breaks(tmp_path: Path) -> None:
    run = complete_stage(tmp_path, "balance", [[pair(n) for n in range(5)]])

    def echo(body: dict) -> Sent:
        return Sent({"error": {"message": f"{SECRET}: {body['messages']}"}}, 401)

    with endpoint(echo) as served:
        process = work(run, served.url, OPENAI_API_KEY=SECRET, OPENAI_LOG="debug")
        log = process.communicate()[0]
    assert process.returncode != 0 and b"refuses the key" in log
    for content in (log, *(path.read_bytes() for path in (run.path / "logs").rglob("*") if path.is_file())):
        assert SECRET.encode() not in content and b";base64," not in content


def test_a_traceback_shows_no_values(tmp_path: Path) -> None:
    """A fault of our own, in the middle of a request: the log has the traceback, and nothing of what was in hand."""
    run = complete_stage(tmp_path, "balance", [[pair(1)]])
    table = pq.read_table(run.images_file(0))
    broken = pa.array([{"bytes": b"PICTURE-BYTES" * 9, "path": "x.jpg"}], table.schema.field("image").type)
    pq.write_table(table.set_column(1, table.schema.field("image"), broken), run.images_file(0))
    with endpoint(good) as served:
        process = work(run, served.url, OPENAI_API_KEY=SECRET)
        said_there = process.communicate()[0]
    log = b"".join(path.read_bytes() for path in (run.path / "logs").rglob("*.log"))
    assert process.returncode == 2 and b"Traceback" in log and b"load_image" in log
    for content in (said_there, log):
        assert b"PICTURE-BYTES" not in content and SECRET.encode() not in content
