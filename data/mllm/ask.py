"""Asking an MLLM about figures, many at once: from the cache where it is known, else from the endpoint, and kept.

One figure that fails disturbs no other. What no other figure would survive either ends the run: a wrong key or model
name, an endpoint that answers nobody, too many failures, or the money that was set aside being spent. The requests in
flight are then waited for, since they are paid for, and the same command goes on from there.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import openai

from data.config import Reformat
from data.mllm.answers import STATES, Answer, Outcome, State, judge
from data.mllm.cache import AnswerCache, Kept, Usage, spent
from data.mllm.requests import Figure, Rejected, request_body, request_key
from huatuo_vision.openai_endpoint import FATAL, NotAnAnswer, Reply, complete, connect, explained, host_of
from huatuo_vision.schema import UserError

ReadImages = Callable[[Figure], Sequence[bytes]]

# Below so many rows, a share says nothing.
_ROWS_BEFORE_A_SHARE_COUNTS = 20
# Other tasks' answers are looked at for the cost after every so many of one's own.
_ANSWERS_BETWEEN_LOOKS = 25


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of one figure."""

    state: State
    answer: Answer | None
    model: str | None  # as the endpoint called it
    problem: str | None


class Stopped(UserError):
    """The run ends here, though rows are left; what was answered is kept."""


class _NotInABatch(Exception):
    def __init__(self, failure: str | None):
        super().__init__(failure)
        self.failure = failure  # what the batch said of the request, if there was one


@dataclass
class Asker:
    """An async context manager; `ask` may run in any number of tasks of one event loop."""

    settings: Reformat
    cache: AnswerCache
    read_images: ReadImages
    counts: Counter[str] = field(default_factory=Counter)  # cached, asked, asked_again, and the states
    usage: Usage = Usage()  # of what this object asked
    seconds: float = 0.0  # summed over the requests
    stopped: Stopped | None = None
    _client: openai.AsyncOpenAI | None = None
    _in_flight: dict[str, asyncio.Future] = field(default_factory=dict)
    _open_requests: int = 0
    _failed_in_a_row: int = 0
    _dearest: float | None = None
    _spent: float = 0.0
    _since_look: int = 0

    async def __aenter__(self) -> Asker:
        self._stack = AsyncExitStack()
        if self.settings.route == "online":
            self._base_url = base_url(self.settings)
            self._host = host_of(self._base_url)
            self._timeout = openai.Timeout(self.settings.timeout, connect=10.0)
            client = connect(self._base_url, max_retries=self.settings.max_retries, timeout=self._timeout)
            self._client = await self._stack.enter_async_context(client)
        self._slots = asyncio.Semaphore(self.settings.concurrency)
        self._changed = asyncio.Condition()
        self._look_at_the_cost()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()

    async def ask(self, figure: Figure) -> Asked:
        """Raises Stopped when the run must end; a figure asked before that is answered all the same."""
        key = request_key(figure, self.settings)
        if key in self._in_flight:  # the same figure printed twice: paid once
            await asyncio.wait([self._in_flight[key]])
        done = self._in_flight[key] = asyncio.get_running_loop().create_future()
        try:
            asked = await self._ask(figure, key)
        finally:
            done.set_result(None)
            del self._in_flight[key]
        self.counts[asked.state] += 1
        return asked

    async def _ask(self, figure: Figure, key: str) -> Asked:
        kept = self.cache.find(key)
        if kept:
            self.counts["cached"] += 1
        first = kept.get(1)
        try:
            if first is None:
                first = await self._request(figure, key, attempt=1)
            if first.state != "invalid":
                return _asked(first)
            again = kept.get(2)
            if again is None:
                self.counts["asked_again"] += 1
                again = await self._request(figure, key, attempt=2, rejected=Rejected(first.text, first.problem or ""))
            return _asked(again)
        except _NotInABatch as error:
            if error.failure is None:
                raise self._stop(
                    f"no collected batch holds the answer about {figure.id!r}; write, submit and collect the missing "
                    "ones (python -m data.batch), then run the same command again"
                ) from None
            return Asked("failed", None, None, error.failure)
        except (openai.OpenAIError, NotAnAnswer) as error:
            return self._failed(key, error)

    async def _request(self, figure: Figure, key: str, *, attempt: int, rejected: Rejected | None = None) -> Kept:
        if self._client is None:
            raise _NotInABatch(self.cache.failure(key))
        async with self._slots:
            await self._afford()
            try:
                # Decoding and encoding pictures would hold up every other request.
                images = await asyncio.to_thread(self.read_images, figure)
                body = await asyncio.to_thread(request_body, figure, images, self.settings, rejected)
                begin = time.monotonic()
                reply = await complete(self._client, body.pop("messages"), **_as_arguments(body, self.settings))
                seconds = time.monotonic() - begin
            finally:
                await self._leave()
            kept = kept_reply(key, attempt, reply, seconds=round(seconds, 3))
            self.cache.keep(kept)
        self.counts["asked"] += 1
        self._failed_in_a_row = 0
        self.seconds += seconds
        usage = usage_of(kept)
        self.usage += usage
        if self.settings.prices:
            cost = usage.cost(self.settings.prices)
            self._spent += cost
            self._dearest = max(cost, self._dearest or 0.0)
            self._since_look += 1
            if self._since_look >= _ANSWERS_BETWEEN_LOOKS:
                self._look_at_the_cost()
        return kept

    async def _afford(self) -> None:
        """Wait until another request surely fits into `max_cost`; raise where it does not, or the run has ended."""
        async with self._changed:
            # What a request costs is known after the first: until then, one at a time.
            limit = self.settings.max_cost
            while limit is not None and self._dearest is None and self._open_requests and self.stopped is None:
                await self._changed.wait()
            if limit is not None and self.stopped is None:
                at_most = self._spent + (self._open_requests + 1) * (self._dearest or 0.0)
                if at_most > limit:
                    currency = self.settings.prices.currency
                    self._stop(
                        f"max_cost is reached: {self._spent:,.2f} {currency} of {limit:,.2f} are spent, and the "
                        "requests in flight may need the rest; all answers are kept, so raise reformat.max_cost and "
                        "run the same command to go on"
                    )
            if self.stopped is not None:
                raise self.stopped
            self._open_requests += 1

    async def _leave(self) -> None:
        async with self._changed:
            self._open_requests -= 1
            self._changed.notify_all()

    def _failed(self, key: str, error: Exception) -> Asked:
        settings = self.settings
        said = explained(error, settings.model, self._host, max_retries=settings.max_retries, timeout=self._timeout)
        self.cache.keep_failure(key, said)
        # What is wrong with one request only (a picture that the endpoint won't take) says nothing about the next.
        if not isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
            self._failed_in_a_row += 1
        rows = sum(self.counts[state] for state in STATES) + 1
        failed = self.counts["failed"] + 1
        if isinstance(error, FATAL):
            self._stop(f"{said}; all answers so far are kept: mend it and run the same command to go on")
        elif self._failed_in_a_row >= max(settings.concurrency, 3):
            self._stop(
                f"{self._failed_in_a_row} requests in a row got no answer, the last because {said}; all answers so "
                "far are kept: run the same command to go on"
            )
        elif rows >= _ROWS_BEFORE_A_SHARE_COUNTS and failed / rows > settings.max_failed_share:
            self._stop(
                f"{failed} of {rows} rows got no answer, above reformat.max_failed_share "
                f"({settings.max_failed_share:.0%}), the last because {said}; all answers so far are kept: run the "
                "same command to go on"
            )
        return Asked("failed", None, None, said)

    def _stop(self, why: str) -> Stopped:
        self.stopped = self.stopped or Stopped(why)
        return self.stopped

    def _look_at_the_cost(self) -> None:
        self._since_look = 0
        if self.settings.prices and self.settings.max_cost:
            self._spent = spent(self.cache.usage(), self.settings.prices)


