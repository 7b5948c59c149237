"""A recipe's data source, opened: row i as a checked Sample, with memory that does not grow with the rows.

Rows lie in memory-mapped Arrow files, so a process that opens a source, or is sent one, holds only paths. JSON arrays
of hundreds of MB are streamed once into such a file; a row that is malformed is kept as it is, to be reported by name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import stat
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import ijson
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from huatuo_vision.inputs.adapters import ImageNameError, adapt, row_id, row_images
from huatuo_vision.phantom import make_phantom, phantom_folder
from huatuo_vision.recipe import OPERATIONAL_SOURCE_KEYS, SourceSpec
from huatuo_vision.schema import BadSample, ImageRef, OutOfReach, Sample, UserError, check_sample

if TYPE_CHECKING:
    from datasets import Dataset

# The configurations on the Hub, and (with .json) the files of a download.
PUBMEDVISION_CONFIGS = {
    "alignment": "PubMedVision_Alignment_VQA",
    "instruction": "PubMedVision_InstructionTuning_VQA",
    "captions": "PubMedVision_Original_Caption",
    "chinese": "PubMedVision_Chinese",
}
TABLE_SUFFIXES = (".parquet", ".csv")
DATA_SUFFIXES = (".json", ".jsonl", *TABLE_SUFFIXES)

# Goes up whenever the same file would be converted differently.
CONVERSION_VERSION = 2
# One row as it stands in the file, its id, the names of its images, and what makes it unreadable (null for JSON).
ROW_SCHEMA = pa.schema(
    [("row", pa.binary()), ("id", pa.string()), ("images", pa.list_(pa.string())), ("problem", pa.string())]
)
MEMBERS_VERSION = 3  # likewise for the index of the archives' members
FEW_FILES = 200
STAT_THREADS = 16
SLOW_STAT = 100e-6  # seconds
KEYS_VERSION = 1  # goes up whenever the same content would get other keys
BATCH_BYTES = 4 * 2**20
ROWS_AT_A_TIME = 256
# Of names one below the other: a part that is empty, `.` or `..`.
_ODD_PART = re.compile(r"[/\n]\.{0,2}(?=[/\n])")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MEMBER_SCHEMA = pa.schema(
    [
        ("basename_hash", pa.uint64()),  # the order of the index: millions of names are looked up at every start
        ("basename", pa.string()),
        ("archive", pa.string()),
        ("member", pa.string()),
        ("crc", pa.uint32()),
        ("size", pa.int64()),
    ]
)


@dataclass(frozen=True, eq=False)
class Source:
    """Pickles as paths: a spawned worker maps the same files."""

    name: str
    spec: SourceSpec
    rows: Dataset  # formatted as arrow, so that images stay encoded
    converted: bool  # rows follow ROW_SCHEMA, JSON text inside; otherwise they are the table's own
    images: ImageFinder
    files: tuple[str, ...]  # the data files on disk; none for rows from the Hub
    revision: str | None = None  # the Hub's commit

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, i: int) -> Sample:
        """Row i, checked. Raises BadSample."""
        return self._sample(self.rows[i].to_pylist()[0], i, self.images.find)

    def row_id(self, i: int) -> str:
        """The id of row i; of a row without one, its place."""
        stored = self.rows[i].to_pylist()[0]
        return (stored["id"] if self.converted else row_id(stored, self.spec)) or f"row {i}"

    def content_keys(self, rows: int, cache_dir: Path) -> list[tuple[str, str]]:
        """Of every `rows` rows, sha256 over what their samples are made from: spec, rows, names and sizes (or CRCs) of
        their images. The second of each pair is of the images' times as well: it changes with an image that was
        replaced by one of its size, but also with one that was only copied.

        Where all images lie in archives, the keys are kept in `cache_dir` while the data file, the archives and the
        names in the folders beside them stay the same: a million images take ten seconds.
        """
        files = [file["filename"] for file in self.rows.cache_files]
        kept = cache_dir / "keys" / f"{_key((KEYS_VERSION, files, self.images.members, self._spec_json(), rows))}.json"
        keeps = self.converted and self.images.members is not None
        if keeps and (saved := _kept_keys(kept)) is not None:
            return saved
        keys: list[tuple[str, str]] = []
        beside: dict[str, set[str]] | None = {}
        for start in range(0, len(self), rows):
            content, timed, folders = self._content_keys(start, min(start + rows, len(self)))
            keys.append((content, timed))
            few = beside is not None and len(beside) < FEW_FILES
            beside = beside | folders if few and folders is not None else None
        if keeps and beside is not None:
            with _replacing(kept) as temporary:
                folders = {folder: sorted(names) for folder, names in beside.items()}
                temporary.write_text(json.dumps({"folders": folders, "keys": keys}))
        return keys

    def _spec_json(self) -> str:
        return self.spec.model_dump_json(exclude=set(OPERATIONAL_SOURCE_KEYS))

    def _content_keys(self, start: int, stop: int) -> tuple[str, str, dict[str, set[str]] | None]:
        """Both keys of these rows, and `Stamps.beside`."""
        digest = hashlib.sha256(self._spec_json().encode())
        if self.converted:
            table = self.rows[start:stop]
            rows, lists = (table[name].combine_chunks() for name in ("row", "images"))
            digest.update(pc.binary_length(rows).to_numpy(zero_copy_only=False))
            digest.update(_joined(rows))
            digest.update(pc.list_value_length(lists).to_numpy(zero_copy_only=False))
            names = lists.flatten().to_pylist()
        else:
            names = []
            for stored in self._stored(start, stop):
                digest.update(json.dumps(stored, default=_digest_of_bytes).encode() + b"\n")
                names += _row_images(stored, self.spec)
        stamps = self.images.stamps(names)
        digest.update("\0".join([*names, *stamps.sizes]).encode(errors="backslashreplace"))
        timed = digest.copy()
        timed.update("\0".join(stamps.times).encode())
        return digest.hexdigest(), timed.hexdigest(), stamps.beside

    def texts(self) -> Iterator[str]:
        """The text of every message, in order. Rows that make no sample are left out: preparation reports those."""
        for i, stored in enumerate(self._stored(0, len(self))):
            try:
                sample = self._sample(stored, i, lambda name: ImageRef(path=name))
            except BadSample:
                continue
            yield from (message.content for message in sample.messages)

    def record(self, cache_dir: Path) -> dict[str, Any]:
        """What the run record says of this source. Reads the data files once, for their checksums.

        Raises UserError for a file that changed behind its size and time, by which what was read of it is found again.
        """
        return {
            "adapter": self.spec.adapter,
            "hub_id": self.spec.hub_id,
            "revision": self.revision,
            "path": self.spec.path,
            "sha256": {Path(file).name: _unchanged(Path(file), cache_dir) for file in self.files},
            "rows": len(self),
            "synthetic": self.spec.adapter == "phantom",
        }

    def _sample(self, stored: dict[str, Any], i: int, find_image: Callable[[str], ImageRef]) -> Sample:
        if self.converted:
            if stored["problem"]:
                raise BadSample(f"row {i}", "malformed_row", stored["problem"])
            stored = json.loads(stored["row"])
        sample = adapt(stored, self.name, self.spec, find_image, i)
        check_sample(sample)
        return sample

    def _stored(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        for first in range(start, stop, ROWS_AT_A_TIME):
            yield from self.rows[first : min(first + ROWS_AT_A_TIME, stop)].to_pylist()


@dataclass(frozen=True)
class ImageFinder:
    """Image name -> where its bytes are: a file under `root`, or a member of a zip archive that lies in it."""

    root: str | None
    members: str | None = None  # the index of the archives' members, an Arrow file
    # PubMedVision's own instructions unpack all archives into one folder without their paths.
    by_basename: bool = False

    def find(self, name: str) -> ImageRef:
        """A name that is nowhere comes back as the file it should be, for whoever opens it to report.

        Raises ImageNameError for a name that leaves the folder, UserError where archives do not tell which is meant.
        """
        if _leaves_its_folder(name):
            raise ImageNameError(
                f"names {name!r}, which leaves the folder of the images; write it relative to image_root"
            )
        if self.root is None:
            raise UserError(
                f"rows name image files ({name!r}) but there is no image_root; set it to the folder that holds them"
            )
        for path in self._paths(name):
            if os.path.isfile(path):
                return ImageRef(path=path)
        member = self._member(name)
        if member is not None:
            return ImageRef(archive=os.path.join(self.root, member.archive), member=member.name)
        return ImageRef(path=os.path.join(self.root, name))

    def stamps(self, names: Sequence[str]) -> Stamps:
        """What changes with the image of each name."""
        if self.root is None:
            return Stamps(["missing"] * len(names), [""] * len(names))
        folders: dict[str, set[str] | None] = {}
        if self._none_is_a_file(names, folders):
            return Stamps(self._member_stamps(names), [""] * len(names), folders)
        stamps = self._file_stamps(names, folders)
        elsewhere = [place for place, stamp in enumerate(stamps) if stamp is None]
        members = self._member_stamps([names[place] for place in elsewhere])
        for place, stamp in zip(elsewhere, members, strict=True):
            stamps[place] = (stamp, "")
        return Stamps([size for size, _ in stamps], [time for _, time in stamps])

    def _paths(self, name: str) -> tuple[str, ...]:
        path = f"{self.root}/{name}"
        return (path, f"{self.root}/{name.rpartition('/')[2]}") if self.by_basename else (path,)

    def _none_is_a_file(self, names: Sequence[str], folders: dict[str, set[str] | None]) -> bool:
        """Whether folders that hold few files, and none of these names, tell so at once, as beside archives."""
        if not _all_plain(names):
            return False
        parts = [name.rpartition("/") for name in names]
        within = {folder for folder, _, _ in parts} | ({""} if self.by_basename else set())
        paths = (f"{self.root}/{folder}" if folder else self.root for folder in within)
        folders |= {path: _listing(path) for path in paths}
        if None in folders.values():
            return False
        files = set().union(*folders.values())
        return files.isdisjoint(basename for _, _, basename in parts)

    def _file_stamps(self, names: Sequence[str], folders: dict[str, set[str] | None]) -> list[tuple[str, str] | None]:
        """Size and time of each name that is a file, "refused" of one that leaves the folder, None of others."""
        began = time.perf_counter()
        stamps = [self._file_stamp(name, folders) for name in names[:STAT_THREADS]]
        rest = names[STAT_THREADS:]
        if time.perf_counter() - began < SLOW_STAT * STAT_THREADS:
            return stamps + [self._file_stamp(name, folders) for name in rest]
        # Over a network it is all waiting; on a disk of this machine threads would only wait for each other.
        with ThreadPoolExecutor(STAT_THREADS) as threads:
            return stamps + list(threads.map(lambda name: self._file_stamp(name, folders), rest))

    def _file_stamp(self, name: str, folders: dict[str, set[str] | None]) -> tuple[str, str] | None:
        if _leaves_its_folder(name):
            return "refused", ""
        for path in self._paths(name):
            folder, _, basename = path.rpartition("/")
            if folder not in folders:
                folders[folder] = _listing(folder)
            there = folders[folder]
            if there is not None and basename not in there:
                continue
            try:
                status = os.stat(path)
            except (OSError, ValueError):  # not there, or a name that no file system takes
                continue
            if stat.S_ISREG(status.st_mode):
                return str(status.st_size), str(status.st_mtime_ns)
        return None

    def _member(self, name: str) -> _Member | None:
        """The member that a name means; None where the archives hold none."""
        if self.members is None:
            return None
        name = os.path.normpath(name)
        basename = name.rpartition("/")[2]
        table = _map_table(self.members)
        order = table["basename_hash"].chunk(0).to_numpy()
        wanted = _hashes([basename])[0]
        first, end = (int(np.searchsorted(order, wanted, side)) for side in ("left", "right"))
        rows = table.slice(first, end - first)
        found = map(_Member, *(rows[key].to_pylist() for key in ("archive", "member", "crc", "size")))
        return self._meant(name, [m for m in found if m.name.rpartition("/")[2] == basename])

    def _member_stamps(self, names: Sequence[str]) -> list[str]:
        """The stamps of the members that names mean, column by column: a start asks about every image."""
        table = MEMBER_SCHEMA.empty_table() if self.members is None else _map_table(self.members)
        if len(table) == 0 or not names:
            return ["missing"] * len(names)
        if not _all_plain(names):
            names = [os.path.normpath(name) for name in names]
        order = table["basename_hash"].chunk(0).to_numpy()
        basenames = [name.rpartition("/")[2] for name in names]
        wanted = _hashes(basenames)
        ascending = np.argsort(wanted)  # neighbours lie near in the index
        first = np.empty(len(wanted), dtype=np.int64)
        first[ascending] = np.searchsorted(order, wanted[ascending])
        at, behind = (np.minimum(place, len(order) - 1) for place in (first, first + 1))
        rows = table.take(at)
        # Almost every name in a million has one candidate, its own.
        meant = (order[at] == wanted) & ((order[behind] != wanted) | (behind == at))
        meant &= [found == basename for found, basename in zip(rows["basename"].to_pylist(), basenames, strict=True)]
        if not self.by_basename:
            meant &= [
                f"/{member}".endswith(f"/{name}")
                for member, name in zip(rows["member"].to_pylist(), names, strict=True)
            ]
        crcs, sizes = (rows[key].cast(pa.string()) for key in ("crc", "size"))
        stamps = pc.binary_join_element_wise(crcs, sizes, ":").to_pylist()
        for place in np.flatnonzero(~meant).tolist():
            stamps[place] = _stamp(self._member(names[place]))
        return stamps

    def _meant(self, name: str, found: Sequence[_Member]) -> _Member | None:
        """found: the members of its basename."""
        in_full = [member for member in found if f"/{member.name}".endswith(f"/{name}")]
        candidates = in_full or (found if self.by_basename else [])
        if len({(member.crc, member.size) for member in candidates}) > 1:
            places = ", ".join(f"{member.archive}!{member.name}" for member in candidates[:3])
            raise UserError(
                f"the archives in {self.root} hold {len(candidates)} different pictures for the name {name!r} "
                f"({places}); unpack the right one beside them, or keep each data set's archives in a folder of its own"
            )
        return candidates[0] if candidates else None


class Stamps(NamedTuple):
    """Of each image name, what changes with its image."""

    sizes: list[str]  # size of a file, CRC and size of a member, "missing", "refused"
    times: list[str]  # of a file
    beside: dict[str, set[str]] | None = None  # the names in the folders that were asked, where none is an image's


class _Member(NamedTuple):
    archive: str
    name: str
    crc: int
    size: int


def open_source(name: str, spec: SourceSpec, cache_dir: Path) -> Source:
    """The source `name` of a recipe. Raises UserError for files that are not there, broken or ambiguous.

    The first opening may stream a large file into `cache_dir`: let one process open it before the others do.
    """
    try:
        return _open(name, spec, Path(cache_dir).absolute())
    except UserError as error:
        raise type(error)(f"data.{name}: {error}") from None


def ensure_made(spec: SourceSpec, cache_dir: Path) -> None:
    """Makes a phantom source's data, unless it is there. For one process only; other sources have nothing to make."""
    if spec.adapter != "phantom":
        return
    make_phantom(Path(cache_dir).absolute(), **_phantom_arguments(spec))


