"""Stage balance: so many rows of a source at most, and modalities in the shares that the configuration names.

    balance.decide  one task    which rows are too many, and the counts before and after (decisions are of all rows)
    balance         all tasks   the rows, accordingly

It stands before anything is asked of a model, so that nothing is paid for and thrown away. A row's modality is then
what its source states, or what the words of its caption name (data/filters/labels.py). "Rebalance" is not defined in
the paper (arXiv 2410.14948); the cap is Cambrian-1's, the shares are ours.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.pipeline.base import PipelineStep

from data.config import Balance
from data.filters.labels import modality_of
from data.steps import Pass, Rows, row_pass
from data.tables import Dropped, Pair, RunFolder, whole_file, write_json

STAGE, PREVIOUS = "balance", "dedup"
REPORT_FILE = "balance.json"
UNKNOWN = "unknown"

# The paper's Figure 2, percent of images: class -> before ("original PMC") and after (SemiHVision), and our label.
# The columns add up to 99.23 and 97.97; what is missing is not labelled there, and "-" is not drawn.
PUBLISHED: tuple[tuple[str, float | None, float | None, str | None], ...] = (
    ("non-medical", 58.03, 6.69, None),
    ("simulated illustration", 12.31, 0.79, None),
    ("CT", 9.09, 31.15, "Computed Tomography"),
    ("pathology / histopathology", 8.44, 20.79, "Microscopy Images"),
    ("optical image", 4.83, None, None),
    ("EM", 2.12, None, None),
    ("camera", 1.84, 1.63, "Digital Photography"),
    ("MRI", 1.80, 21.31, "Magnetic Resonance Imaging"),
    ("X-ray", 0.77, 15.61, "X-Ray"),
)


@dataclass(frozen=True, slots=True)
class _Row:
    rank: int
    place: int
    collection: str
    modality: str
    order: tuple[bool, str]  # what stays first: described by people, then by chance


def balance_passes(run: RunFolder, settings: Balance, tasks: int) -> list[Pass]:
    record = settings.model_dump(mode="json")
    return [
        Pass(f"{STAGE}.decide", (Decide(run, settings, tasks),), 1, record, ("balance",)),
        row_pass(run, STAGE, PREVIOUS, tasks, (Apply(run),), record),
    ]


def known_modality(pair: Pair) -> str:
    """What the source states, or the caption names; "unknown" where neither does."""
    return pair.modality or modality_of(" ".join((pair.caption, *pair.context[:1]))) or UNKNOWN


def report(run: RunFolder) -> dict[str, Any]:
    """Rows before and after, by modality and by source."""
    return json.loads((run.path / "balance" / REPORT_FILE).read_text(encoding="utf-8"))


class Decide(PipelineStep):
    """Looks at all rows at once: a hundred bytes of memory each."""

    type, name = "balance", "decide"

    def __init__(self, run: RunFolder, settings: Balance, tasks: int):
        super().__init__()
        self.run_folder, self.settings, self.tasks = run, settings, tasks

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        rows = list(self._rows())
        dropped: dict[int, list[tuple[int, str, str]]] = {rank: [] for rank in range(self.tasks)}
        kept = rows
        if self.settings.cap is not None:
            names = {row.collection for row in rows}
            kept, over = _first(rows, lambda row: row.collection, dict.fromkeys(names, self.settings.cap))
            _drop(dropped, over, "over_source_cap", f"{self.settings.cap:,} rows of a source at most")
        short: dict[str, int] = {}
        if self.settings.modalities:
            wanted = wanted_rows(Counter(row.modality for row in kept), self.settings)
            kept, over = _first(kept, lambda row: row.modality, wanted)
            named = [row for row in over if row.modality in wanted]
            _drop(dropped, named, "over_modality_share", "more rows of its modality than its share")
            others = [row for row in over if row.modality not in wanted]
            _drop(dropped, others, "modality_not_named", "no share is given to its modality")
            have = Counter(row.modality for row in kept)
            short = {label: number - have[label] for label, number in wanted.items() if number > have[label]}
        for of_rank, mine in dropped.items():
            places, reasons, details = zip(*sorted(mine), strict=True) if mine else ((), (), ())
            columns = {"place": pa.array(places, pa.int32()), "reason": pa.array(reasons, pa.string())}
            with whole_file(_decisions(self.run_folder, of_rank)) as unfinished:
                pq.write_table(pa.table({**columns, "detail": pa.array(details, pa.string())}), unfinished)
        counts = {
            key: {
                "before": dict(Counter(getattr(row, key) for row in rows).most_common()),
                "after": dict(Counter(getattr(row, key) for row in kept).most_common()),
            }
            for key in ("modality", "collection")
        }
        write_json(self.run_folder.path / "balance" / REPORT_FILE, {**counts, "short": short})

    def _rows(self) -> Iterator[_Row]:
        for rank in range(self.tasks):
            for place, pair in enumerate(self.run_folder.pairs(PREVIOUS, rank)):
                chance = hashlib.sha256(f"{self.settings.seed}\0{pair.id}".encode()).hexdigest()
                yield _Row(rank, place, pair.collection, known_modality(pair), (not pair.annotated, chance))


def wanted_rows(there: Mapping[str, int], settings: Balance) -> dict[str, int]:
    """Modality -> rows that shall go on. Without `rows`, as many in all as fill every share."""
    shares = settings.modalities
    total = settings.rows
    if total is None:
        total = min(there.get(label, 0) / share for label, share in shares.items())
    return {label: round(share * total) for label, share in shares.items()}


def _drop(dropped: dict[int, list[tuple[int, str, str]]], rows: Iterable[_Row], reason: str, detail: str) -> None:
    for row in rows:
        dropped[row.rank].append((row.place, reason, detail))


def _first(
    rows: Iterable[_Row], key: Callable[[_Row], str], wanted: Mapping[str, int]
) -> tuple[list[_Row], list[_Row]]:
    """The first of each group in their order, as many as are wanted of it, and the others."""
    taken: Counter[str] = Counter()
    kept: list[_Row] = []
    over: list[_Row] = []
    for row in sorted(rows, key=lambda row: row.order):
        if taken[key(row)] < wanted.get(key(row), 0):
            taken[key(row)] += 1
            kept.append(row)
        else:
            over.append(row)
    return kept, over


def _decisions(run: RunFolder, rank: int) -> Path:
    return run.rank_file("balance", "", rank)


class Apply(PipelineStep):
    type, name = "balance", "apply"

    def __init__(self, run: RunFolder):
        super().__init__()
        self.run_folder = run

    def run(self, data: Rows, rank: int = 0, world_size: int = 1) -> Rows:
        self.run_folder.tasks(f"{STAGE}.decide")
        table = pq.read_table(_decisions(self.run_folder, rank))
        columns = (table[name].to_pylist() for name in ("place", "reason", "detail"))
        over = {place: (reason, detail) for place, reason, detail in zip(*columns, strict=True)}
        for place, row in enumerate(data):
            yield Dropped(row.id, *over[place]) if place in over else row
