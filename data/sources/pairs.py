"""A hospital's own pairs as a source: JSON Lines, CSV or Parquet, a row an image (or several) with caption and context.

Reports, captions of videos and boxes around lesions come as the same rows; `ingest.columns` says how they are named.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from data.config import Source
from data.filters.labels import modality_of
from data.sources.files import FolderFiles, TooLarge, UnsafeName
from data.sources.found import Found, FoundRows, Note, slug
from data.sources.text import plain_text
from data.tables import Dropped, Pair
from huatuo_vision.schema import BadSample, UserError

SUFFIXES = (".jsonl", ".csv", ".parquet")
# Rows of a Parquet file in memory at once; each may hold a picture.
_BATCH = 64


def list_chunks(fs: AbstractFileSystem, root: str, settings: Source, limit: int | None) -> Iterator[dict[str, Any]]:
    """One unit for every `shard_size` rows: the file, where in it they begin, and how many they are.

    JSON Lines and CSV files are read through once, to know where their rows begin. Raises UserError for a Parquet or
    CSV file that can't be read or lacks a column.
    """
    single = fs.isfile(root)
    prefix = len(root.rsplit("/", 1)[0] if single else root.rstrip("/")) + 1
    paths = [root] if single else sorted(fs.ls(root, detail=False))
    left = limit
    for path in (path for path in paths if path.lower().endswith(SUFFIXES) and not path[prefix:].startswith(".")):
        chunks = {".parquet": _parquet_chunks, ".csv": _csv_chunks}.get(
            PurePosixPath(path.lower()).suffix, _line_chunks
        )
        for chunk in chunks(fs, path, settings):
            if left == 0:
                return
            if left is not None:
                chunk["rows"] = min(chunk["rows"], left)
                left -= chunk["rows"]
            yield {"file": path[prefix:], **chunk}


def _line_chunks(fs: AbstractFileSystem, path: str, settings: Source) -> Iterator[dict[str, int]]:
    start = offset = number = first = 0
    with fs.open(path, "rb") as file:
        for line in file:
            if number - first == settings.shard_size:
                yield {"offset": start, "first": first, "rows": number - first}
                start, first = offset, number
            offset += len(line)
            number += 1
    if number > first:
        yield {"offset": start, "first": first, "rows": number - first}


def _parquet_chunks(fs: AbstractFileSystem, path: str, settings: Source) -> Iterator[dict[str, int]]:
    try:
        with fs.open(path, "rb") as file:
            table = pq.ParquetFile(file)
            total, names = table.metadata.num_rows, table.schema_arrow.names
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} can't be read as Parquet ({' '.join(str(error).split())}); write it again") from None
    _check_columns(path, names, settings)
    for first in range(0, total, settings.shard_size):
        yield {"first": first, "rows": min(settings.shard_size, total - first)}


def _check_columns(path: str, names: Sequence[str], settings: Source) -> None:
    columns = settings.columns
    if missing := [name for name in (columns.id, columns.image, columns.caption) if name not in names]:
        raise UserError(
            f"{path} has the columns {', '.join(names)}; expected also {', '.join(missing)}, so name yours in "
            "ingest.columns"
        )


class _CsvRows:
    """The records of a CSV file, and where the next one begins; a quoted cell may hold line breaks."""

    def __init__(self, file: BinaryIO):
        self.offset = file.tell()
        self._file = file
        self._records = csv.reader(self._lines())

    def _lines(self) -> Iterator[str]:
        for line in self._file:
            text = line.decode("utf-8-sig" if self.offset == 0 else "utf-8", errors="surrogateescape")
            self.offset += len(line)
            yield text

    def __iter__(self) -> Iterator[list[str]]:
        return self._records


def _csv_chunks(fs: AbstractFileSystem, path: str, settings: Source) -> Iterator[dict[str, int]]:
    try:
        with fs.open(path, "rb") as file:
            rows = _CsvRows(file)
            _check_columns(path, next(iter(rows), []), settings)
            start, first, number = rows.offset, 0, 0
            for number, _ in enumerate(rows, start=1):
                if number - first == settings.shard_size:
                    yield {"offset": start, "first": first, "rows": number - first}
                    start, first = rows.offset, number
            if number > first:
                yield {"offset": start, "first": first, "rows": number - first}
    except csv.Error as error:
        raise UserError(f"{path} can't be read as CSV ({error}); write it again") from None


def _csv_rows(
    fs: AbstractFileSystem, path: str, unit: Mapping[str, Any], settings: Source
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    with fs.open(path, "rb") as file:
        names = next(iter(_CsvRows(file)))
        file.seek(unit["offset"])
        rows = zip(range(unit["first"], unit["first"] + unit["rows"]), _CsvRows(file), strict=False)
        for number, cells in rows:
            if len(cells) != len(names):
                yield number, f"{len(cells)} cells; the first line names {len(names)}"
            elif any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
                yield number, "not UTF-8; save the table as UTF-8"
            else:
                yield number, dict(zip(names, cells, strict=True))


def read_unit(fs: AbstractFileSystem, root: str, unit: Mapping[str, Any], settings: Source) -> FoundRows:
    """The rows of a unit."""
    folder = root.rsplit("/", 1)[0] if fs.isfile(root) else root
    files = FolderFiles(fs, folder)
    path = f"{folder.rstrip('/')}/{unit['file']}"
    suffix = PurePosixPath(unit["file"].lower()).suffix
    rows = {".parquet": _parquet_rows, ".csv": _csv_rows}.get(suffix, _line_rows)
    for number, row in rows(fs, path, unit, settings):
        where = f"{unit['file']}:{number + 1}"
        if isinstance(row, str):
            yield Dropped(where, "broken_csv" if suffix == ".csv" else "broken_json", row)
            continue
        try:
            pair, was_html, unknown = _pair(row, where, settings)
            pictures = tuple(_pictures(files, row, pair.id, settings))
        except BadSample as error:
            yield Dropped(error.sample_id, error.reason, error.explanation)
            continue
        if was_html:
            yield Note("html_removed", was_html)
        if unknown:
            yield Note("modality_of_another_name")
        yield Found(pair, pictures)


def _line_rows(
    fs: AbstractFileSystem, path: str, unit: Mapping[str, Any], settings: Source
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Number and row, or what is wrong with its line."""
    with fs.open(path, "rb") as file:
        file.seek(unit["offset"])
        for number in range(unit["first"], unit["first"] + unit["rows"]):
            line = file.readline()
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"))
            except ValueError as error:
                yield number, "an empty line" if not line.strip() else f"not JSON ({' '.join(str(error).split())})"
                continue
            yield number, row if isinstance(row, dict) else "no object; expected {...}"