def _open(name: str, spec: SourceSpec, cache_dir: Path) -> Source:
    from datasets import Dataset

    revision = None
    files: tuple[Path, ...] = ()
    root = Path(spec.image_root).expanduser().absolute() if spec.image_root else None
    if spec.hub_id is not None:
        rows, revision = _hub_rows(spec)
    else:
        files = _data_files(spec, cache_dir)
        root = root or files[0].parent
        if files[0].suffix in TABLE_SUFFIXES:
            rows = _table_rows(files, cache_dir)
        else:
            rows = Dataset.from_file(str(_converted(files[0], spec, cache_dir)))
    if root is not None and not root.is_dir():
        raise OutOfReach(f"image_root {root} is not a folder; correct it or download the images")
    if len(rows) == 0:
        raise UserError(f"{spec.hub_id or files[0]} holds no rows")
    images = ImageFinder(
        root=None if root is None else str(root),
        members=None if root is None else _member_index(root, cache_dir),
        by_basename=spec.adapter == "pubmedvision",
    )
    converted = bool(files) and files[0].suffix not in TABLE_SUFFIXES
    return Source(name, spec, rows.with_format("arrow"), converted, images, tuple(map(str, files)), revision)


def _data_files(spec: SourceSpec, cache_dir: Path) -> tuple[Path, ...]:
    if spec.adapter == "phantom":
        # The descriptions' files are named as their configurations.
        file_name = f"{PUBMEDVISION_CONFIGS.get(spec.config, spec.config)}.json"
        file = phantom_folder(cache_dir, **_phantom_arguments(spec)) / file_name
        if not file.is_file():
            raise UserError(f"the phantom data is not made yet: {file} does not exist; ensure_made() makes it first")
        return (file,)
    path = Path(spec.path).expanduser().absolute()
    if path.is_file() and path.suffix in DATA_SUFFIXES:
        return (path,)
    if path.is_file():
        raise UserError(f"{path} is not a data file by its name; expected one that ends in {', '.join(DATA_SUFFIXES)}")
    if not path.is_dir():
        raise OutOfReach(f"path {path} does not exist; correct it or download the data")
    usual = "samples.jsonl"
    if spec.adapter == "pubmedvision":
        usual = f"{PUBMEDVISION_CONFIGS[spec.config]}.json"
    if (path / usual).is_file():
        return (path / usual,)
    found = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in DATA_SUFFIXES)
    # Shards of one table; any other several files may be several data sets.
    if found and all(file.suffix == ".parquet" for file in found):
        return tuple(found)
    if len(found) == 1 and spec.adapter != "pubmedvision":
        return tuple(found)
    names = ", ".join(file.name for file in found[:8]) or "no data file"
    raise UserError(f"the folder {path} holds {names}; expected {usual}, or set path to the file that is meant")


