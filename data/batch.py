"""The batch route: the requests that the stage reformat would send, as files for a hosted batch or `vllm run-batch`.

    python -m data.batch write   --config FILE --out DIR     requests without an answer yet, in files below a size
    python -m data.batch submit  --config FILE --out DIR     upload them; their ids are on disk before any waiting
    python -m data.batch collect --config FILE --out DIR     fetch what is ready into the cache of answers

`--out` is the run folder. With `reformat: {route: batch}` the stage reformat then finds its answers there. Replies that
cannot be used are asked again by the next `write`, as are requests that failed; what is in the cache is never written
again. For a server of one's own: `vllm run-batch -i batch/requests-....jsonl -o results.jsonl --model M`, then
`collect --results results.jsonl`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import openai
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from data.config import BuildConfig, Reformat, load_config
from data.mllm.ask import base_url, kept_reply
from data.mllm.cache import AnswerCache
from data.mllm.requests import Rejected, request_body, request_key
from data.reformat import PREVIOUS, FiguresOfRank, answers_folder
from data.tables import RunFolder, whole_file, write_json
from huatuo_vision.cli import run_command
from huatuo_vision.openai_endpoint import NotAnAnswer, connect, explained, host_of, one_line, read_reply
from huatuo_vision.schema import UserError

# The hosted limits: 200 MB and 50,000 requests a file.
MAX_FILE_BYTES = 190 * 10**6
MAX_FILE_REQUESTS = 50_000
ENDED = ("completed", "failed", "expired", "cancelled")
WRITER = "batch"
_MARK = "huatuo_vision_file"  # in a batch's metadata: the SHA-256 of its file


class BatchFile(BaseModel):
    """One file of requests, and how far it is."""

    model_config = ConfigDict(extra="forbid")

    attempt: Literal[1, 2]
    requests: int
    sha256: str
    input_file_id: str | None = None
    batch_id: str | None = None
    status: str | None = None
    collected: bool = False


class Batches:
    """`<run>/batch/`: the files, and state.json, which is written after every step."""

    def __init__(self, run: RunFolder):
        self.folder = run.path / "batch"
        self.path = self.folder / "state.json"
        self.files: dict[str, BatchFile] = {}
        if self.path.is_file():
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self.files = {name: BatchFile.model_validate(file) for name, file in stored.items()}
            except (ValueError, AttributeError, ValidationError) as error:
                raise UserError(
                    f"{self.path} is damaged ({one_line(error)}); it holds the ids of batches that are paid for, so "
                    "restore it from a copy"
                ) from None

    def save(self) -> None:
        write_json(self.path, {name: file.model_dump() for name, file in self.files.items()})

    @property
    def open(self) -> dict[str, BatchFile]:
        """Files whose answers have not been collected."""
        return {name: file for name, file in self.files.items() if not file.collected}


def write(
    run: RunFolder, settings: Reformat, *, max_bytes: int = MAX_FILE_BYTES, evidence: bool = False
) -> dict[str, int]:
    """Write the requests that have no answer; name of each new file -> requests. Raises UserError."""
    batches = Batches(run)
    if batches.open:
        raise UserError(
            f"{next(iter(batches.open))} and {len(batches.open) - 1} more files in {batches.folder} are not collected "
            "yet, and their requests would be written twice; submit and collect them first, or delete the folder if "
            "nothing of it was submitted"
        )
    made: dict[str, int] = {}
    with AnswerCache(answers_folder(run)) as cache:
        writers = {attempt: _Files(batches, attempt, max_bytes, made) for attempt in (1, 2)}
        for key, attempt, body in _missing(run, settings, cache, evidence):
            line = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
            writers[attempt].write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        for writer in writers.values():
            writer.close()
    batches.save()
    return made


def _missing(
    run: RunFolder, settings: Reformat, cache: AnswerCache, evidence: bool
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(key, attempt, body) of every request that has no answer, once each."""
    seen: set[str] = set()
    for rank in range(run.tasks(PREVIOUS)):
        with FiguresOfRank(run, rank, evidence=evidence) as figures:
            for pair in run.pairs(PREVIOUS, rank):
                figure = figures.of(pair)
                key = request_key(figure, settings)
                if key in seen:
                    continue
                seen.add(key)
                kept = cache.find(key)
                rejected = None
                if 1 in kept:
                    if kept[1].state != "invalid" or 2 in kept:
                        continue
                    rejected = Rejected(kept[1].text, kept[1].problem or "")
                body = request_body(figure, figures.images(figure), settings, rejected)
                yield key, 1 if rejected is None else 2, body


