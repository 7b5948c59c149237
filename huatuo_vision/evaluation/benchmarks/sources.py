"""How a benchmark's files are found and read: on the Hub at one commit, in a local folder, or one file. No torch here.

A folder holds the repository's files as they were downloaded. Pictures inside zip archives are read in place; an
archive may also lie unpacked beside the table. Pictures that are columns of a table are held in memory, or where they
are many (`large`) as files in the cache; equal ones once.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, errors, snapshot_download
from rich.console import Console
from rich.progress import track

from huatuo_vision.evaluation.benchmarks.images import ZIP_ERRORS, Images, archives_in, brief
from huatuo_vision.evaluation.rows import Loaded, Row
from huatuo_vision.schema import UserError

SUFFIXES = (".parquet", ".json", ".jsonl", ".csv", ".tsv")

# The client's errors, among them, by import, the base class of its HTTP library's, and what disks and sockets raise.
HUB_ERRORS = (
    *(error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, Exception)),
    OSError,
)


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was published."""

    values: Mapping[str, Any]
    index: int  # over all tables of the benchmark, from 0
    where: str  # "vqa-rad: row 3 of test.parquet"
    table: str  # the table's path in the repository

    def error(self, message: str) -> UserError:
        return UserError(f"{self.where}: {message}")

    def get(self, column: str) -> Any:
        return self.values.get(column)

    def text(self, column: str) -> str:
        """A cell as text without surrounding white space. Raises UserError where it is empty."""
        value = self.get(column)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        raise self.error(f"the column {column!r} holds {shown(value)}; expected a text that is not empty")