def _phantom_arguments(spec: SourceSpec) -> dict[str, int]:
    return {"train": spec.train, "test": spec.test or 0, "seed": spec.seed or 0}


def _hub_rows(spec: SourceSpec) -> tuple[Dataset, str | None]:
    """Rows from the Hub and the commit that `revision` stood for, by datasets' own cache."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    config = PUBMEDVISION_CONFIGS[spec.config] if spec.adapter == "pubmedvision" else None
    try:
        builder = load_dataset_builder(spec.hub_id, name=config, revision=spec.revision)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=spec.split)
    except (OSError, ValueError, DatasetsError) as error:
        raise OutOfReach(
            f"{spec.hub_id} (revision {spec.revision or 'main'}, split {spec.split}) cannot be loaded from the Hub: "
            f"{_brief(error)}; check the name, your access (hf auth login) and the connection"
        ) from None
    commit = builder.hash if builder.hash and len(builder.hash) == 40 else None
    return rows, commit


def _table_rows(files: tuple[Path, ...], cache_dir: Path) -> Dataset:
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    names = [str(file) for file in files]
    cache = str(cache_dir / "tables")
    try:
        if files[0].suffix == ".csv":
            # "None" and "NA" are answers, not gaps.
            return Dataset.from_csv(names, cache_dir=cache, keep_default_na=False)
        return Dataset.from_parquet(names, cache_dir=cache)
    except (OSError, ValueError, DatasetsError) as error:
        shown = f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        kind = "CSV" if files[0].suffix == ".csv" else "Parquet"
        why = _brief(error.__cause__ or error)
        raise UserError(f"{shown} cannot be read as {kind} ({why}); copy it again") from None


def _converted(path: Path, spec: SourceSpec, cache_dir: Path) -> Path:
    """The JSON file's rows as an Arrow file under `cache_dir`, made on first use and again when the file changes."""
    status = path.stat()
    # Ids and image names are taken by the adapter; nothing else in the spec changes the rows.
    columns = (spec.columns.id, spec.columns.image)
    parts = (CONVERSION_VERSION, str(path), status.st_size, status.st_mtime_ns, spec.adapter, *columns)
    target = cache_dir / "rows" / f"{path.stem}-{_key(parts)}.arrow"
    if target.exists():
        return target
    read = _json_lines if path.suffix == ".jsonl" else _json_array
    with (
        _replacing(target) as temporary,
        _reading(path) as file,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, ROW_SCHEMA) as writer,
    ):
        batch: list[tuple[bytes, str, list[str], str | None]] = []
        size = 0
        for text, value, problem in read(path, file):
            identity = row_id(value, spec) if isinstance(value, dict) else ""
            names = [name.encode(errors="replace").decode() for name in _row_images(value, spec)]
            batch.append((text, identity, names, problem))
            size += len(text)
            if size >= BATCH_BYTES:
                writer.write_batch(_row_batch(batch))
                batch, size = [], 0
        writer.write_batch(_row_batch(batch))
    return target


