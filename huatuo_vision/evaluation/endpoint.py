"""Asking a model behind an OpenAI-compatible endpoint: vLLM, SGLang, `transformers serve`, hosted ones. No torch.

The client retries what may pass (no connection, timeouts, 408, 409, 429, 5xx) with growing pauses. A row that still
fails is left for the next run and does not disturb the others, until `concurrency` rows have failed with no answer
between them; a wrong key or model name ends the run at once. Either way the rows in flight are waited for, every
answer is on disk as soon as it is there, and the same command asks only what is missing.

The seed is the same for every row, as servers have no other way to take one. Servers apply a repetition penalty as
they see fit: vLLM's counts the prompt too.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import openai
from rich.console import Console

from huatuo_vision.evaluation.answers import progress_bar, response_of
from huatuo_vision.evaluation.protocols import Protocol
from huatuo_vision.evaluation.responses import append, finished
from huatuo_vision.evaluation.rows import Row
from huatuo_vision.inputs.images import load_image, read_encoded, without_headers
from huatuo_vision.openai_endpoint import FATAL, NotAnAnswer, complete, connect, explained, host_of
from huatuo_vision.schema import ImageRef, UserError, escape_placeholder

RESPONSES_FILE = "responses.endpoint.jsonl"

MAX_RETRIES = 5
TIMEOUT = openai.Timeout(300.0, connect=10.0)  # seconds; a row of 256 tokens may wait behind others for minutes


Item = TypeVar("Item")


def identity(model: str, base_url: str) -> str:
    """Which model answered: the endpoint's host and the name it is asked for by."""
    return f"{host_of(base_url)}/{model}"


def answer(
    rows: Sequence[Row],
    protocol: Protocol,
    model: str,
    base_url: str,
    out: Path,
    *,
    blind: bool,
    concurrency: int = 8,
    console: Console | None = None,
) -> None:
    """Append the answers to `rows` to `out`/responses.endpoint.jsonl, each as soon as it is there.

    Raises UserError where rows are left without an answer; those that have one are kept.
    """
    path = out / RESPONSES_FILE

    async def ask(client: openai.AsyncOpenAI, row: Row) -> None:
        messages = await asyncio.to_thread(messages_of, row, protocol, blind=blind)
        begin = time.monotonic()
        reply = await complete(client, messages, **request_settings(protocol, model))
        extra = {} if reply.new_tokens is None else {"new_tokens": reply.new_tokens}
        append(path, [response_of(row, reply.text, seconds=round(time.monotonic() - begin, 3), **extra)])

    failures = ask_all(rows, ask, base_url, doing="answering", concurrency=concurrency, console=console)
    if failures:
        raise UserError(
            f"{failures.said(model, base_url)}; {len(finished(out)):,} answers are kept, {failures.left:,} are "
            "missing: run the same command again to go on"
        )


def request_settings(protocol: Protocol, model: str) -> dict[str, Any]:
    """What a chat completion is asked with besides its messages."""
    decoding = protocol.decoding
    settings: dict[str, Any] = {
        "model": model,
        "temperature": decoding.temperature,
        "max_tokens": decoding.max_new_tokens,
        "seed": decoding.seed,
    }
    if decoding.repetition_penalty != 1.0:
        # No parameter of OpenAI's, but of all servers for open models.
        settings["extra_body"] = {"repetition_penalty": decoding.repetition_penalty}
    return settings


def messages_of(row: Row, protocol: Protocol, *, blind: bool) -> list[dict[str, Any]]:
    """The row's question as one user turn, its images before its text."""
    images = () if blind else row.images
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_uri(ref, row.id)}} for ref in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": escape_placeholder(protocol.render(row))}]}]


def data_uri(ref: ImageRef, row_id: str) -> str:
    """An upright RGB or grey JPEG or PNG with its pixels as they are stored; whatever else as a PNG of the pixels our
    own model sees. No header goes along: it may name a patient.

    Endpoints can't be trusted with the rest: most refuse TIFF, and 16-bit radiographs come out white.
    """
    loaded = load_image(ref, row_id)
    kept = None if loaded.notes else without_headers(read_encoded(ref, row_id))
    if kept is None:
        png = io.BytesIO()
        loaded.image.save(png, format="PNG")
        kept = png.getvalue(), "png"
    encoded, kind = kept
    return f"data:image/{kind.replace('jpg', 'jpeg')};base64,{base64.b64encode(encoded).decode()}"


@dataclass(frozen=True, slots=True)
class Failures(Generic[Item]):
    """Items without a result: those that failed, and those not tried any more."""

    failed: list[tuple[Item, Exception]]
    left: int  # failed or not tried

    def __bool__(self) -> bool:
        return self.left > 0

    def said(self, model: str, base_url: str) -> str:
        """The first failure, without what an endpoint may quote of the key."""
        item, error = self.failed[0]
        others = f" ({len(self.failed) - 1} others failed too)" if len(self.failed) > 1 else ""
        name = f" at row {item.id!r}" if isinstance(item, Row) else ""
        said = explained(error, model, host_of(base_url), max_retries=MAX_RETRIES, timeout=TIMEOUT)
        return f"{said}{name}{others}"


def ask_all(
    items: Sequence[Item],
    ask: Callable[[openai.AsyncOpenAI, Item], Awaitable[None]],
    base_url: str,
    *,
    doing: str,
    concurrency: int,
    console: Console | None,
) -> Failures[Item]:
    """Run `ask` on every item, `concurrency` at a time; it keeps its results itself. Raises UserError for a bad URL."""
    return asyncio.run(_ask_all(items, ask, base_url, doing=doing, concurrency=concurrency, console=console))


async def _ask_all(
    items: Sequence[Item],
    ask: Callable[[openai.AsyncOpenAI, Item], Awaitable[None]],
    base_url: str,
    *,
    doing: str,
    concurrency: int,
    console: Console | None,
) -> Failures[Item]:
    failed: list[tuple[Item, Exception]] = []
    done = failed_in_a_row = 0
    fatal = False

    async def work(waiting: Iterator[Item]) -> None:
        nonlocal done, failed_in_a_row, fatal
        # Only the items being asked are in memory with their images.
        while not fatal and failed_in_a_row < concurrency:
            item = next(waiting, None)
            if item is None:
                return
            try:
                await ask(client, item)
            except (openai.OpenAIError, NotAnAnswer) as error:
                failed.append((item, error))
                failed_in_a_row += 1
                # Where no connection was ever had, the others would only wait for the same.
                is_down = done == 0 and type(error) is openai.APIConnectionError
                fatal = fatal or is_down or isinstance(error, FATAL)
            else:
                done += 1
                failed_in_a_row = 0
                progress.advance(task)

    waiting = iter(items)
    with progress_bar(doing, console=console) as progress:
        task = progress.add_task("rows", total=len(items))
        async with connect(base_url, max_retries=MAX_RETRIES, timeout=TIMEOUT) as client:
            await asyncio.gather(*(work(waiting) for _ in range(min(concurrency, len(items)))))
    return Failures(failed, len(items) - done)
