"""What a run would cost: a few rows are asked, kept in the cache like all others, and multiplied."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from data.config import Reformat
from data.mllm.ask import Asked, Asker, ReadImages, Stopped, usage_of
from data.mllm.cache import AnswerCache, Usage
from data.mllm.requests import Figure, request_key
from huatuo_vision.schema import UserError


@dataclass(frozen=True, slots=True)
class Estimate:
    """Figures of the asked rows, and of all rows by them."""

    rows: int  # of the stage's input
    asked: int
    states: dict[str, int]
    usage: Usage  # of the asked rows
    seconds: float  # that the new requests took, at the configured concurrency
    new_requests: int
    cost: float | None  # of all rows, online, in the prices' currency; None without prices
    batch_cost: float | None

    @property
    def factor(self) -> float:
        return self.rows / self.asked

    @property
    def hours(self) -> float | None:
        """For all rows by one task; None where every answer was there already."""
        return self.seconds / self.new_requests * self.rows / 3600 if self.new_requests else None


def estimate(
    rows: int, sample: Sequence[Figure], settings: Reformat, cache: AnswerCache, read_images: ReadImages
) -> Estimate:
    """Ask about `sample`, some of `rows`. Raises UserError where nobody answers."""
    if not sample:
        raise UserError("no row reaches the stage reformat, so there is nothing to estimate; look at the funnel")
    begin = time.monotonic()
    asker = Asker(settings, cache, read_images)
    outcomes = asyncio.run(_ask_all(asker, sample))
    seconds = time.monotonic() - begin
    if stopped := next((outcome for outcome in outcomes if isinstance(outcome, Stopped)), asker.stopped):
        raise stopped
    kept = [answer for figure in sample for answer in cache.find(request_key(figure, settings)).values()]
    usage = sum(map(usage_of, kept), Usage())
    states = {state: sum(o.state == state for o in outcomes) for state in sorted({o.state for o in outcomes})}
    costs = [None, None]
    if settings.prices:
        costs = [usage.cost(settings.prices, batch=batch) * rows / len(sample) for batch in (False, True)]
    return Estimate(rows, len(sample), states, usage, seconds, asker.counts["asked"], *costs)


async def _ask_all(asker: Asker, figures: list[Figure]) -> list[Asked | Stopped]:
    async with asker:
        outcomes = await asyncio.gather(*map(asker.ask, figures), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Stopped):
            raise outcome
    return outcomes
