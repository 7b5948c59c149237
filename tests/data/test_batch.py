"""The batch route, with the real client against an endpoint of files and batches on this machine."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("datatrove")


from data import batch
from data.config import Reformat
from data.mllm.cache import AnswerCache, Usage
from data.mllm.requests import request_body, request_key
from data.reformat import Describe, answers_folder, figure_of
from data.tables import Dropped, RunFolder
from huatuo_vision.schema import UserError
from tests.data.endpoint import Script, good, said
from tests.data.rows import complete_stage, pair, stored
from tests.evaluation.server import Sent


class BatchEndpoint:
    """Files and batches in memory; a batch is answered by `reply` when `finish` is called."""

    def __init__(self, reply: Callable[[dict], Sent]):
        self.reply = reply
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.calls: list[str] = []
        self.fail_after_starting = False  # the batch is made, but the answer never arrives
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer("GET", b"")

            def do_POST(self) -> None:
                self._answer("POST", self.rfile.read(int(self.headers["Content-Length"])))

            def _answer(self, method: str, body: bytes) -> None:
                path = self.path.split("?")[0].removeprefix("/v1")
                status, sent = endpoint.answer(method, path, body)
                content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
                self.send_response(status)
                kind = "application/octet-stream" if isinstance(sent, bytes) else "application/json"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        self.calls.append(f"{method} {path}")
        if (method, path) == ("POST", "/files"):
            content = re.search(rb'filename="[^"]*"\r\n(?:[^\r]+\r\n)*\r\n(.*?)\r\n--', body, re.DOTALL)[1]
            name = f"file-{len(self.files)}"
            self.files[name] = content
            return 200, {"id": name, "object": "file", "bytes": len(content), "purpose": "batch", "filename": "x"}
        if (method, path) == ("POST", "/batches"):
            asked = json.loads(body)
            name = f"batch-{len(self.batches)}"
            self.batches[name] = {"id": name, "object": "batch", "status": "in_progress", "created_at": 0, **asked}
            if self.fail_after_starting:
                self.fail_after_starting = False
                return 400, {"error": {"message": "gone wrong"}}
            return 200, self.batches[name]
        if (method, path) == ("GET", "/batches"):
            return 200, {"object": "list", "data": list(self.batches.values()), "has_more": False}
        if found := re.fullmatch(r"/batches/(.+)", path):
            return 200, self.batches[found[1]]
        if found := re.fullmatch(r"/files/(.+)/content", path):
            return 200, self.files[found[1]]
        return 404, {"error": {"message": path}}

    def finish(self) -> None:
        """Answer everything; a reply with another status goes to the file of errors, as the hosted batches do."""
        for name, made in self.batches.items():
            if made["status"] == "completed":
                continue
            lines: dict[bool, list[bytes]] = {True: [], False: []}
            for line in self.files[made["input_file_id"]].splitlines():
                request = json.loads(line)
                assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
                sent = self.reply(request["body"])
                response = {"status_code": sent.status, "body": sent.body}
                result = {"id": "r", "custom_id": request["custom_id"], "response": response, "error": None}
                lines[sent.status == 200].append(json.dumps(result).encode())
            for good_ones, key in ((True, "output_file_id"), (False, "error_file_id")):
                if lines[good_ones]:
                    made[key] = f"{name}-{key}"
                    self.files[made[key]] = b"\n".join(lines[good_ones]) + b"\n"
            made["status"] = "completed"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


WORDS = ("plain", "long", "mended", "gone")


@pytest.fixture
def script() -> Script:
    return Script(
        long=[lambda b: good(b, finish_reason="length")],
        mended=[lambda b: said("no json"), good],
        gone=[lambda b: Sent({"error": {"message": "bad picture"}}, 400)],
    )


@pytest.fixture
def hosted(script: Script) -> Iterator[BatchEndpoint]:
    endpoint = BatchEndpoint(script)
    yield endpoint
    endpoint.close()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    rows = [pair(n, caption=f"{word} A radiograph.", n_images=2 if n == 1 else 1) for n, word in enumerate(WORDS)]
    return complete_stage(tmp_path / "run", "balance", [rows[:2], rows[2:]])


def settings(hosted: BatchEndpoint | None = None, **changed: object) -> Reformat:
    values = {"method": "mllm_reformatted", "model": "m", "route": "batch", "max_retries": 0}
    return Reformat(**values | ({"base_url": hosted.url} if hosted else {}) | changed)


def requests(run: RunFolder) -> list[dict]:
    files = sorted((run.path / "batch").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def reformat(run: RunFolder, asked: Reformat) -> dict[str, str]:
    """Row id -> state, by the stage's own step."""
    rows = [
        row
        for rank in range(run.tasks("balance"))
        for row in Describe(run, asked).run(run.pairs("balance", rank), rank, run.tasks("balance"))
    ]
    return {row.id: row.reason if isinstance(row, Dropped) else row.state for row in rows}