def _row_batch(rows: list[tuple[bytes, str, list[str], str | None]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else ((),) * len(ROW_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ROW_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=ROW_SCHEMA)


def _json_array(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, object, str | None]]:
    """Each row of a JSON array as (text, value, problem), never more than one in memory."""
    size = path.stat().st_size
    head = file.read(64)
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    if start != b"[":
        got = f"begins with {start.decode(errors='replace')!r}" if start else "is empty"
        raise UserError(
            f"{path} {got}; expected a JSON array of rows, [{{...}}, ...] (the name of JSON Lines ends in .jsonl)"
        )
    file.seek(len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0)
    count = 0
    try:
        for value in ijson.items(file, "item", use_float=True, buf_size=2**20):
            count += 1
            yield json.dumps(value, ensure_ascii=False).encode(errors="replace"), value, None
    except ijson.JSONError as error:
        if file.tell() == size and ("premature EOF" in str(error) or "Incomplete JSON" in str(error)):
            raise UserError(
                f"{path} ends in the middle of its JSON array, after {count:,} whole rows, at byte {size:,}; "
                "download it again"
            ) from None
        raise UserError(
            f"{path} is not JSON after row {count:,}, before byte {file.tell():,} ({_brief(error)}); download it again"
        ) from None


def _json_lines(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, object, str | None]]:
    """Each line as (text, value, problem): a line that is not JSON is a row with a problem. Blank lines are none."""
    for number, line in enumerate(file, start=1):
        text = (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).strip()
        if not text:
            continue
        try:
            yield text, json.loads(text.decode()), None
        except (ValueError, RecursionError) as error:
            yield (
                text,
                None,
                f"line {number} of {path.name} is not JSON ({_brief(error)}); correct or download it again",
            )


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The file, with a progress bar by bytes while it is read."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        progress.open(path, "rb", description=f"reading {path.name} once") as file,
    ):
        yield file


