"""The pass that checks every sample once, before anything trains on it.

    rows -> Sample -> images decoded, text encoded -> a verdict per row      cache_dir/prepared/<content>.parquet
    verdicts -> duplicates, report, stop or drop                             out/prepare/report.json, report.md
    rows that passed: row, id, tokens, targets, images                       out/prepare/<source>.parquet
    a phase's limits and mixture over them -> Pool                           flat arrays

Verdicts are kept in shards named by what they depend on (rows, image files, tokenizer, template), so a
killed preparation goes on where it was, an unchanged data set costs no image work, and a changed image
re-checks its shard alone. Limits that belong to a phase are applied afterwards: changing one is free.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from huatuo_vision.inputs.images import load_image
from huatuo_vision.inputs.mixture import over_limits, select_rows
from huatuo_vision.inputs.prepare_report import PrepareReport, account_for, markdown, remarks, tables
from huatuo_vision.inputs.sources import Source, ensure_made, open_source
from huatuo_vision.recipe import Recipe
from huatuo_vision.schema import BadSample, ImageRef, Sample, UserError

if TYPE_CHECKING:
    from huatuo_vision.inputs.encode import Encoder  # its libraries take seconds to import

PREPARE_VERSION = 1  # raise it when a change here, in the adapters or in image loading would change a verdict
SHARD_ROWS = 1024
IN_PROCESS_ROWS = 2048  # up to here checking in line is faster than starting processes (imports take ~10 s)
MAX_PROCESSES = 64  # each holds the tokenizer and its libraries, about 0.5 GB
LOG_SECONDS = 30  # between lines of progress where the output is a file

VERDICTS = pa.schema(
    [
        ("id", pa.string()),
        ("tokens", pa.int32()),
        ("targets", pa.int32()),
        ("images", pa.int16()),
        ("reason", pa.string()),  # "" is a row that passed
        ("explanation", pa.string()),
        ("notes", pa.list_(pa.string())),
    ]
)
POOL_COLUMNS = ("row", "id", "tokens", "targets", "images")
CONTENT = b"content"  # in the tables' metadata: a digest of the source's rows and images


@dataclass(frozen=True, slots=True)
class Pool:
    """One epoch of a phase: sample n is row `row[n]` of the source `sources[source[n]]`. N samples."""

    sources: tuple[str, ...]
    tables: tuple[Path, ...]  # the sources' parquet tables, for ids
    source: np.ndarray  # (N,) int16
    row: np.ndarray  # (N,) int64
    tokens: np.ndarray  # (N,) int32, image features included
    targets: np.ndarray  # (N,) int32, supervised tokens
    images: np.ndarray  # (N,) int16
    contents: tuple[str, ...]  # of each source, a digest of its rows and images

    def __len__(self) -> int:
        return len(self.row)

    def ids(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Ids of these samples, read from the prepared tables when asked for."""
        indices = np.asarray(indices, dtype=np.int64)
        ids = np.empty(len(indices), dtype=object)
        for source in np.unique(self.source[indices]):
            here = self.source[indices] == source
            table = pq.read_table(self.tables[source], columns=["row", "id"])
            positions = np.searchsorted(table["row"].to_numpy(), self.row[indices[here]])
            ids[here] = table["id"].take(pa.array(positions)).to_pylist()
        return ids.tolist()