class _Files:
    """Requests of one attempt, in files below the limits."""

    def __init__(self, batches: Batches, attempt: Literal[1, 2], max_bytes: int, made: dict[str, int]):
        self.batches, self.attempt, self.max_bytes, self.made = batches, attempt, max_bytes, made
        self.lines: list[bytes] = []
        self.size = 0

    def write(self, line: bytes) -> None:
        if self.lines and (self.size + len(line) > self.max_bytes or len(self.lines) >= MAX_FILE_REQUESTS):
            self.close()
        self.lines.append(line)
        self.size += len(line)

    def close(self) -> None:
        if not self.lines:
            return
        name = f"requests-{len(self.batches.files):05d}.jsonl"
        content = b"".join(self.lines)
        with whole_file(self.batches.folder / name) as unfinished:
            unfinished.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        self.batches.files[name] = BatchFile(attempt=self.attempt, requests=len(self.lines), sha256=digest)
        self.made[name] = len(self.lines)
        self.lines, self.size = [], 0


async def submit(run: RunFolder, settings: Reformat) -> list[str]:
    """Upload and start every file that has no batch yet; the names of those started. Raises UserError."""
    batches = Batches(run)
    waiting = {name: file for name, file in batches.open.items() if file.batch_id is None}
    async with _client(settings) as client:
        # A batch may have been started without its id reaching the disk: look before starting another.
        known = {file.batch_id for file in batches.files.values()}
        started = await _started(client, known) if any(file.input_file_id for file in waiting.values()) else {}
        for name, file in waiting.items():
            if file.sha256 not in started:
                if file.input_file_id is None:
                    with (batches.folder / name).open("rb") as content:
                        file.input_file_id = (await client.files.create(file=content, purpose="batch")).id
                    batches.save()
                batch = await client.batches.create(
                    input_file_id=file.input_file_id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={_MARK: file.sha256},
                )
                started[file.sha256] = batch.id
            file.batch_id = started[file.sha256]
            batches.save()
    return list(waiting)


async def _started(client: openai.AsyncOpenAI, known: set[str | None]) -> dict[str, str]:
    """SHA-256 of a file -> the id of its batch, of the batches of ours that the endpoint knows and we don't."""
    found = {}
    async for batch in client.batches.list(limit=100):
        if _MARK in (batch.metadata or {}) and batch.id not in known and batch.status not in ("failed", "cancelled"):
            found[batch.metadata[_MARK]] = batch.id
    return found


async def collect(run: RunFolder, settings: Reformat, *, wait: float | None = None) -> Counter[str]:
    """Fetch the answers of every batch that has ended into the cache; their states, and the batches' own.

    With `wait`, ask again after so many seconds until all have ended.
    """
    batches = Batches(run)
    counts: Counter[str] = Counter()
    async with _client(settings) as client:
        while True:
            for name, file in batches.open.items():
                if file.batch_id is None:
                    continue
                batch = await client.batches.retrieve(file.batch_id)
                file.status = batch.status
                if batch.status in ENDED:
                    for file_id in (batch.output_file_id, batch.error_file_id):
                        if file_id is not None:
                            content = await client.files.content(file_id)
                            counts += read_results(run, content.content.splitlines(), file.attempt, name)
                    # A batch that expired or failed leaves requests without a line: the next `write` has them.
                    file.collected = True
                    counts["batches ended"] += 1
                batches.save()
            still_open = [file for file in batches.open.values() if file.batch_id is not None]
            if wait is None or not still_open:
                counts["batches open"] = len(still_open)
                return counts
            await asyncio.sleep(wait)


