"""Say which training rows of a recipe overlap evaluation sets: by case, by picture, or by words.

    python -m data.overlap --recipe recipes/X.yaml --benchmarks medthinkvqa=DIR vqa-open --out DIR

Every row of every source is looked at, with the same means by which the builder keeps evaluation rows out
(data/dedup/guard.py): the case that a row's id, file names or columns name; its pictures by their pixels, their
perceptual hashes and a second look at their edges; runs of words of a question or of its reference. Killed at any time
and started again with the same command, it goes on where it was. Nothing is changed: DIR/overlaps.jsonl names each row,
DIR/overlap.json counts, and says what could not be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import constants
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from data.config import Dedup, Guard
from data.dedup.guard import EvaluationSets, as_array, case_keys, quoted_row
from data.dedup.pictures import shrunk
from data.sources.images import fingerprints
from data.tables import RunFolder, whole_file, write_json
from huatuo_vision.cli import run_command
from huatuo_vision.evaluation.benchmarks import chosen_benchmarks
from huatuo_vision.inputs.images import load_image
from huatuo_vision.inputs.sources import Source, ensure_made, open_source
from huatuo_vision.recipe import Recipe, load_recipe
from huatuo_vision.schema import BadSample, ImageRef, Sample, UserError

REPORT_FILE, OVERLAPS_FILE = "overlap.json", "overlaps.jsonl"
# Reason -> what the table calls it.
REASONS = {"case": "by case", "picture": "by picture", "words": "by words"}
SHARD_ROWS = 500
_SHARD = pa.schema(
    [("row", pa.int32()), ("id", pa.string()), ("unreadable", pa.string()), ("case", pa.string())]
    + [("words", pa.string()), ("pictures", pa.list_(pa.string()))]
    + [("phash", pa.list_(pa.binary(32))), ("coarse_phash", pa.list_(pa.binary(8)))]
)


@dataclass(frozen=True, slots=True)
class Known:
    """What is looked for in texts and names; pictures are compared at the end."""

    questions: Mapping[int, str]  # run of words -> evaluation row
    cases: Mapping[str, str]  # case_keys -> evaluation row
    words: int

    @classmethod
    def of(cls, sets: EvaluationSets, words: int) -> Known:
        return cls(sets.questions(), sets.cases(), words)

    @property
    def digest(self) -> str:
        content = [self.words, sorted(self.questions.items()), sorted(self.cases.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check(recipe: Recipe, guard: Guard, settings: Dedup, out: Path, workers: int, console: Console) -> dict[str, Any]:
    """Look at every row; writes OVERLAPS_FILE and REPORT_FILE into `out` and returns the report. Raises UserError."""
    out.mkdir(parents=True, exist_ok=True)
    sets = EvaluationSets(RunFolder(out))
    with console.status("reading the evaluation sets"):
        sets.write(guard)
    known = Known.of(sets, guard.question_words)
    cache = Path(constants.HF_HOME) / "huatuo_vision"  # conversions that training has made, or will use
    for spec in recipe.data.values():
        ensure_made(spec, cache)
    sources = {name: open_source(name, spec, cache) for name, spec in recipe.data.items()}
    with console.status("looking for rows that were read already"):
        shards = [shard for source in sources.values() for shard in _shards(source, known, out / "shards", cache)]
    _look(shards, sources, known, workers, console)
    overlaps, counts = [], {}
    for name, source in sources.items():
        table = pa.concat_tables([pq.read_table(shard.file) for shard in shards if shard.source == name])
        with console.status(f"comparing the pictures of {name}"):
            found = [*_named(table), *_pictures(table, source, sets, settings)]
        overlaps += [{"source": name, **overlap} for overlap in found]
        counts[name] = _counts(table, found, source)
    with whole_file(out / OVERLAPS_FILE) as unfinished:
        unfinished.write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in overlaps), encoding="utf-8")
    report = {
        "schema": 1,
        "recipe": recipe.name,
        "benchmarks": sets.report(),
        "words": guard.question_words,
        "max_hash_distance": settings.max_hash_distance,
        "min_likeness": settings.min_likeness,
        "sources": counts,
        "overlapping_rows": sum(of["overlapping"] for of in counts.values()),
    }
    write_json(out / REPORT_FILE, report)
    return report


@dataclass(frozen=True, slots=True)
class _Shard:
    source: str
    start: int
    stop: int
    file: Path
    mark: str  # of all that its file is made from


def _shards(source: Source, known: Known, folder: Path, cache: Path) -> Iterator[_Shard]:
    digest = known.digest
    for number, keys in enumerate(source.content_keys(SHARD_ROWS, cache)):
        start = number * SHARD_ROWS
        file = folder / source.name / f"{start:09d}.parquet"
        mark = hashlib.sha256(f"{keys} {digest}".encode()).hexdigest()
        yield _Shard(source.name, start, min(start + SHARD_ROWS, len(source)), file, mark)


def _look(
    shards: Sequence[_Shard], sources: Mapping[str, Source], known: Known, workers: int, console: Console
) -> None:
    """Make the file of every shard that is not there, or is of other rows or evaluation sets."""
    columns = TextColumn("reading rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("rows", total=sum(shard.stop - shard.start for shard in shards))
        if workers == 1:
            for shard in shards:
                progress.advance(bar, _make(shard, sources[shard.source], known))
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, _start_worker, (dict(sources), known)) as pool:
            futures: list[Future[int]] = [pool.submit(_make_in_worker, shard) for shard in shards]
            for future in futures:
                future.add_done_callback(lambda done: done.exception() or progress.advance(bar, done.result()))
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            for future in waiting:
                future.cancel()
            for future in done:
                future.result()


_worker: dict[str, Any] = {}


def _start_worker(sources: dict[str, Source], known: Known) -> None:
    _worker.update(sources=sources, known=known)


def _make_in_worker(shard: _Shard) -> int:
    return _make(shard, _worker["sources"][shard.source], _worker["known"])


def _make(shard: _Shard, source: Source, known: Known) -> int:
    """Rows looked at, now or before."""
    if not _is_made(shard.file, shard.mark):
        rows = [_seen(source, row, known) for row in range(shard.start, shard.stop)]
        table = pa.Table.from_pylist(rows, _SHARD).replace_schema_metadata({"mark": shard.mark})
        with whole_file(shard.file) as unfinished:
            pq.write_table(table, unfinished)
    return shard.stop - shard.start


def _is_made(file: Path, mark: str) -> bool:
    try:
        return (pq.read_schema(file).metadata or {}).get(b"mark") == mark.encode()
    except (OSError, pa.ArrowException):
        return False


def _seen(source: Source, row: int, known: Known) -> dict[str, Any]:
    """What one row names, quotes and shows."""
    try:
        sample = source.sample(row)
        pictures = [fingerprints(load_image(ref, sample.id).image) for ref in sample.images]
    except BadSample as error:
        return {"row": row, "id": source.row_id(row), "unreadable": error.reason}
    return {
        "row": row,
        "id": sample.id,
        "case": _case(sample, known.cases),
        "words": quoted_row((message.content for message in sample.messages), known.questions, known.words),
        "pictures": [sha256 for sha256, _, _ in pictures],
        "phash": [fine for _, fine, _ in pictures],
        "coarse_phash": [coarse for _, _, coarse in pictures],
    }


def _case(sample: Sample, cases: Mapping[str, str]) -> str | None:
    named = [sample.meta[key] for key in ("case", "article") if key in sample.meta]
    keys = [key for name in named for key in case_keys(str(name), exactly=True)]
    keys += [key for text in (sample.id, *map(_file_name, sample.images)) for key in case_keys(text)]
    return next((cases[key] for key in keys if key in cases), None)


def _file_name(ref: ImageRef) -> str:
    return ref.member or ref.path or ""


def _named(table: pa.Table) -> Iterator[dict[str, str]]:
    for row in table.select(["id", "case", "words"]).to_pylist():
        for reason in ("case", "words"):
            if row[reason] is not None:
                yield {"id": row["id"], "reason": reason, "evaluation_row": row[reason]}


def _pictures(table: pa.Table, source: Source, sets: EvaluationSets, settings: Dedup) -> Iterator[dict[str, Any]]:
    """The rows of a source that show a picture of an evaluation set."""
    lists = table["pictures"].combine_chunks()
    owners = np.repeat(np.arange(len(table)), pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False))
    if not len(owners):
        return
    places = np.arange(len(owners)) - np.searchsorted(owners, owners)  # of a picture within its row
    ids, fine, coarse = (table[name].combine_chunks().flatten() for name in ("pictures", "phash", "coarse_phash"))
    hashes = as_array(pa.chunked_array([fine])), as_array(pa.chunked_array([coarse]))
    rows = table["row"].to_numpy()

    def small(place: int) -> Image.Image:
        sample = source.sample(int(rows[owners[place]]))
        return shrunk(load_image(sample.images[int(places[place])], sample.id).image)

    for place, (row, distance) in sorted(sets.matches(ids, hashes, small, settings).items()):
        owner = table["id"][int(owners[place])].as_py()
        yield {"id": owner, "reason": "picture", "evaluation_row": row, "bits_apart": distance}


def _counts(table: pa.Table, found: Sequence[Mapping[str, Any]], source: Source) -> dict[str, Any]:
    unreadable = Counter(reason for reason in table["unreadable"].to_pylist() if reason is not None)
    benchmarks = Counter(overlap["evaluation_row"].partition(":")[0] for overlap in found)
    rows = {reason: len({o["id"] for o in found if o["reason"] == reason}) for reason in REASONS}
    return {
        "rows": len(source),
        "unreadable": dict(sorted(unreadable.items())),
        "overlapping": len({overlap["id"] for overlap in found}),
        "rows_by_reason": rows,
        "overlaps_by_benchmark": dict(sorted(benchmarks.items())),
    }


def show(report: Mapping[str, Any], out: Path, console: Console) -> None:
    table = Table("source", title="training rows that overlap an evaluation set")
    for column in ("rows", "unreadable", *REASONS.values(), "overlapping"):
        table.add_column(column, justify="right")
    for name, of in report["sources"].items():
        by_reason = [of["rows_by_reason"][reason] for reason in REASONS]
        cells = of["rows"], sum(of["unreadable"].values()), *by_reason, of["overlapping"]
        table.add_row(name, *(f"{cell:,}" for cell in cells))
    console.print(table)
    for name, of in report["benchmarks"].items():
        shorter = of["different_questions"] - of["comparable_questions"]
        if shorter:
            console.print(
                f"{name}: {shorter:,} questions of fewer than {report['words']} words can't be compared by them"
            )
    console.print(str(out / REPORT_FILE), highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.overlap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, required=True, metavar="YAML", help="all its data is looked at")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    parser.add_argument("--benchmarks", nargs="+", required=True, metavar="NAME[=PATH]", help="as eval.py takes them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder for what is found")
    parser.add_argument(
        "--words", type=int, default=8, metavar="N", help="so many in a row are a quotation (default: 8)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--require-clean", action="store_true", help="exit with 1 where any row overlaps, for scripts")
    args = parser.parse_args()
    for name, value in (("--words", args.words), ("--workers", args.workers)):
        if value < 1:
            raise UserError(f"{name} {value}: expected a number above 0")
    chosen = chosen_benchmarks(args.benchmarks)
    guard = Guard(benchmarks={k: None if v is None else str(v) for k, v in chosen.items()}, question_words=args.words)
    console = Console()
    recipe = load_recipe(args.recipe, args.set)
    report = check(recipe, guard, Dedup(), args.out, args.workers, console)
    show(report, args.out, console)
    return 1 if args.require_clean and report["overlapping_rows"] else 0


if __name__ == "__main__":
    run_command(main)