def base_url(settings: Reformat) -> str:
    """Where the endpoint is. Raises UserError where nothing says so."""
    url = settings.base_url or os.environ.get("OPENAI_BASE_URL")
    if not url:
        raise UserError(
            "reformat.base_url is not set, and neither is OPENAI_BASE_URL; expected the address of an "
            "OpenAI-compatible endpoint, like http://localhost:8000/v1"
        )
    return url


def kept_reply(key: str, attempt: int, reply: Reply, *, batch: bool = False, seconds: float | None = None) -> Kept:
    """A reply as the cache keeps it, with its state."""
    outcome = judge(reply)
    return Kept(
        key,
        attempt,
        outcome.state,
        reply.text,
        outcome.problem,
        reply.finish_reason,
        reply.prompt_tokens,
        reply.cached_tokens,
        reply.new_tokens,
        batch,
        reply.model,
        seconds,
    )


def usage_of(kept: Kept) -> Usage:
    uncounted = kept.prompt_tokens is None or kept.new_tokens is None
    return Usage(1, kept.prompt_tokens or 0, kept.cached_tokens or 0, kept.new_tokens or 0, int(uncounted))


def _asked(kept: Kept) -> Asked:
    """The state as it was judged when the answer came; the answer as it reads now."""
    if kept.state != "ok":
        return Asked(kept.state, None, kept.model, kept.problem)
    outcome: Outcome = judge(Reply(kept.text, None, None))
    return Asked(outcome.state, outcome.answer, kept.model, outcome.problem)


def _as_arguments(body: dict, settings: Reformat) -> dict:
    """The client takes parameters it does not know in `extra_body` only; they end up in the same place."""
    extra = {name: body.pop(name) for name in settings.extra_body}
    return {**body, **({"extra_body": extra} if extra else {})}
