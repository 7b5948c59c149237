"""How a stage is put together from datatrove steps: rows are read, go through the stage's own steps, and are written.

Between `ReadPairs` and `WritePairs` travel `Pair` and `Dropped` objects. A step takes each, passes on every `Dropped`
as it is, and turns each `Pair` into exactly one object: the pair as the next stage shall see it, or a `Dropped` with
the reason. So a row can be dropped but not lost: `WritePairs` counts them. A step is pickled to its worker; what is
heavy (a model, an automaton, a client) is made in `run`, and secrets are never attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from datatrove.pipeline.base import PipelineStep

from data.tables import Dropped, Pair, RunFolder, stage_output

Rows = Iterator[Pair | Dropped]


class ReadPairs(PipelineStep):
    """The rows that came out of `stage`, the same rank's."""

    type, name = "reader", "pairs"

    def __init__(self, run: RunFolder, stage: str):
        super().__init__()
        self.run_folder, self.stage = run, stage

    def run(self, data: Rows | None = None, rank: int = 0, world_size: int = 1) -> Rows:
        yield from self.run_folder.pairs(self.stage, rank)


class WritePairs(PipelineStep):
    """Splits the rows into kept and dropped, writes both tables, and counts."""

    type, name = "writer", "pairs"

    def __init__(self, run: RunFolder, stage: str, previous: str):
        super().__init__()
        self.run_folder, self.stage, self.previous = run, stage, previous

    def run(self, data: Rows, rank: int = 0, world_size: int = 1) -> None:
        expected = self.run_folder.rank_counts(self.previous, rank).rows_out
        with stage_output(self.run_folder, self.stage, rank, expected) as output:
            for row in data:
                output.write(row)


@dataclass(frozen=True, slots=True)
class Pass:
    """One run over the tasks: what the executor is given.

    `name` is the stage's own for the pass that writes its rows, and `<stage>.<word>` for one that prepares it.
    """

    name: str
    steps: tuple[PipelineStep, ...]
    tasks: int
    settings: object  # what decides the result, as JSON values: part of the fingerprint
    folders: tuple[str, ...] = ()  # what it writes in the run folder: emptied when it starts over
    finish: Callable[[], None] | None = None  # called in the launching process when all tasks are complete


def row_pass(
    run: RunFolder, stage: str, previous: str, tasks: int, steps: tuple[PipelineStep, ...], settings: object
) -> Pass:
    """The pass of a stage that makes one row of each."""
    return Pass(
        name=stage,
        steps=(ReadPairs(run, previous), *steps, WritePairs(run, stage, previous)),
        tasks=tasks,
        settings=settings,
        folders=(f"pairs/{stage}", f"dropped/{stage}"),
    )
