"""The run folder: the tables that one stage of the builder leaves for the next, and what became of every row.

    images/NNNNN.parquet          id, image{bytes,path}, width, height, hashes      written once, by ingest
    pairs/<stage>/NNNNN.parquet   one `Pair` a row, with references to images and never their bytes
    dropped/<stage>/NNNNN.parquet id, reason, detail of every row that did not come through
    vectors/<name>/NNNNN.parquet  id, vector (float16, length 1)
    logs/<pass>.json              which settings and how many tasks the pass was last started with
    logs/<pass>-<fingerprint>/    datatrove's logs, completions/NNNNN, and counts/NNNNN.json (the manifest)
    evidence/found/NNNNN.parquet  guideline chunks and cases found for a row; the pictures beside them in images/
    units/NNNNN.jsonl             what ingest reads in each task, planned before anything is read
    out/                          the finished data set

The number NNNNN of a file is the rank of the task that wrote it. It stays with a row through all stages, so a pair's
images are always in `images/` under the pair's own rank. A file gets its name when it is whole: it is written beside
it and renamed. Only what a completed pass wrote is ever read, and the counts must agree with the files.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from huatuo_vision.schema import UserError

# What is held in memory before it goes to disk, and so about the size of a row group.
ROW_GROUP_BYTES = 16 * 2**20
PAIRS_PER_GROUP = 4096


Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Pair:
    """A figure: its images and its texts. Fields of later stages are None until that stage has run."""

    id: str  # unique in the run; of letters, digits, '.', '_' and '-', fit for a file name
    image_ids: tuple[str, ...]  # SHA-256 of the pixels; several where one figure has several pictures
    caption: str
    context: tuple[str, ...]  # paragraphs of the text that mention the figure, in order
    sections: tuple[str, ...]  # the title of the section that each of them stands in, "" where there is none
    label: str  # "Figure 2", "" where the source has none
    article: str  # PMC3166277.1, elife-43154-v2; of a hospital's own pairs: what they name
    title: str  # the article's
    figure: str  # its id within the article
    licence: str  # CC0, CC-BY-4.0, ..., or what a hospital's configuration says
    source: str  # where it came from, in words fit for an attribution
    collection: str = ""  # which of several sources, by its name in the configuration
    annotated: bool = True  # people described the picture; else caption and context are tags, boxes and the like
    terms: int | None = None  # text-filter: distinct terms of the vocabulary in caption and context
    medical: float | None = None  # image-filter: the lowest of the images' probabilities of being medical
    overlaps: str | None = None  # dedup: the evaluation row that it resembles, where such rows are flagged
    evidence: tuple[str, ...] = ()  # reformat: ids of the guideline chunks and cases that the text was written with
    evidence_licences: tuple[str, ...] = ()  # and their licences
    method: str | None = (
        None  # reformat: native_caption, llm_reformatted, mllm_distill, mllm_reformatted, mllm_grounded
    )
    scenario: str | None = None
    prompt_version: str | None = None
    model: str | None = None  # as the endpoint called it
    state: str | None = None  # always ok: other states are dropped under their name
    description: str | None = None
    query: str | None = None
    answer: str | None = None
    modality: str | None = None  # as the source states it, else as the model says
    body_part: str | None = None


_LISTS = ("image_ids", "context", "sections", "evidence", "evidence_licences")
_OTHERS = {"terms": pa.int32(), "medical": pa.float32(), "annotated": pa.bool_()}
PAIR_SCHEMA = pa.schema(
    [(f.name, pa.list_(pa.string()) if f.name in _LISTS else _OTHERS.get(f.name, pa.string())) for f in fields(Pair)]
)
DROPPED_SCHEMA = pa.schema([("id", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
IMAGE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("phash", pa.binary(32)),
        ("coarse_phash", pa.binary(8)),
    ]
)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that goes no further: `reason` is a short fixed word for counting; `detail` explains."""

    id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A picture as it is kept: a file that every reader opens the same way (upright, 8 bits, RGB or grey)."""

    id: str  # SHA-256 over mode, size and pixels
    data: bytes = field(repr=False)
    path: str  # <id>.jpg or <id>.png; says nothing of where the picture came from
    width: int
    height: int
    phash: bytes  # perceptual hash of 256 bits: finds re-encodings and small edits
    coarse_phash: bytes  # of 64 bits: finds other crops too, and much that is only similar

    def row(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("data", "path")}
        return values | {"image": {"bytes": self.data, "path": self.path}}


@dataclass(frozen=True, slots=True)
class Counts:
    """What one stage made of its rows. `notes` count what is worth knowing and lost no row."""

    rows_in: int = 0
    rows_out: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0  # summed over the tasks

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rows_in + other.rows_in,
            self.rows_out + other.rows_out,
            dict(sorted((Counter(self.dropped) + Counter(other.dropped)).items())),
            dict(sorted((Counter(self.notes) + Counter(other.notes)).items())),
            self.seconds + other.seconds,
        )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write under; the file gets its own when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class RowWriter:
    """Rows to one Parquet file, a row group at a time. `close` the file by its context manager only."""

    def __init__(self, path: Path, schema: pa.Schema):
        # Chunks that depend on the content, and an index of pages, are what the Hub's storage and viewer want.
        self._file = pq.ParquetWriter(
            path, schema, compression="zstd", use_content_defined_chunking=True, write_page_index=True
        )
        self._schema, self._rows, self._bytes = schema, [], 0

    def write(self, row: Mapping[str, Any], size: int = ROW_GROUP_BYTES // PAIRS_PER_GROUP) -> None:
        """`size` is about how many bytes the row takes."""
        self._rows.append(row)
        self._bytes += size
        if self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        self._flush()
        self._file.close()


@contextmanager
def row_writer(path: Path, schema: pa.Schema) -> Iterator[RowWriter]:
    with whole_file(path) as unfinished:
        writer = RowWriter(unfinished, schema)
        try:
            yield writer
        finally:
            writer.close()


class ShardImages:
    """The pictures of one rank by id, a row group in memory at a time: cheap in the pairs' own order."""

    def __init__(self, path: Path):
        self._file = pq.ParquetFile(path)
        self._place: dict[str, tuple[int, int]] = {}
        for group in range(self._file.num_row_groups):
            ids = self._file.read_row_group(group, columns=["id"])["id"].to_pylist()
            self._place |= {id_: (group, position) for position, id_ in enumerate(ids)}
        self._group: int | None = None
        self._images: pa.ChunkedArray | None = None

    def get(self, image_id: str) -> bytes:
        """The encoded picture. Raises KeyError for an id that is not in this rank."""
        group, position = self._place[image_id]
        if group != self._group:
            self._images = self._file.read_row_group(group, columns=["image"])["image"].combine_chunks()
            self._group = group
        return self._images.field("bytes")[position].as_py()

    def in_file_order(self, items: Iterable[Item], image_id: Callable[[Item], str]) -> list[Item]:
        """The items in the order in which their pictures are read fastest."""
        return sorted(items, key=lambda item: self._place[image_id(item)])

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> ShardImages:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where everything of one run is. Holds a path only, so that it travels to workers and to Slurm."""

    path: Path
    # Passes seen to be complete, by their logging folders: asked again for every file that is read.
    _complete: set[Path] = field(default_factory=set, init=False, repr=False, compare=False)

    def rank_file(self, kind: str, name: str, rank: int, suffix: str = "parquet") -> Path:
        return self.path / kind / name / f"{rank:05d}.{suffix}"

    def pairs_file(self, stage: str, rank: int) -> Path:
        return self.rank_file("pairs", stage, rank)

    def dropped_file(self, stage: str, rank: int) -> Path:
        return self.rank_file("dropped", stage, rank)

    def images_file(self, rank: int) -> Path:
        return self.rank_file("images", "", rank)

    def units_file(self, rank: int) -> Path:
        return self.rank_file("units", "", rank, "jsonl")

    @property
    def out(self) -> Path:
        return self.path / "out"

    # The state of passes -------------------------------------------------------------------------------------

    def state(self, name: str) -> dict[str, Any] | None:
        """What pass `name` was last started with: fingerprint, tasks. None if it never was."""
        path = self.path / "logs" / f"{name}.json"
        if not path.is_file():
            return None
        return json.loads(path.read_text(encoding="utf-8"))

    def logging_dir(self, name: str) -> Path:
        """The folder of the pass as it was last started. Raises UserError if it never was."""
        state = self.state(name)
        if state is None:
            raise UserError(f"{self.path}: the stage {name} has not run; run it first, or leave out --step")
        return self.path / "logs" / f"{name}-{state['fingerprint']}"

    def tasks(self, name: str) -> int:
        """The number of tasks, and so of files, of a pass that is complete. Raises UserError if it isn't."""
        folder, tasks = self.logging_dir(name), self.state(name)["tasks"]
        if folder in self._complete:
            return tasks
        done = {path.name for path in (folder / "completions").glob("*")}
        if missing := sum(f"{rank:05d}" not in done for rank in range(tasks)):
            raise UserError(
                f"{self.path}: the stage {name} is not complete ({missing} of {tasks} tasks are missing); run the "
                "same command again and it goes on from there"
            )
        self._complete.add(folder)
        return tasks

    def is_complete(self, name: str) -> bool:
        try:
            self.tasks(name)
        except UserError:
            return False
        return True

    def write_counts(self, name: str, rank: int, counts: Counts) -> None:
        write_json(self.logging_dir(name) / "counts" / f"{rank:05d}.json", asdict(counts))

    def rank_counts(self, name: str, rank: int) -> Counts:
        path = self.logging_dir(name) / "counts" / f"{rank:05d}.json"
        return Counts(**json.loads(path.read_text(encoding="utf-8")))

    def counts(self, name: str) -> Counts:
        """Of a complete stage, over all its tasks."""
        return sum((self.rank_counts(name, rank) for rank in range(self.tasks(name))), Counts())

    # The tables of complete passes ---------------------------------------------------------------------------

    def pairs(self, stage: str, rank: int) -> Iterator[Pair]:
        """The rows that came out of a complete stage's task. Raises UserError if the stage isn't complete or whole."""
        for batch in self._checked_pairs(stage, rank).iter_batches(batch_size=PAIRS_PER_GROUP):
            for row in batch.to_pylist():
                yield Pair(**row | {name: tuple(row[name]) for name in _LISTS})

    def pair_columns(self, stage: str, rank: int, columns: Sequence[str]) -> pa.Table:
        return self._checked_pairs(stage, rank).read(columns=list(columns))

    def _checked_pairs(self, stage: str, rank: int) -> pq.ParquetFile:
        self.tasks(stage)
        path = self.pairs_file(stage, rank)
        expected = self.rank_counts(stage, rank).rows_out
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path, f"cannot be read ({' '.join(str(error).split())})") from None
        if file.metadata.num_rows != expected:
            raise _damaged(path, f"holds {file.metadata.num_rows} rows; its manifest says {expected}")
        return file

    def images(self, rank: int) -> ShardImages:
        """The pictures that the pairs of a rank refer to."""
        self.tasks("ingest")
        return ShardImages(self.images_file(rank))

    def image_columns(self, rank: int, columns: Sequence[str]) -> pa.Table:
        """Columns of the images table without the pictures themselves: id, width, height, phash."""
        self.tasks("ingest")
        return pq.read_table(self.images_file(rank), columns=list(columns))

    def dropped(self, stage: str) -> Iterator[Dropped]:
        for rank in range(self.tasks(stage)):
            for batch in pq.ParquetFile(self.dropped_file(stage, rank)).iter_batches():
                yield from (Dropped(**row) for row in batch.to_pylist())

    # Vectors -------------------------------------------------------------------------------------------------

    def write_vectors(self, name: str, rank: int, ids: Sequence[str], vectors: np.ndarray) -> None:
        """`vectors` has shape (rows, dimensions); kept as float16."""
        width = vectors.shape[1]
        flat = pa.array(np.ascontiguousarray(vectors, np.float16).reshape(-1))
        table = pa.table({"id": list(ids), "vector": pa.FixedSizeListArray.from_arrays(flat, width)})
        with whole_file(self.rank_file("vectors", name, rank)) as unfinished:
            pq.write_table(table, unfinished)

    def vectors(self, name: str, rank: int) -> tuple[list[str], np.ndarray]:
        """Ids and their float16 vectors, of shape (rows, dimensions)."""
        table = pq.read_table(self.rank_file("vectors", name, rank))
        column = table["vector"].combine_chunks()
        return table["id"].to_pylist(), column.flatten().to_numpy().reshape(len(table), column.type.list_size)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} {what}: something else changed it after it was written; delete the run folder's logs/ of this stage "
        "and run the command again"
    )