def prepare(
    recipe: Recipe,
    phases: Sequence[str],
    encoder: Encoder,
    cache_dir: Path,
    out: Path,
    console: Console,
    processes: int | None = None,
) -> PrepareReport:
    """Check every row of every source these phases use, and write the report and the tables that `load_pool` reads.

    processes: None takes the machine's cores, or none where there is little to check. The result does not depend on it.
    Raises UserError, after the report is written, where samples are refused and `on_bad_sample` is stop, where a
    source or phase has nothing left, and where a phase asks for more samples than there are.
    """
    names = list(dict.fromkeys(entry.source for phase in phases for entry in recipe.phases[phase].data))
    for name in names:
        ensure_made(recipe.data[name], cache_dir)
    sources = {name: open_source(name, recipe.data[name], cache_dir) for name in names}
    with console.status("looking for rows that are checked already"):
        shards = {name: _shards(source, encoder, cache_dir) for name, source in sources.items()}
        checked = _checked([shard for name in names for shard in shards[name]], recipe.on_bad_sample)
    pending = [shard for name in names for shard in shards[name] if shard.path not in checked]
    _check_shards(pending, sources, encoder, console, processes)
    checked |= {shard.path: _read_shard(shard.path) for shard in pending}

    verdicts = {name: _refuse_duplicates(_joined(checked[shard.path] for shard in shards[name])) for name in names}
    del checked  # of a million rows some 100 MB
    report, problems = account_for(recipe, phases, verdicts, out / "prepare" / "report.json")
    _write(report.path, lambda path: path.write_text(report.json(), encoding="utf-8"))
    _write(report.path.with_suffix(".md"), lambda path: path.write_text(markdown(report), encoding="utf-8"))
    console.print(*tables(report, box.SIMPLE_HEAD))
    for sentence, warns in remarks(report):
        console.print(escape(sentence), style="yellow" if warns else None, highlight=False)
    if problems:
        raise problems[0]
    for name, table in verdicts.items():
        passed = table.append_column("row", pa.array(np.arange(len(table)))).filter(pc.equal(table["reason"], ""))
        content = hashlib.sha256("".join(shard.content for shard in shards[name]).encode()).hexdigest()
        kept = passed.select(POOL_COLUMNS).replace_schema_metadata({CONTENT: content})
        # All of a row group is held until it is written, and every id is another.
        write = partial(pq.write_table, kept, row_group_size=2**16, use_dictionary=False)
        _write(_pool_table(out, name), write)
    return report


def load_pool(recipe: Recipe, phase_name: str, out: Path, seed: int) -> Pool:
    """The samples of one epoch of a phase, from the tables `prepare` wrote: limits applied, mixture selected.

    Order: the phase's data entries one after another, each as `select_rows` gives it.
    """
    phase = recipe.phases[phase_name]
    paths = {entry.source: _pool_table(out, entry.source) for entry in phase.data}
    columns, kept = {}, {}
    for name, path in paths.items():
        table = pq.read_table(path, columns=["row", "tokens", "targets", "images"])
        columns[name] = {key: table[key].to_numpy() for key in table.column_names}
        refused = over_limits(columns[name]["tokens"], columns[name]["images"], phase)
        kept[name] = np.flatnonzero(~np.logical_or.reduce(list(refused.values())))
    selected = select_rows(phase.data, {name: len(rows) for name, rows in kept.items()}, seed)
    chosen = [(name, kept[name][positions]) for name, positions in selected]

    def column(key: str, dtype: type) -> np.ndarray:
        return np.concatenate([columns[name][key][rows] for name, rows in chosen]).astype(dtype, copy=False)

    return Pool(
        sources=tuple(paths),
        tables=tuple(paths.values()),
        source=np.repeat(np.arange(len(chosen), dtype=np.int16), [len(rows) for _, rows in chosen]),
        row=column("row", np.int64),
        tokens=column("tokens", np.int32),
        targets=column("targets", np.int32),
        images=column("images", np.int16),
        contents=tuple(pq.read_schema(path).metadata[CONTENT].decode() for path in paths.values()),
    )


# Checking: rows -> verdicts, shard by shard


@dataclass(frozen=True, slots=True)
class _Shard:
    source: str
    start: int
    stop: int
    path: Path
    content: str

    def __len__(self) -> int:
        return self.stop - self.start


def _shards(source: Source, encoder: Encoder, cache_dir: Path) -> list[_Shard]:
    shards = []
    for number, (content, timed) in enumerate(source.content_keys(SHARD_ROWS, cache_dir)):
        start = number * SHARD_ROWS
        key = hashlib.sha256("\0".join((timed, encoder.fingerprint, str(PREPARE_VERSION))).encode()).hexdigest()
        path = cache_dir / "prepared" / f"{key}.parquet"
        shards.append(_Shard(source.name, start, min(start + SHARD_ROWS, len(source)), path, content))
    return shards