def _member_index(root: Path, cache_dir: Path) -> str | None:
    """An Arrow file of all members of the zip archives in `root`, ordered by basename; None where there is none."""
    archives = sorted(root.glob("*.zip"))
    if not archives:
        return None
    stats = [(archive.name, archive.stat().st_size, archive.stat().st_mtime_ns) for archive in archives]
    target = cache_dir / "members" / f"{_key((MEMBERS_VERSION, str(root), stats))}.arrow"
    if not target.exists():
        table = pa.concat_tables([_members(archive) for archive in archives])
        table = table.sort_by([(key, "ascending") for key in ("basename_hash", "basename", "archive", "member")])
        with (
            _replacing(target) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, MEMBER_SCHEMA) as writer,
        ):
            # One batch, so that a look-up is one binary search.
            columns = [column.combine_chunks() for column in table.columns]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=MEMBER_SCHEMA))
    return str(target)


def _members(archive: Path) -> pa.Table:
    try:
        with zipfile.ZipFile(archive) as opened:
            infos = [info for info in opened.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{archive} is not a whole zip archive ({_brief(error)}); download it again") from None
    rows = [(PurePosixPath(i.filename).name, archive.name, i.filename, i.CRC, i.file_size) for i in infos]
    columns = list(zip(*rows, strict=True)) if rows else [()] * (len(MEMBER_SCHEMA) - 1)
    columns = [_hashes(columns[0]), *columns]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, MEMBER_SCHEMA, strict=True)], schema=MEMBER_SCHEMA)


