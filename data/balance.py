"""Stage balance: so many rows of a source at most, and modalities in the shares that the configuration names.

    balance.decide  one task    which rows are too many, and the counts before and after (decisions are of all rows)
    balance         all tasks   the rows, accordingly

It stands before anything is asked of a model, so that nothing is paid for and thrown away. A row's modality is then
what its source states, or what the words of its caption name (data/filters/labels.py). "Rebalance" is not defined in
the paper (arXiv 2410.14948); the cap is Cambrian-1's, the shares are ours.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.pipeline.base import PipelineStep

from data.config import Balance
from data.filters.labels import modality_of
from data.steps import Pass, Rows, row_pass
from data.tables import Dropped, Pair, RunFolder, whole_file, write_json

STAGE, PREVIOUS = "balance", "dedup"
REPORT_FILE = "balance.json"
DECIDE = f"{STAGE}.decide"
UNKNOWN = "unknown"
_WHY = {
    "over_source_cap": "more rows of its source than balance.cap",
    "over_modality_share": "more rows of its modality than its share",
    "modality_not_named": "no share is given to its modality",
}

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


def balance_passes(run: RunFolder, settings: Balance, tasks: int, *, counted: bool = True) -> list[Pass]:
    """`counted` asks for the counts before and after also where no setting needs a look at all rows."""
    record = settings.model_dump(mode="json")
    if not (counted or settings.cap is not None or settings.modalities):
        return [row_pass(run, STAGE, PREVIOUS, tasks, (), record)]
    return [
        Pass(DECIDE, (Decide(run, settings, tasks),), 1, record, ("balance",)),
        row_pass(run, STAGE, PREVIOUS, tasks, (Apply(run),), record),
    ]


def known_modality(pair: Pair) -> str:
    """What the source states, or the caption names; "unknown" where neither does."""
    return pair.modality or modality_of(" ".join((pair.caption, *pair.context[:1]))) or UNKNOWN


def report(run: RunFolder) -> dict[str, Any]:
    """Rows before and after, by modality and by source; and how many a modality is short of its share."""
    return json.loads((run.path / "balance" / REPORT_FILE).read_text(encoding="utf-8"))


class Decide(PipelineStep):
    """Looks at all rows at once: 20 bytes of memory each."""

    type, name = "balance", "decide"

    def __init__(self, run: RunFolder, settings: Balance, tasks: int):
        super().__init__()
        self.run_folder, self.settings, self.tasks = run, settings, tasks

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        rows = _Rows(self.run_folder, self.tasks, self.settings.seed)
        reasons = np.full(len(rows.modalities), "", object)
        if (cap := self.settings.cap) is not None:
            over = rows.beyond(rows.collections, np.full(len(rows.collection_names), cap), reasons == "")
            reasons[over] = "over_source_cap"
        short: dict[str, int] = {}
        if self.settings.modalities:
            kept = reasons == ""
            there = rows.counts("modality", kept)
            wanted = wanted_rows(there, self.settings)
            limits = np.array([wanted.get(name, 0) for name in rows.modality_names], np.int64)
            over = rows.beyond(rows.modalities, limits, kept)
            reasons[over] = "over_modality_share"
            named = np.array([name in wanted for name in rows.modality_names], bool)
            reasons[over & ~named[rows.modalities]] = "modality_not_named"
            short = {name: n - there.get(name, 0) for name, n in wanted.items() if n > there.get(name, 0)}
        starts = np.concatenate([[0], np.cumsum(rows.rows_of_rank)])
        for of_rank, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
            places = np.flatnonzero(reasons[start:end] != "")
            columns = {
                "place": pa.array(places, pa.int32()),
                "reason": pa.array(reasons[start:end][places], pa.string()),
            }
            with whole_file(_decisions(self.run_folder, of_rank)) as unfinished:
                pq.write_table(pa.table(columns), unfinished)
        counts = {
            key: {"before": rows.counts(key), "after": rows.counts(key, reasons == "")}
            for key in ("modality", "collection")
        }
        write_json(self.run_folder.path / "balance" / REPORT_FILE, {**counts, "short": short})


class _Rows:
    """All rows by position: source, modality, and which stays first (described by people, then by chance)."""

    def __init__(self, run: RunFolder, tasks: int, seed: int):
        self.collection_names: dict[str, int] = {}
        self.modality_names: dict[str, int] = {}
        collections, modalities, tags, chance = array("H"), array("B"), array("B"), array("Q")
        self.rows_of_rank = np.zeros(tasks, np.int64)
        for rank in range(tasks):
            for pair in run.pairs(PREVIOUS, rank):
                collections.append(self.collection_names.setdefault(pair.collection, len(self.collection_names)))
                modalities.append(self.modality_names.setdefault(known_modality(pair), len(self.modality_names)))
                tags.append(not pair.annotated)
                chance.append(int.from_bytes(hashlib.sha256(f"{seed}\0{pair.id}".encode()).digest()[:8]))
                self.rows_of_rank[rank] += 1
        self.collections, self.modalities = np.array(collections), np.array(modalities)
        self._order = np.lexsort((np.array(chance), np.array(tags)))

    def beyond(self, groups: np.ndarray, limits: np.ndarray, among: np.ndarray) -> np.ndarray:
        """Which of the rows `among` all are not among the first `limits[group]` of their group."""
        order = self._order[among[self._order]]
        order = order[np.argsort(groups[order], kind="stable")]
        of_group = np.bincount(groups[order], minlength=len(limits))
        place = np.arange(len(order)) - np.repeat(np.cumsum(of_group) - of_group, of_group)
        over = np.zeros(len(groups), bool)
        over[order[place >= limits[groups[order]]]] = True
        return over

    def counts(self, key: str, among: np.ndarray | None = None) -> dict[str, int]:
        names, groups = (
            (self.modality_names, self.modalities) if key == "modality" else (self.collection_names, self.collections)
        )
        numbers = np.bincount(groups if among is None else groups[among], minlength=len(names)).tolist()
        counted = {name: numbers[code] for name, code in names.items() if numbers[code]}
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def wanted_rows(there: Mapping[str, int], settings: Balance) -> dict[str, int]:
    """Modality -> rows that shall go on. Without `rows`, as many in all as fill every share."""
    shares = settings.modalities
    total = settings.rows
    if total is None:
        total = min(there.get(label, 0) / share for label, share in shares.items())
    return {label: round(share * total) for label, share in shares.items()}


def _decisions(run: RunFolder, rank: int) -> Path:
    return run.rank_file("balance", "", rank)


class Apply(PipelineStep):
    type, name = "balance", "apply"

    def __init__(self, run: RunFolder):
        super().__init__()
        self.run_folder = run

    def run(self, data: Rows, rank: int = 0, world_size: int = 1) -> Rows:
        self.run_folder.tasks(DECIDE)
        table = pq.read_table(_decisions(self.run_folder, rank))
        over = dict(zip(*(table[name].to_pylist() for name in ("place", "reason")), strict=True))
        for place, row in enumerate(data):
            yield Dropped(row.id, over[place], _WHY[over[place]]) if place in over else row
