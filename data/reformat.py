"""Stage reformat: a description, and a question with its answer, for every figure, by one of four methods.

Only rows in the state ok go on; refused, truncated, invalid and failed ones are dropped under that name. Answers lie
in `<run>/answers/`, which no other stage and no change of settings ever empties: they were paid for.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from datatrove.pipeline.base import PipelineStep
from rich.console import Console
from rich.table import Table

from data.config import Reformat
from data.mllm.ask import Asked, Asker, Stopped
from data.mllm.cache import AnswerCache
from data.mllm.estimate import estimate
from data.mllm.prompts import GROUNDED, prompt_version
from data.mllm.requests import Evidence, Figure, method_of, scenario
from data.retrieve import evidence_images, evidence_of
from data.steps import Pass, Rows, row_pass
from data.tables import Dropped, Pair, RunFolder
from huatuo_vision.schema import UserError

STAGE, PREVIOUS = "reformat", "balance"
ESTIMATE_ROWS = 50
# Rows are passed on in their own order: while one is slow, so many requests' worth of others may be ahead of it.
_AHEAD = 4


def reformat_pass(run: RunFolder, settings: Reformat, tasks: int, *, evidence: bool = False) -> Pass:
    """`evidence` says whether the step retrieve has found some."""
    version = None if settings.method == "native_caption" else prompt_version(settings.method)
    decides = {**settings.decides(), "prompt_version": version}
    if settings.method == GROUNDED:
        decides |= {"evidence": evidence, "prompt_version_annotated": prompt_version("mllm_reformatted")}
    return row_pass(run, STAGE, PREVIOUS, tasks, (Describe(run, settings, evidence),), decides)


def answers_folder(run: RunFolder) -> Path:
    return run.path / "answers"


def figure_of(pair: Pair, evidence: tuple[Evidence, ...] = ()) -> Figure:
    return Figure(pair.id, pair.image_ids, pair.caption, pair.context, pair.annotated, pair.modality, evidence)


class FiguresOfRank:
    """A rank's rows as what requests are made from, and their pictures. A context manager."""

    def __init__(self, run: RunFolder, rank: int, *, evidence: bool):
        self._evidence = evidence_of(run, rank) if evidence else {}
        self._stack = ExitStack()
        self._images = self._stack.enter_context(run.images(rank))
        self._of_cases = self._stack.enter_context(evidence_images(run, rank)) if evidence else None
        self._one_at_a_time = threading.Lock()  # pictures are read in worker threads

    def __enter__(self) -> FiguresOfRank:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def of(self, pair: Pair) -> Figure:
        return figure_of(pair, self._evidence.get(pair.id, ()))

    def images(self, figure: Figure) -> list[bytes]:
        """Of `figure.shown()`, encoded."""
        own = len(figure.image_sha256)
        shown = figure.shown()
        with self._one_at_a_time:
            of_cases = [self._of_cases.get(image_id) for image_id in shown[:-own]]
            return of_cases + [self._images.get(image_id) for image_id in shown[-own:]]