def _parquet_rows(
    fs: AbstractFileSystem, path: str, unit: Mapping[str, Any], settings: Source
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with fs.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        columns = [name for name in settings.columns.model_dump().values() if name in table.schema_arrow.names]
        # Only the row groups that the unit reaches into are read.
        first, groups, number = 0, [], None
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if first < unit["first"] + unit["rows"] and first + size > unit["first"]:
                groups.append(group)
                number = first if number is None else number
            first += size
        for batch in table.iter_batches(_BATCH, row_groups=groups, columns=columns):
            for row in batch.to_pylist():
                if unit["first"] <= number < unit["first"] + unit["rows"]:
                    yield number, row
                number += 1


def _pair(row: Mapping[str, Any], where: str, settings: Source) -> tuple[Pair, int, bool]:
    """The row's pair, how many of its texts held HTML, and whether its modality is one that we have no label for.

    Raises BadSample: malformed_row, no_text, no_licence.
    """
    columns = settings.columns
    id_ = row.get(columns.id)
    if isinstance(id_, bool) or not isinstance(id_, (str, int)) or not str(id_).strip():
        raise BadSample(where, "malformed_row", f"{columns.id} is {_shown(id_)}; expected an id of its own")
    name = slug(str(id_).strip())
    caption = row.get(columns.caption)
    if caption is not None and not isinstance(caption, str):
        raise BadSample(name, "malformed_row", f"{columns.caption} is {_shown(caption)}; expected a text")
    context = row.get(columns.context) if columns.context else None
    paragraphs = [context] if isinstance(context, str) else context or []
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, str) for paragraph in paragraphs):
        raise BadSample(name, "malformed_row", f"{columns.context} is {_shown(context)}; expected a text or texts")
    texts = [plain_text(text) for text in (caption or "", *paragraphs)]
    said = tuple(text for text, _ in texts[1:] if text)
    boxes = _boxes(row.get(columns.box), name, columns.box) if columns.box else ()
    if not texts[0][0] and not said and not boxes:
        raise BadSample(name, "no_text", "caption and context are empty")

    def text_of(column: str | None) -> str:
        value = row.get(column) if column else None
        return plain_text(str(value))[0] if value is not None else ""

    licence = text_of(columns.licence) or settings.licence or ""
    if not licence:
        raise BadSample(
            name, "no_licence", f"the row has no {columns.licence or 'licence'}; set ingest.licence if all share one"
        )
    article, modality = text_of(columns.article), text_of(columns.modality)
    pair = Pair(
        id=name,
        image_ids=(),
        caption=texts[0][0],
        context=said + boxes,
        sections=("",) * len(said) + ("boxes",) * len(boxes),
        label="",
        article=slug(article) if article else name,
        title="",
        figure=name,
        licence=licence,
        source=text_of(columns.source) or settings.source or "",
        modality=modality_of(modality) or settings.modality,
    )
    return pair, sum(was_html for _, was_html in texts), bool(modality) and modality_of(modality) is None


