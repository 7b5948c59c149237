"""GMAI-MMBench, validation: multiple choice over 38 modalities and 18 clinical tasks. No torch here.

Design decisions:

- Rows: all of GMAI-MMBench_VAL.tsv in VLMEval/GMAI-MMBench (9.3 GB), all multiple choice. The id is the column
  `index`. The test split has no answers, is gated, and is graded by its authors by mail: it is not here.
- Options are the columns A to E, empty ones left out; gold is the letter of a column.
- Pictures are base64 in the column `image` and are kept as files in the Hugging Face cache, equal ones once (about
  7 GB, which would else be in the memory of every process). By VLMEvalKit's convention a short cell is the `index`
  of the row whose picture it shares.
- Groups: task, department and granularity, from "clinical vqa task", "department" and "perceptual granularity".
  Column names count without case; a file that lacks one has no such group.
- Trap: the official harness lets an LLM judge read what its rules cannot.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as with_changes
from pathlib import Path

from huatuo_vision.evaluation.benchmarks import gold
from huatuo_vision.evaluation.benchmarks.sources import Record, Repository, Source
from huatuo_vision.evaluation.rows import Benchmark, Loaded, Row
from huatuo_vision.schema import ImageRef

NAME = "gmai-mmbench-val"
FILES = Repository(NAME, "VLMEval/GMAI-MMBench", ("GMAI-MMBench_VAL.tsv",), large=True)
LETTERS = "ABCDE"
GROUPS = {"task": "clinical vqa task", "department": "department", "granularity": "perceptual granularity"}
# No picture is this short in base64.
LONGEST_INDEX = 64


@dataclass(frozen=True, slots=True)
class _SharedPicture:
    """A row's picture is that of the row with this index."""

    index: str
    record: Record


def load(path: Path | None) -> Loaded:
    with FILES.open(path) as source:
        return source.loaded(_rows(source))


def _rows(source: Source) -> Iterator[Row]:
    rows: list[tuple[Row, ImageRef | _SharedPicture]] = []
    for record in source.records(("index", "image", "question", "answer", "A", "B"), (*"CDE", *GROUPS.values())):
        letters, options = gold.options_by_letter([(letter, record.get(letter)) for letter in LETTERS], record)
        lowered = {str(name).strip().casefold(): value for name, value in record.values.items()}
        row = Row(
            benchmark=NAME,
            id=record.text("index"),
            question=record.text("question"),
            question_type="multiple-choice",
            options=options,
            answer=gold.letter_of_letter(record.get("answer"), letters, record),
            images=(),
            groups={group: lowered[column].strip() for group, column in GROUPS.items() if lowered.get(column)},
        )
        rows.append((row, _picture(source, record)))
    pictures = {row.id: picture for row, picture in rows}
    for row, picture in rows:
        yield with_changes(row, images=(_resolved(picture, pictures),))


def _picture(source: Source, record: Record) -> ImageRef | _SharedPicture:
    cell = (record.get("image") or "").strip()
    if 0 < len(cell) <= LONGEST_INDEX:
        # The record is kept for its place alone: its values hold megabytes.
        return _SharedPicture(cell, with_changes(record, values={}))
    try:
        return source.images.encoded(base64.b64decode(cell, validate=True), record.where)
    except binascii.Error:
        raise record.error("its image is not base64; download the file again") from None


def _resolved(picture: ImageRef | _SharedPicture, pictures: dict[str, ImageRef | _SharedPicture]) -> ImageRef:
    if isinstance(picture, ImageRef):
        return picture
    shared = pictures.get(picture.index)
    if not isinstance(shared, ImageRef):
        raise picture.record.error(
            f"its image is {picture.index!r}, which is neither base64 nor the index of a row with one"
        )
    return shared


GMAI_MMBENCH_VAL = Benchmark(
    name=NAME,
    title="GMAI-MMBench, validation",
    row_filter="all rows of GMAI-MMBench_VAL.tsv",
    expected_n=4_550,
    macro_over="task",
    note=(
        "The number of rows is not certain: the file is described as about 4,500 rows, a copy of it as 4,550, which is "
        "expected here."
    ),
    load=load,
)