def estimate_run(run: RunFolder, settings: Reformat, console: Console, *, evidence: bool = False) -> None:
    """Ask about rows from all over the stage's input, and say what all of them would take. Raises UserError."""
    if settings.method == "native_caption":
        raise UserError("reformat.method native_caption asks no model, so there is nothing to estimate")
    tasks = run.tasks(PREVIOUS)
    counts = [run.rank_counts(PREVIOUS, rank).rows_out for rank in range(tasks)]
    total = sum(counts)
    wanted = {n * total // ESTIMATE_ROWS for n in range(ESTIMATE_ROWS)} if total > ESTIMATE_ROWS else set(range(total))
    sample: list[Figure] = []
    pictures: dict[str, list[bytes]] = {}
    first = 0
    for rank, count in enumerate(counts):
        here = {n - first for n in wanted if first <= n < first + count}
        first += count
        if not here:
            continue
        with FiguresOfRank(run, rank, evidence=evidence) as figures:
            for place, pair in enumerate(run.pairs(PREVIOUS, rank)):
                if place in here:
                    sample.append(figures.of(pair))
                    pictures[pair.id] = figures.images(sample[-1])
    with AnswerCache(answers_folder(run), "estimate") as cache, console.status(f"asking about {len(sample)} rows"):
        made = estimate(total, sample, settings, cache, lambda figure: pictures[figure.id])
    usage, factor = made.usage, made.factor
    table = Table("", f"{made.asked} rows asked", f"all {made.rows:,} rows", title=f"{settings.model}, an estimate")
    table.add_row("states", ", ".join(f"{state} {n}" for state, n in made.states.items()), "")
    table.add_row("prompt tokens", f"{usage.prompt_tokens:,}", f"{usage.prompt_tokens * factor:,.0f}")
    table.add_row("new tokens", f"{usage.new_tokens:,}", f"{usage.new_tokens * factor:,.0f}")
    if made.cost is not None:
        currency = settings.prices.currency
        table.add_row("cost online", f"{made.cost / factor:,.4f} {currency}", f"{made.cost:,.2f} {currency}")
        table.add_row("cost in batches", "", f"{made.batch_cost:,.2f} {currency}")
    if made.hours is not None:
        table.add_row("hours, one task", "", f"{made.hours:,.2f} at {settings.concurrency} requests at once")
    console.print(table)
    if usage.uncounted:
        console.print(f"{usage.uncounted} answers came without token counts: tokens and cost are too low")
    console.print("the answers are kept: the stage reformat won't ask for them again")


class Describe(PipelineStep):
    """A `Pair` -> the pair with its description, or Dropped with the state it ended in."""

    type, name = "mllm", "describe"

    def __init__(self, run: RunFolder, settings: Reformat, evidence: bool = False):
        super().__init__()
        self.run_folder, self.settings, self.evidence = run, settings, evidence

    def run(self, data: Rows, rank: int = 0, world_size: int = 1) -> Rows:
        if self.settings.method == "native_caption":
            yield from map(_native, data)
            return
        with (
            AnswerCache(answers_folder(self.run_folder), f"{rank:05d}") as cache,
            FiguresOfRank(self.run_folder, rank, evidence=self.evidence) as figures,
        ):
            yield from _in_order(data, figures, Asker(self.settings, cache, figures.images), self.settings)


def _in_order(rows: Rows, figures: FiguresOfRank, asker: Asker, settings: Reformat) -> Iterator[Pair | Dropped]:
    """Ask about `concurrency` figures at once, and pass the rows on in their own order.

    The source is read only as fast as answers come, so nothing piles up. Raises Stopped after the requests in flight
    have ended.
    """
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        runner.run(asker.__aenter__())
        waiting: deque[tuple[Pair | Dropped, Figure | None, asyncio.Task[Asked] | None]] = deque()
        try:
            for row in rows:
                figure = figures.of(row) if isinstance(row, Pair) else None
                task = loop.create_task(asker.ask(figure)) if figure is not None else None
                waiting.append((row, figure, task))
                if len(waiting) >= _AHEAD * settings.concurrency:
                    yield _finish(loop, *waiting.popleft(), settings)
            while waiting:
                yield _finish(loop, *waiting.popleft(), settings)
            if asker.stopped is not None:
                raise asker.stopped
        except Stopped:
            open_tasks = [task for _, _, task in waiting if task is not None]
            loop.run_until_complete(asyncio.gather(*open_tasks, return_exceptions=True))
            raise
        finally:
            runner.run(asker.__aexit__())


def _finish(
    loop: asyncio.AbstractEventLoop,
    row: Pair | Dropped,
    figure: Figure | None,
    task: asyncio.Task[Asked] | None,
    settings: Reformat,
) -> Pair | Dropped:
    if task is None:
        return row
    return _described(row, figure, loop.run_until_complete(task), settings)


def _described(pair: Pair, figure: Figure, asked: Asked, settings: Reformat) -> Pair | Dropped:
    if asked.answer is None:
        return Dropped(pair.id, asked.state, asked.problem or "")
    method = method_of(figure, settings)
    used: tuple[Evidence, ...] = figure.evidence if method == GROUNDED else ()
    said = asked.answer.model_dump()
    return replace(
        pair,
        method=method,
        scenario=scenario(figure, settings).name,
        prompt_version=prompt_version(method),
        model=asked.model or settings.model,
        state=asked.state,
        evidence=tuple(f"{evidence.kind}:{evidence.id}" for evidence in used),
        evidence_licences=tuple(sorted({evidence.licence for evidence in used})),
        **said | {"modality": pair.modality or said["modality"]},
    )


def _native(row: Pair | Dropped) -> Pair | Dropped:
    if isinstance(row, Dropped):
        return row
    if not row.caption.strip():
        return Dropped(row.id, "no_caption", "a native caption is all that this method has")
    return replace(row, method="native_caption", state="ok", description=row.caption)