def _checked(shards: Sequence[_Shard], on_bad_sample: str) -> dict[Path, pa.Table]:
    """The verdicts that are there already."""
    found = {shard.path: _read_shard(shard.path) for shard in shards if shard.path.exists()}
    if on_bad_sample == "drop":
        return found
    # Where refused rows stop the run, they are checked anew: a permission that was given, or a disk that answers
    # again, leaves no trace in an image's size and time.
    return {path: table for path, table in found.items() if not pc.any(pc.not_equal(table["reason"], "")).as_py()}


def _check_shards(
    shards: Sequence[_Shard],
    sources: Mapping[str, Source],
    encoder: Encoder,
    console: Console,
    processes: int | None,
) -> None:
    rows = sum(map(len, shards))
    if processes is None:
        processes = 1 if rows <= IN_PROCESS_ROWS else min(_cores(), MAX_PROCESSES)
    with _progress(console, rows) as advance:
        if processes == 1:
            for shard in shards:
                advance(len(shard), _check_shard(shard, sources[shard.source], encoder))
        elif shards:
            used = {name: sources[name] for name in {shard.source for shard in shards}}
            _check_in_processes(shards, used, encoder, min(processes, len(shards)), advance)


def _cores() -> int:
    # Affinity is what a scheduler grants; not every platform has it.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_in_processes(
    shards: Sequence[_Shard],
    sources: Mapping[str, Source],
    encoder: Encoder,
    processes: int,
    advance: Callable[[int, int], None],
) -> None:
    # Spawned, not forked: the caller may hold threads and a CUDA context.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(sources, encoder))
    try:
        running = {pool.submit(_check_in_worker, shard): shard for shard in shards}
        for done in as_completed(running):
            advance(len(running[done]), done.result())
    except BrokenProcessPool:
        raise UserError(
            f"one of {processes} preparation processes died, most likely for want of memory; what was checked is "
            "kept: start again, with more memory or fewer cores"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_in_worker: dict[str, object] = {}  # what this preparation process was started with; empty elsewhere


def _start_worker(sources: Mapping[str, Source], encoder: Encoder) -> None:
    # Ctrl-C and the signal before a time limit reach every process, and are the parent's to handle: running shards are
    # finished. SIGTERM is how the parent itself ends the others where one died.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _in_worker.update(sources=sources, encoder=encoder)


def _exit_with_parent() -> None:
    # A worker whose parent was killed would wait for its next shard for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _check_in_worker(shard: _Shard) -> int:
    return _check_shard(shard, _in_worker["sources"][shard.source], _in_worker["encoder"])


def _check_shard(shard: _Shard, source: Source, encoder: Encoder) -> int:
    """Write one shard's verdicts; returns how many rows are refused."""
    seen: dict[ImageRef, _ImageVerdict] = {}
    verdicts = [_check_row(source, index, encoder, seen) for index in range(shard.start, shard.stop)]
    table = pa.Table.from_pylist(verdicts, schema=VERDICTS)
    _write(shard.path, lambda path: pq.write_table(table, path))
    return sum(verdict["reason"] != "" for verdict in verdicts)


def _check_row(source: Source, index: int, encoder: Encoder, seen: dict[ImageRef, _ImageVerdict]) -> dict[str, object]:
    verdict = {
        "id": source.row_id(index),
        "tokens": 0,
        "targets": 0,
        "images": 0,
        "reason": "",
        "explanation": "",
        "notes": [],
    }
    try:
        sample = source.sample(index)
        encoded = encoder.encode(sample)
        notes = _check_images(sample, seen)
    except BadSample as bad:
        return verdict | {"reason": bad.reason, "explanation": bad.explanation}
    return verdict | {
        "tokens": len(encoded.input_ids),
        "targets": encoded.targets,
        "images": len(sample.images),
        "notes": notes,
    }


@dataclass(frozen=True, slots=True)
class _ImageVerdict:
    notes: tuple[str, ...] = ()
    reason: str = ""
    explanation: str = ""


def _check_images(sample: Sample, seen: dict[ImageRef, _ImageVerdict]) -> list[str]:
    """Decode each image fully, once per shard; returns the conversions they need. Raises BadSample."""
    notes: list[str] = []
    for ref in sample.images:
        # Bytes in hand are remembered by their digest, so that a shard's images are not all held in memory.
        key = ref if ref.data is None else replace(ref, data=hashlib.sha256(ref.data).digest())
        if key not in seen:
            try:
                seen[key] = _ImageVerdict(notes=load_image(ref, sample.id).notes)
            except BadSample as bad:
                seen[key] = _ImageVerdict(reason=bad.reason, explanation=bad.explanation)
        if seen[key].reason:
            raise BadSample(sample.id, seen[key].reason, seen[key].explanation)
        notes += seen[key].notes
    return notes


def _read_shard(path: Path) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(use_threads=False)  # a thousand rows: threads take longer to wake
    except pa.ArrowInvalid:
        raise UserError(f"{path} is damaged; delete it and start again: its rows are checked anew") from None


def _joined(verdicts: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables([VERDICTS.empty_table(), *verdicts]).combine_chunks()


def _refuse_duplicates(verdicts: pa.Table) -> pa.Table:
    """Of the rows that passed and share an id, the first is kept."""
    passed = np.flatnonzero(pc.equal(verdicts["reason"], "").to_numpy())
    # A dictionary of a million ids takes 200 bytes each, their hashes 8. Where hashes are equal, the ids decide.
    batches = verdicts.select(["id"]).to_batches(max_chunksize=SHARD_ROWS)
    ids = itertools.chain.from_iterable(batch["id"].to_pylist() for batch in batches)
    hashes = np.fromiter(map(hash, ids), np.int64, len(verdicts))[passed]
    ascending = np.sort(hashes)
    passed = passed[np.isin(hashes, ascending[1:][ascending[1:] == ascending[:-1]])]
    codes = verdicts["id"].take(pa.array(passed)).combine_chunks().dictionary_encode().indices.to_numpy()
    _, first, group = np.unique(codes, return_index=True, return_inverse=True)
    first_row = passed[first][group]  # of each passed row: the first row with its id
    again = first_row != passed
    if not again.any():
        return verdicts
    mask = np.zeros(len(verdicts), dtype=bool)
    mask[passed[again]] = True
    explanations = [
        f"row {row} has the id of row {earlier}; ids are unique within a source"
        for row, earlier in zip(passed[again].tolist(), first_row[again].tolist(), strict=True)
    ]
    for column, values in (("reason", ["duplicate_id"] * len(explanations)), ("explanation", explanations)):
        replaced = pc.replace_with_mask(verdicts[column].combine_chunks(), pa.array(mask), pa.array(values))
        verdicts = verdicts.set_column(verdicts.schema.get_field_index(column), column, replaced)
    return verdicts


# Writing


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name, then rename: a file under its own name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _pool_table(out: Path, source: str) -> Path:
    return out / "prepare" / f"{quote(source, safe='')}.parquet"


class _RowsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} rows/s")


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int, int], None]]:
    """Yields advance(rows, refused): a bar on a terminal, a line now and then in a log file."""
    columns = (
        TextColumn("checking samples, {task.fields[refused]:,} refused"),
        BarColumn(),
        MofNCompleteColumn(),
        _RowsPerSecond(),
        TimeRemainingColumn(),
    )
    started = said = time.monotonic()
    with Progress(*columns, console=console, disable=total == 0 or not console.is_terminal) as progress:
        task = progress.add_task("", total=total, refused=0)

        def advance(rows: int, refused: int) -> None:
            nonlocal said
            bar = progress.tasks[task]
            progress.update(task, advance=rows, refused=bar.fields["refused"] + refused)
            now = time.monotonic()
            if not console.is_terminal and now - said > LOG_SECONDS:
                said = now
                speed = bar.completed / (now - started)
                console.print(
                    f"checked {bar.completed:,.0f} of {total:,} rows, {bar.fields['refused']:,} refused, "
                    f"{speed:,.0f} rows/s, {(total - bar.completed) / speed / 60:.0f} min left"
                )

        yield advance