def collect_files(run: RunFolder, results: Sequence[Path]) -> Counter[str]:
    """Take the results of a run on one's own server into the cache. Raises UserError."""
    batches = Batches(run)
    if not batches.files:
        raise UserError(f"{batches.folder} holds no requests; these results are of another run")
    counts: Counter[str] = Counter()
    attempts = _attempts(batches)
    for path in results:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror})") from None
        by_attempt: dict[int, list[bytes]] = {}
        for line in lines:
            by_attempt.setdefault(attempts.get(_custom_id(line), 1), []).append(line)
        for attempt, some in by_attempt.items():
            counts += read_results(run, some, attempt, path.name)
    for file in batches.open.values():
        file.collected = file.batch_id is None
    batches.save()
    return counts


def _attempts(batches: Batches) -> dict[str, int]:
    """custom_id -> attempt, of the files that are not collected."""
    return {
        _custom_id(line): file.attempt
        for name, file in batches.open.items()
        for line in (batches.folder / name).read_bytes().splitlines()
    }


def _custom_id(line: bytes) -> str:
    try:
        return str(json.loads(line)["custom_id"])
    except (ValueError, TypeError, KeyError):
        return ""


def read_results(run: RunFolder, lines: Sequence[bytes], attempt: int, name: str) -> Counter[str]:
    """Keep every answer of a result file; states -> number. A line that is none is counted and left out."""
    counts: Counter[str] = Counter()
    with AnswerCache(answers_folder(run), WRITER) as cache:
        for line in lines:
            if not line.strip():
                continue
            try:
                result = json.loads(line)
                key, response = str(result["custom_id"]), result.get("response") or {}
                status, body = response.get("status_code"), response.get("body")
            except (ValueError, TypeError, KeyError, AttributeError):
                counts["unreadable lines"] += 1
                continue
            try:
                if result.get("error") or status != 200:
                    raise NotAnAnswer(one_line(result.get("error") or f"{status}: {body}"))
                reply = read_reply(ChatCompletion.construct(**body) if isinstance(body, dict) else body)
            except NotAnAnswer as error:
                cache.keep_failure(key, f"{name}: {error}")
                counts["failed"] += 1
                continue
            kept = kept_reply(key, attempt, reply, batch=True)
            cache.keep(kept)
            counts[kept.state] += 1
    return counts


def _client(settings: Reformat) -> openai.AsyncOpenAI:
    timeout = openai.Timeout(settings.timeout, connect=10.0)
    return connect(base_url(settings), max_retries=settings.max_retries, timeout=timeout)


def _run(action: Any, settings: Reformat) -> Any:
    """Run a coroutine; what the endpoint refuses is one sentence."""
    try:
        return asyncio.run(action)
    except openai.OpenAIError as error:
        host = host_of(base_url(settings))
        timeout = openai.Timeout(settings.timeout, connect=10.0)
        said = explained(error, settings.model or "", host, max_retries=settings.max_retries, timeout=timeout)
        raise UserError(f"{said}; what was done is on disk: run the same command to go on") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("write", "submit", "collect"))
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the builder's configuration")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run folder of data.build")
    parser.add_argument("--max-mb", type=int, default=MAX_FILE_BYTES // 10**6, help="write: size of a file (190)")
    parser.add_argument("--wait", type=float, metavar="SECONDS", help="collect: ask so often until all have ended")
    parser.add_argument("--results", type=Path, nargs="+", metavar="FILE", help="collect: files of vllm run-batch")
    arguments = parser.parse_args()
    config: BuildConfig = load_config(arguments.config)
    settings = config.reformat
    if settings.method == "native_caption":
        raise UserError("reformat.method native_caption asks no model, so there is nothing to send in a batch")
    run, console = RunFolder(arguments.out), Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if arguments.command == "write":
        made = write(run, settings, max_bytes=arguments.max_mb * 10**6, evidence=config.retrieve is not None)
        say(f"{sum(made.values()):,} requests in {len(made)} files in {run.path / 'batch'}")
    elif arguments.command == "submit":
        started = _run(submit(run, settings), settings)
        say(f"{len(started)} batches started; collect fetches them when they have ended")
    else:
        begin = time.monotonic()
        if arguments.results:
            counts = collect_files(run, arguments.results)
        else:
            counts = _run(collect(run, settings, wait=arguments.wait), settings)
        said = ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items())) or "nothing to collect"
        say(f"{said} ({time.monotonic() - begin:.0f} s)")


if __name__ == "__main__":
    run_command(main)