def _hashes(names: Sequence[str]) -> np.ndarray:
    """(N,) uint64, the same on every machine and in every process."""
    encoded = (name.encode(errors="surrogatepass") for name in names)
    return np.fromiter(map(xxhash.xxh64_intdigest, encoded), np.uint64, len(names))


def _joined(rows: pa.BinaryArray) -> memoryview:
    """All values one after another, where they lie."""
    _, offsets, data = rows.buffers()
    at = np.frombuffer(offsets, np.int32)[rows.offset : rows.offset + len(rows) + 1]
    return memoryview(data)[at[0] : at[-1]]


def _listing(folder: str) -> set[str] | None:
    """The names in a folder that holds few, so that images which lie in archives need not be asked for one by one."""
    try:
        with os.scandir(folder) as entries:
            names = {entry.name for entry in itertools.islice(entries, FEW_FILES + 1)}
    except (OSError, ValueError):
        return set()
    return names if len(names) <= FEW_FILES else None


def _kept_keys(path: Path) -> list[tuple[str, str]] | None:
    """The keys that were kept, where the folders hold what they held then."""
    try:
        saved = json.loads(path.read_text())
        same = all(_listing(folder) == set(names) for folder, names in saved["folders"].items())
        return [(content, timed) for content, timed in saved["keys"]] if same else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not there, or damaged
        return None