def _boxes(value: object, name: str, column: str) -> tuple[str, ...]:
    """One sentence on all boxes of a row, if it has any. Raises BadSample: malformed_row."""
    if value is None or value == "" or value == []:
        return ()
    flat = np.ravel(value) if isinstance(value, list) else re.findall(r"[^\s,;()\[\]]+", str(value))
    try:
        numbers = [round(float(number)) for number in flat]
    except (ValueError, TypeError):
        numbers = []
    if not numbers or len(numbers) % 4:
        raise BadSample(name, "malformed_row", f"{column} is {_shown(value)}; expected x0, y0, x1, y1 for each box")
    boxes = [numbers[at : at + 4] for at in range(0, len(numbers), 4)]
    return (box_sentence(boxes),)


def box_sentence(boxes: Sequence[Sequence[int]]) -> str:
    """What a model, and a reader, is told of boxes: x0, y0, x1, y1 in pixels of the stored picture."""
    told = "; ".join(f"({', '.join(map(str, box))})" for box in boxes)
    return f"Marked by a reader, as x0, y0, x1, y1 in pixels from the top left: {told}."


def _pictures(files: FolderFiles, row: Mapping[str, Any], name: str, settings: Source) -> Iterator[Callable[[], bytes]]:
    """What reads each of the row's pictures. Raises BadSample: malformed_row."""
    column = settings.columns.image
    value = row.get(column)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise BadSample(name, "malformed_row", f"{column} is an empty list; expected at least one picture")
    for image in values:
        # As `datasets` stores an Image: bytes, and a path that then only names them.
        encoded = image.get("bytes") or image.get("path") if isinstance(image, Mapping) else image
        if isinstance(encoded, bytes):
            yield partial(bytes, encoded)
        elif isinstance(encoded, str) and encoded.strip():
            yield partial(read_picture, files, encoded.strip(), name)
        else:
            raise BadSample(name, "malformed_row", f"{column} is {_shown(image)}; expected a file name or a picture")


def read_picture(files: FolderFiles, path: str, owner: str) -> bytes:
    try:
        return files.read(path)
    except UnsafeName:
        raise BadSample(owner, "unsafe_path", "an image's name leads out of the source's folder") from None
    except (FileNotFoundError, IsADirectoryError):
        raise BadSample(owner, "missing_image", f"{PurePosixPath(path).name} is not there") from None
    except TooLarge as error:
        raise BadSample(owner, "image_too_large", str(error)) from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