@dataclass(frozen=True, slots=True)
class Table:
    """One file of rows, or a member of a zip archive that is one."""

    path: Path
    name: str  # relative to the folder
    member: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """A benchmark's opened files."""

    benchmark: str
    tables: tuple[Table, ...]
    revision: str
    images: Images

    def records(self, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Record]:
        """All rows in the published order: files by name, rows as they stand.

        Only these columns are sure to be there: a Parquet file's others are not read. Raises UserError where a
        required column is missing or there is no row at all.
        """
        console = Console(stderr=True)
        rows = track(
            self._rows(required, optional),
            f"reading {self.benchmark}",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        index = -1
        for index, (table, number, values) in enumerate(rows):
            record = Record(values, index, f"{self.benchmark}: row {number} of {table.name}", table.name)
            self._check_columns(values, required, record.where)
            yield record
        if index < 0:
            names = ", ".join(table.name for table in self.tables)
            raise UserError(f"{self.benchmark}: {names} holds no rows; download it again")

    def loaded(self, rows: Iterable[Row]) -> Loaded:
        """The rows, once it is sure that they are some, have ids of their own and all their images."""
        rows = tuple(rows)
        if not rows:
            names = ", ".join(table.name for table in self.tables)
            raise UserError(f"{self.benchmark}: no row of {names} belongs to it; check that it is the right file")
        seen: set[str] = set()
        for row in rows:
            if row.id in seen:
                raise UserError(
                    f"{self.benchmark}: two rows have the id {row.id!r}; ids must be unique, so download again"
                )
            seen.add(row.id)
        self.images.check()
        return Loaded(rows, self.revision)

    def _rows(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[Table, int, dict[str, Any]]]:
        for table in self.tables:
            for number, values in enumerate(self._read(table, (*required, *optional), required), start=1):
                yield table, number, values

    def _read(self, table: Table, columns: Sequence[str], required: Sequence[str]) -> Iterator[dict[str, Any]]:
        suffix = PurePosixPath(table.member or table.path.name).suffix.lower()
        where = f"{self.benchmark}: {table.name}"
        if suffix == ".parquet":
            yield from self._parquet(table, columns, required, where)
        elif suffix in (".csv", ".tsv"):
            with self._text(table) as file:
                yield from _separated(file, "\t" if suffix == ".tsv" else ",", required, where)
        else:
            with self._text(table) as file:
                yield from _json_lines(file, where) if suffix == ".jsonl" else _json_array(file, where)

    def _parquet(
        self, table: Table, columns: Sequence[str], required: Sequence[str], where: str
    ) -> Iterator[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(table.path) as file:
                names = file.schema_arrow.names
                self._check_columns(names, required, where)
                present = [name for name in dict.fromkeys(columns) if name in names]
                for batch in file.iter_batches(batch_size=64, columns=present):
                    yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{where} cannot be read as Parquet ({brief(error)}); download it again") from None

    @contextmanager
    def _text(self, table: Table) -> Iterator[io.TextIOBase]:
        where = f"{self.benchmark}: {table.name}"
        with ExitStack() as stack:
            try:
                if table.member is None:
                    binary = stack.enter_context(table.path.open("rb"))
                else:
                    binary = stack.enter_context(self.images.archive(table.path).open(table.member))
                yield stack.enter_context(io.TextIOWrapper(binary, encoding="utf-8-sig", newline=""))
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 text ({brief(error)}); download it again") from None
            except (OSError, zipfile.BadZipFile, zlib.error) as error:
                raise UserError(f"{where} cannot be read ({brief(error)}); download it again") from None

    def _check_columns(self, names: Iterable[str], required: Sequence[str], where: str) -> None:
        missing = [name for name in required if name not in names]
        if missing:
            raise UserError(
                f"{where} has the columns {', '.join(map(str, names))}; expected also {', '.join(missing)}, so check "
                f"that it is the file that {self.benchmark} is published in"
            )


@dataclass(frozen=True, slots=True)
class Repository:
    """A data set's place on the Hub and the files of it that a benchmark needs.

    `tables` and `archives` are glob patterns relative to the repository's root; `folders` are where the archives'
    content may lie unpacked. With `packed`, the tables are members of the archives, or lie unpacked.
    """

    benchmark: str
    hub_id: str | None  # None: nobody may hand the data on, so a local copy is all there is
    tables: tuple[str, ...]
    archives: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    packed: bool = False
    named_files: Callable[[Path], Sequence[str]] | None = None  # a downloaded folder's tables -> patterns of the rest
    large: bool = False  # more pictures in its tables than memory should hold: they are kept as files in the cache

    @contextmanager
    def open(self, path: Path | None) -> Iterator[Source]:
        """The files at `path` (a folder, a table or its archive), or on the Hub where `path` is None.

        The revision is the commit on the Hub, or the SHA-256 over the local tables. Raises UserError.
        """
        if path is None:
            root, commit = self._download()
            only = None
        else:
            path = path.expanduser().absolute()
            if not path.exists():
                raise UserError(
                    f"{self.benchmark}: {path} does not exist; correct the path or leave it out for the Hub"
                )
            root, only, commit = (path, None, None) if path.is_dir() else (self._root_of(path), path, None)
        packed_file = only is not None and self.packed and only.suffix.lower() == ".zip"
        # Beside an archive that was named may lie others that have nothing to do with it.
        archives = (glob.escape(only.name),) if packed_file else self.archives
        store = Path(constants.HF_HOME) / "huatuo_vision" / "pictures" if self.large else None
        images = Images(self.benchmark, root, archives, self.folders, store)
        try:
            tables = self._tables(root, only, images)
            yield Source(self.benchmark, tables, commit or self._checksum(tables, images), images)
        finally:
            images.close()

    def _download(self) -> tuple[Path, str]:
        if self.hub_id is None:
            raise UserError(
                f"{self.benchmark}: it can't be downloaded; give the folder of your own copy as {self.benchmark}=PATH, "
                "laid out as in huatuo_vision/evaluation/README.md"
            )
        where = f"{self.benchmark}: the data set {self.hub_id}"
        page = f"https://huggingface.co/datasets/{self.hub_id}"
        patterns = [*(() if self.packed else self.tables), *self.archives]
        try:
            folder = Path(snapshot_download(self.hub_id, repo_type="dataset", allow_patterns=patterns))
            if self.named_files is not None:
                more = [*patterns, *self.named_files(folder)]
                folder = Path(
                    snapshot_download(self.hub_id, repo_type="dataset", revision=folder.name, allow_patterns=more)
                )
        except errors.GatedRepoError:
            raise UserError(f"{where} is gated: accept its terms at {page} and log in with `hf auth login`") from None
        except errors.RepositoryNotFoundError:
            raise UserError(
                f"{where} was not found at {page}: check that page, and log in with `hf auth login` if it is private"
            ) from None
        except HUB_ERRORS as error:
            raise UserError(
                f"{where} cannot be downloaded ({brief(error)}); check the connection, or give a local copy as "
                f"{self.benchmark}=PATH"
            ) from None
        return folder, folder.name

    def _root_of(self, table: Path) -> Path:
        """The folder that a table's name is relative to, where the images are looked for."""
        for pattern in self.tables:
            if table.match(pattern):
                return table.parents[len(PurePosixPath(pattern).parts) - 1]
        return table.parent

    def _tables(self, root: Path, only: Path | None, images: Images) -> tuple[Table, ...]:
        if only is not None and only.suffix.lower() in SUFFIXES:
            return (Table(only, only.name),)
        if only is not None and not (self.packed and only.suffix.lower() == ".zip"):
            raise UserError(
                f"{self.benchmark}: {only} is no table by its name; expected a folder or a file that ends in "
                f"{', '.join(SUFFIXES)}"
            )
        found = () if only is not None else tuple(t for pattern in self.tables for t in self._files(root, pattern))
        if self.packed and not found:
            archives = [only] if only is not None else [p for a in self.archives for p in archives_in(root, a)]
            found = tuple(table for archive in archives for table in self._members(archive, images))
        if not found:
            raise self._no_table(only or root, self.tables)
        return found

    def _files(self, root: Path, pattern: str) -> list[Table]:
        # A repository may lie one folder deeper, after an archive was unpacked.
        found = sorted(root.glob(pattern)) or sorted(root.rglob(pattern))
        if not found and not self.packed:
            raise self._no_table(root, (pattern,))
        if len({path.parent for path in found}) > 1:
            raise UserError(
                f"{self.benchmark}: {root} holds {found[0]} and {found[-1]}; give the folder of one copy of the data"
            )
        return [Table(path, path.relative_to(root).as_posix()) for path in found]

    def _members(self, archive: Path, images: Images) -> list[Table]:
        names = sorted(images.archive(archive).namelist())
        return [
            Table(archive, name, member=name)
            for name in names
            if not name.startswith("__MACOSX/") and any(PurePosixPath(name).match(pattern) for pattern in self.tables)
        ]

    def _no_table(self, place: Path, patterns: Sequence[str]) -> UserError:
        here = sorted(path.name for path in place.iterdir()) if place.is_dir() else ["other files"]
        published = f"https://huggingface.co/datasets/{self.hub_id}"
        return UserError(
            f"{self.benchmark}: {place} holds {', '.join(here[:8]) or 'nothing'}; expected {', '.join(patterns)} as in "
            f"{published if self.hub_id else 'huatuo_vision/evaluation/README.md'}"
        )

    def _checksum(self, tables: Sequence[Table], images: Images) -> str:
        """Over the contents in their order: where the files lie and what they are called does not matter."""
        digest = hashlib.sha256()
        for table in tables:
            try:
                opened = (
                    table.path.open("rb") if table.member is None else images.archive(table.path).open(table.member)
                )
                with opened as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except ZIP_ERRORS as error:
                raise UserError(f"{self.benchmark}: {table.name} cannot be read ({brief(error)})") from None
        return f"sha256:{digest.hexdigest()[:16]}"


def _separated(file: io.TextIOBase, delimiter: str, required: Sequence[str], where: str) -> Iterator[dict[str, Any]]:
    # A picture in base64 is one cell of many megabytes. The limit is the process's, so it is put back.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        reader = csv.DictReader(file, delimiter=delimiter)
        for row in reader:
            short = [name for name in required if name in row and row[name] is None]
            if None in row or short:
                raise UserError(
                    f"{where}, line {reader.line_num}, has another number of cells than the header; download it again"
                )
            yield row
    except csv.Error as error:
        raise UserError(f"{where} cannot be read as a table ({brief(error)}); download it again") from None
    finally:
        csv.field_size_limit(limit)


def _json_array(file: io.TextIOBase, where: str) -> Iterator[dict[str, Any]]:
    try:
        rows = json.load(file)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({brief(error)}); download it again") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where} is no list of objects; expected [{{...}}, ...], so check that it is the right file")
    yield from rows


def _json_lines(file: io.TextIOBase, where: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}, line {number}, is not JSON ({brief(error)}); download it again") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{where}, line {number}, is no object; expected {{...}}, so check that it is the right file"
            )
        yield row


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