def test_files_hold_what_would_be_sent_online(run: RunFolder) -> None:
    assert batch.write(run, settings()) == {"requests-00000.jsonl": 4}
    row = next(run.pairs("balance", 0))
    line = requests(run)[0]
    assert line["custom_id"] == request_key(figure_of(row), settings())
    pictures = [stored(k).data for k in range(1)]
    assert line["body"] == json.loads(json.dumps(request_body(figure_of(row), pictures, settings())))


def test_files_stay_below_the_limit(run: RunFolder) -> None:
    batch.write(run, settings())
    sizes = [len(json.dumps(line)) for line in requests(run)]
    for file in (run.path / "batch").iterdir():
        file.unlink()
    made = batch.write(run, settings(), max_bytes=2 * max(sizes) + 10)
    assert sum(made.values()) == 4 and len(made) >= 2
    assert all((run.path / "batch" / name).stat().st_size <= 2 * max(sizes) + 10 for name in made)


def test_the_whole_round(run: RunFolder, hosted: BatchEndpoint) -> None:
    asked = settings(hosted)
    with pytest.raises(UserError, match="no collected batch holds the answer about 'PMC0.1-f1'"):
        reformat(run, asked)
    batch.write(run, asked)
    with pytest.raises(UserError, match="are not collected yet"):
        batch.write(run, asked)
    assert len(asyncio.run(batch.submit(run, asked))) == 1
    assert asyncio.run(batch.submit(run, asked)) == []
    assert asyncio.run(batch.collect(run, asked)) == {"batches open": 1}
    hosted.finish()
    counts = asyncio.run(batch.collect(run, asked))
    assert {k: n for k, n in counts.items() if n} == {
        "ok": 1, "truncated": 1, "invalid": 1, "failed": 1, "batches ended": 1
    }  # fmt: skip
    # What could not be used is asked again, with its reply; what failed once more as it was.
    assert batch.write(run, asked) == {"requests-00001.jsonl": 1, "requests-00002.jsonl": 1}
    assert sorted(len(line["body"]["messages"]) for line in requests(run)[-2:]) == [1, 3]
    asyncio.run(batch.submit(run, asked))
    hosted.finish()
    asyncio.run(batch.collect(run, asked, wait=0.01))
    states = dict(zip((f"PMC{n}.1-f1" for n in range(4)), ("ok", "truncated", "ok", "failed"), strict=True))
    assert reformat(run, asked) == states
    with AnswerCache(answers_folder(run)) as cache:
        assert cache.usage() == {False: Usage(), True: Usage(4, 40, 0, 12, 0)}
    # Online, only what has no answer is asked.
    assert batch.write(run, asked) == {"requests-00003.jsonl": 1}


def test_a_batch_is_never_started_twice(run: RunFolder, hosted: BatchEndpoint) -> None:
    asked = settings(hosted)
    batch.write(run, asked)
    hosted.fail_after_starting = True
    with pytest.raises(UserError, match="gone wrong"):
        batch._run(batch.submit(run, asked), asked)
    assert batch.Batches(run).files["requests-00000.jsonl"].input_file_id == "file-0"
    asyncio.run(batch.submit(run, asked))
    assert list(hosted.batches) == ["batch-0"] and list(hosted.files) == ["file-0"]
    assert batch.Batches(run).files["requests-00000.jsonl"].batch_id == "batch-0"


def test_results_of_ones_own_server(run: RunFolder, script: Script, tmp_path: Path) -> None:
    batch.write(run, settings())
    lines = []
    for request in requests(run):
        sent = script(request["body"])
        response = {"status_code": sent.status, "request_id": "r", "body": sent.body}
        lines.append(json.dumps({"id": "r", "custom_id": request["custom_id"], "response": response, "error": None}))
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join([*lines, "half a li"]))
    counts = batch.collect_files(run, [results])
    assert counts == {"ok": 1, "truncated": 1, "invalid": 1, "failed": 1, "unreadable lines": 1}
    batch.collect_files(run, [results])  # twice changes nothing
    assert sum(batch.write(run, settings()).values()) == 2


def test_a_damaged_state_is_not_thrown_away(run: RunFolder) -> None:
    batch.write(run, settings())
    (run.path / "batch/state.json").write_text('{"requests-00000.jsonl": {"attempt": 3}}')
    with pytest.raises(UserError, match="ids of batches that are paid for"):
        batch.Batches(run)


def test_no_key_in_what_is_written(run: RunFolder, hosted: BatchEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-" + "q7" * 16
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    asked = settings(hosted)
    batch.write(run, asked)
    asyncio.run(batch.submit(run, asked))
    assert not any(secret.encode() in path.read_bytes() for path in run.path.rglob("*") if path.is_file())