@contextmanager
def stage_output(run: RunFolder, stage: str, rank: int, expected: int | None) -> Iterator[StageOutput]:
    """Where a task's rows go, one way or the other; its counts are written when all of them are in.

    `expected` is the number of rows that came out of the stage before: as many must be kept or dropped here.
    """
    started = time.monotonic()
    with (
        row_writer(run.pairs_file(stage, rank), PAIR_SCHEMA) as kept,
        row_writer(run.dropped_file(stage, rank), DROPPED_SCHEMA) as dropped,
    ):
        output = StageOutput(kept, dropped, _Progress(run.logging_dir(stage) / "progress" / f"{rank:05d}"))
        yield output
        output.progress.close()
    counts = Counts(output.rows_in, output.rows_out, dict(output.reasons), {}, time.monotonic() - started)
    assert expected is None or expected == counts.rows_in, f"{stage} lost rows: {expected} came, {counts}"
    counts += Counts(notes=dict(output.notes))
    run.write_counts(stage, rank, counts)


class StageOutput:
    """Counts every row that it is given: a Pair is kept, a Dropped is not."""

    def __init__(self, kept: RowWriter, dropped: RowWriter, progress: _Progress):
        self._kept, self._dropped, self.progress = kept, dropped, progress
        self.rows_out = 0
        self.reasons: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    @property
    def rows_in(self) -> int:
        return self.rows_out + self.reasons.total()

    def write(self, row: Pair | Dropped) -> None:
        if isinstance(row, Pair):
            self._kept.write(_as_dict(row))
            self.rows_out += 1
        else:
            self._dropped.write(_as_dict(row))
            self.reasons[row.reason] += 1
        self.progress.advance(self.rows_in)


class _Progress:
    """How far a task is, in a file that the launching process reads for its progress bar."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._next = path, 0.0

    def advance(self, rows: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._path.write_text(str(rows))
            self._next = now + 1

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


def _as_dict(row: Pair | Dropped) -> dict[str, Any]:
    return {f.name: getattr(row, f.name) for f in fields(row)}


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