def _stamp(member: _Member | None) -> str:
    return "missing" if member is None else f"{member.crc}:{member.size}"


def _all_plain(names: Sequence[str]) -> bool:
    """Whether no name is absolute or has an empty part, `.` or `..`: none leaves its folder, none can be shortened."""
    return _ODD_PART.search("\n".join(["", *names, ""])) is None


def _leaves_its_folder(name: str) -> bool:
    return name.startswith("/") or (".." in name and ".." in name.split("/"))


@lru_cache(maxsize=16)
def _map_table(path: str) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(path)).read_all()


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that takes its place when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _row_images(row: object, spec: SourceSpec) -> list[str]:
    """The image names of a row of any shape."""
    values = row_images(row, spec) if isinstance(row, dict) else []
    paths = (value.get("path") if isinstance(value, dict) and value.get("bytes") is None else value for value in values)
    return [path for path in paths if isinstance(path, str)]


def _key(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _digest_of_bytes(value: object) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _unchanged(path: Path, cache_dir: Path) -> str:
    """The file's sha256, which is kept in `cache_dir` under the size and time that it was first recorded with."""
    status, digest = path.stat(), _sha256(path)
    kept = cache_dir / "sha256" / _key((str(path), status.st_size, status.st_mtime_ns))
    if not kept.exists():
        with _replacing(kept) as temporary:
            temporary.write_text(digest)
    elif kept.read_text() != digest:
        raise UserError(
            f"{path} has the size and time of an earlier reading but other content, so its old rows would be used; "
            f"touch {path} and start again"
        )
    return digest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
