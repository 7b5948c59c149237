"""Volumes as a source: NIfTI files and folders of DICOM series, of each of which a few slices are taken.

Which slices: those that a lesion is marked on, where one is; else `ingest.slices` of them, evenly spaced. Marks are

    <name>_mask.nii.gz (or masks/<name>.nii.gz)    a NIfTI mask of the volume's shape, not 0 where the lesion is
    lesions.csv                                    columns volume, slice (from 0), and, if known, x0, y0, x1, y1

A NIfTI volume is cut across its thickest spacing, which is how it was acquired, and shown as radiologists see it: the
patient's right on the left of the picture, front or head on top. A DICOM series is put in order by position.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pydicom
from fsspec import AbstractFileSystem
from PIL import Image

from data.config import Source
from data.sources.dicom import READ_ERRORS, is_dicom, windowed
from data.sources.files import FolderFiles, TooLarge, UnsafeName
from data.sources.found import Found, FoundRows, Note, slug
from data.sources.pairs import box_sentence
from data.tables import Dropped, Pair
from huatuo_vision.schema import BadSample, UserError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
LESIONS_FILE = "lesions.csv"
# Files without a suffix that lie beside DICOM files and are none of its slices.
_NO_SLICES = ("DICOMDIR", "LICENSE", "README")
# Of a volume's values, what becomes black and white where no window is given.
_DARKEST, _BRIGHTEST = 0.5, 99.5  # percent
_MOST_BYTES = 4 * 2**30

Boxes = Mapping[int, Sequence[tuple[int, ...]]]  # slice -> boxes on it; none where only the slice is known


@dataclass(frozen=True, slots=True)
class _Slices:
    """A volume as a stack: how many slices, the picture of each, and those that a lesion is marked on."""

    count: int
    picture: Callable[[int], bytes]
    marked: Boxes
    notes: tuple[str, ...] = ()


def list_volumes(fs: AbstractFileSystem, root: str, settings: Source) -> Iterator[dict[str, str]]:
    """One unit a NIfTI file or folder of DICOM files, relative to `root`; masks are none of their own."""
    prefix = len(root.rstrip("/")) + 1
    folders: set[str] = set()
    for path in sorted(fs.find(root)):
        name = path[prefix:]
        place = PurePosixPath(name)
        if any(part.startswith(".") for part in place.parts):
            continue
        if name.lower().endswith(NIFTI_SUFFIXES):
            if not (_stem(name).endswith("_mask") or place.parent.name == "masks"):
                yield {"nifti": name}
        elif _may_be_slice(place) and place.parent.as_posix() not in folders:
            folders.add(place.parent.as_posix())
            yield {"series": place.parent.as_posix()}


def read_unit(fs: AbstractFileSystem, root: str, unit: Mapping[str, str], settings: Source) -> FoundRows:
    """A row for each slice taken of the volume."""
    files = FolderFiles(fs, root)
    where = unit.get("nifti") or unit["series"]
    name = slug(_stem(where) if "nifti" in unit else where.strip(".") or root.rsplit("/", 1)[-1])
    if not settings.licence:
        yield Dropped(name, "no_licence", "volumes name no licence; set the source's licence")
        return
    marks = _lesions(fs, root.rstrip("/")).get(where, {})
    try:
        volumes = (
            _nifti(files, where, name, marks, settings) if "nifti" in unit else _series(files, fs, where, name, marks)
        )
        for id_, volume in volumes.items():
            yield from _rows(id_, name, volume, settings)
    except BadSample as error:
        yield Dropped(error.sample_id, error.reason, error.explanation)


def _rows(id_: str, article: str, volume: _Slices, settings: Source) -> FoundRows:
    yield Note("volumes")
    for note in volume.notes:
        yield Note(note)
    if volume.count == 1:
        yield Note("volumes_of_one_slice")
    marked = sorted(volume.marked)
    if marked and (marked[0] < 0 or marked[-1] >= volume.count):
        yield Dropped(id_, "lesion_outside", f"a lesion is marked on slice {marked[-1]} of {volume.count} (from 0)")
        return
    if marked:
        yield Note("volumes_with_lesions")
    candidates = marked or range(volume.count)
    for place in evenly(len(candidates), settings.slices):
        number = candidates[place]
        boxes = volume.marked.get(number, ())
        pair = Pair(
            id=f"{id_}_{number:04d}",
            image_ids=(),
            caption=f"Slice {number + 1} of {volume.count}{', on which a lesion is marked' if marked else ''}.",
            context=(box_sentence(boxes),) if boxes else (),
            sections=("boxes",) if boxes else (),
            label="",
            article=article,
            title="",
            figure=str(number),
            licence=settings.licence or "",
            source=settings.source or "",
            modality=settings.modality,
        )
        yield Found(pair, (partial(volume.picture, number),))


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places, the middles of as many equal parts; all of them where there are no more."""
    if count <= wanted:
        return list(range(count))
    return [int((k + 0.5) * count / wanted) for k in range(wanted)]


# NIfTI ---------------------------------------------------------------------------------------------------------------


def _nifti(files: FolderFiles, path: str, name: str, marks: Boxes, settings: Source) -> dict[str, _Slices]:
    """Raises BadSample: unreadable_volume, not_a_volume, mask_mismatch, image_too_large."""
    values, axis = _load(files, path, name)
    notes: tuple[str, ...] = ()
    mask = _mask(files, path, name, values.shape)
    if mask is not None and not marks:
        carries = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))).tolist()
        marks = {number: [_box_of(_plane(mask, axis, number))] for number in carries}
        notes = () if carries else ("empty_masks",)
    if settings.window is not None:
        centre, width = settings.window
    else:
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise BadSample(name, "not_a_volume", "none of its values is a number")
        low, high = np.percentile(finite, (_DARKEST, _BRIGHTEST))
        centre, width = (low + high) / 2, max(high - low, 1e-6)

    def picture(number: int) -> bytes:
        plane = np.nan_to_num(_plane(values, axis, number).astype(np.float64))
        buffer = io.BytesIO()
        Image.fromarray(windowed(plane, centre, width, "LINEAR_EXACT")).save(buffer, "PNG")
        return buffer.getvalue()

    return {name: _Slices(values.shape[axis], picture, marks, notes)}


def _load(files: FolderFiles, path: str, name: str) -> tuple[np.ndarray, int]:
    """Values along right, anterior, superior, and the axis that is cut across.

    Raises BadSample: unreadable_volume, not_a_volume, image_too_large.
    """
    import nibabel

    broken = (OSError, EOFError, ValueError, OverflowError, zlib.error)
    broken += (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)
    broken += (nibabel.wrapstruct.WrapStructError,)  # too short for a header
    try:
        data = files.read(path)
        packed = data[:2] == b"\x1f\x8b"
        stream = gzip.GzipFile(fileobj=io.BytesIO(data)) if packed else io.BytesIO(data)
        unpacked = stream.read(_MOST_BYTES + 1)
        image = nibabel.Nifti1Image.from_bytes(unpacked)
        if len(unpacked) > _MOST_BYTES or 8 * math.prod(image.shape) > _MOST_BYTES:
            raise TooLarge(f"{path} takes more than {_MOST_BYTES:,} bytes in memory")
        return _oriented(image, name)
    except BadSample:
        raise
    except TooLarge as error:
        raise BadSample(name, "image_too_large", str(error)) from None
    except broken as error:
        said = " ".join(str(error).split())[:200]
        raise BadSample(name, "unreadable_volume", f"{path} can't be read as NIfTI ({said}); copy it again") from None


def _oriented(image: Any, name: str) -> tuple[np.ndarray, int]:
    """Raises BadSample: not_a_volume."""
    import nibabel

    image = nibabel.squeeze_image(image)  # of (X, Y, Z, 1)
    if len(image.shape) == 2:
        raise BadSample(name, "not_a_volume", "the NIfTI file holds a single picture; store it as PNG in kind: pairs")
    if len(image.shape) != 3:
        raise BadSample(
            name, "not_a_volume", f"the NIfTI file has the shape {image.shape}; store each phase or channel by itself"
        )
    if image.get_data_dtype().kind not in "biuf":
        raise BadSample(name, "not_a_volume", f"its values are {image.get_data_dtype()}; expected one number each")
    image = nibabel.as_closest_canonical(image)
    spacing = [round(float(zoom), 3) for zoom in image.header.get_zooms()]
    thickest = max(spacing)
    axis = 2 if spacing[2] == thickest else spacing.index(thickest)
    if 1 in image.shape:  # a stack of one
        axis = image.shape.index(1)
    return np.asanyarray(image.dataobj), axis


def _plane(values: np.ndarray, axis: int, number: int) -> np.ndarray:
    """A slice with front or head on top, and the patient's right (or front, if seen from the side) on the left."""
    return np.take(values, number, axis)[::-1, ::-1].T


def _mask(files: FolderFiles, path: str, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    place = PurePosixPath(path)
    stem = PurePosixPath(_stem(path)).name
    for candidate in (place.with_name(f"{stem}_mask"), place.parent / "masks" / stem):
        for suffix in NIFTI_SUFFIXES:
            mask = f"{candidate}{suffix}"
            if files.fs.exists(f"{files.folder.rstrip('/')}/{mask}"):
                values, _ = _load(files, mask, name)
                if values.shape != shape:
                    said = f"{mask} has the shape {values.shape}, its volume {shape}"
                    raise BadSample(name, "mask_mismatch", f"{said}; both must be of one grid")
                return np.nan_to_num(values) != 0
    return None


def _box_of(plane: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# DICOM ---------------------------------------------------------------------------------------------------------------


def _series(files: FolderFiles, fs: AbstractFileSystem, folder: str, name: str, marks: Boxes) -> dict[str, _Slices]:
    """The series of a folder; several are told apart by number. Raises BadSample: unreadable_volume."""
    base = f"{files.folder.rstrip('/')}/{folder}" if folder != "." else files.folder.rstrip("/")
    series: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for path in sorted(fs.ls(base, detail=False)):
        inside = path[len(files.folder.rstrip("/")) + 1 :]
        if not _may_be_slice(PurePosixPath(inside)) or not fs.isfile(path):
            continue
        with fs.open(path, "rb") as file:
            head = file.read(132)
            if not is_dicom(head):
                continue
            file.seek(0)
            try:
                tags = pydicom.dcmread(file, stop_before_pixels=True)
                series[str(tags.get("SeriesInstanceUID", ""))].append((_position(tags), inside))
            except READ_ERRORS as error:
                said = " ".join(str(error).split())[:120]
                raise BadSample(
                    name, "unreadable_volume", f"{PurePosixPath(inside).name} can't be read ({said})"
                ) from None
    if not series:
        raise BadSample(name, "unreadable_volume", "the folder holds no DICOM file")
    found = {}
    for number, (_, members) in enumerate(sorted(series.items()), start=1):
        ordered = [inside for _, inside in sorted(members)]
        id_ = name if len(series) == 1 else f"{name}-{number}"
        found[id_] = _Slices(len(ordered), partial(_dicom_slice, files, ordered, id_), marks if number == 1 else {})
    return found


def _may_be_slice(path: PurePosixPath) -> bool:
    """By its name: many are called by a number alone (1.2.840.113619), which looks like a suffix."""
    suffix = path.suffix.lower()
    return path.name not in _NO_SLICES and (suffix in (".dcm", ".ima", "") or suffix[1:].isdigit())


def _dicom_slice(files: FolderFiles, ordered: Sequence[str], owner: str, number: int) -> bytes:
    try:
        return files.read(ordered[number])
    except (FileNotFoundError, UnsafeName, TooLarge) as error:
        raise BadSample(owner, "missing_image", f"slice {number}: {error}") from None


def _position(tags: pydicom.Dataset) -> float:
    """Where the slice lies along the stack: millimetres, or its number where no position is given."""
    where, turned = tags.get("ImagePositionPatient"), tags.get("ImageOrientationPatient")
    if where is not None and turned is not None and len(where) == 3 and len(turned) == 6:
        along = np.cross(np.array(turned[:3], float), np.array(turned[3:], float))
        return float(np.dot(along, np.array(where, float)))
    return float(tags.get("InstanceNumber") or 0)


# Marks ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _lesions(fs: AbstractFileSystem, root: str) -> dict[str, dict[int, list[tuple[int, ...]]]]:
    """Volume -> slice -> boxes. Raises UserError for a file of another form."""
    path = f"{root}/{LESIONS_FILE}"
    marks: dict[str, dict[int, list[tuple[int, ...]]]] = defaultdict(dict)
    if not fs.exists(path):
        return marks
    try:
        text = fs.cat_file(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{LESIONS_FILE} is not UTF-8; save it as UTF-8") from None
    for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2):
        try:
            boxes = marks[row["volume"].strip()].setdefault(int(row["slice"]), [])
            corners = [row.get(key) or "" for key in ("x0", "y0", "x1", "y1")]
            if any(corners):
                boxes.append(tuple(round(float(corner)) for corner in corners))
        except (KeyError, ValueError, TypeError, AttributeError):
            raise UserError(
                f"{LESIONS_FILE}, line {number}: {row}; expected volume, slice (from 0) and perhaps x0, y0, x1, y1"
            ) from None
    if marks and not any(fs.exists(f"{root}/{volume}") for volume in marks):
        raise UserError(
            f"{LESIONS_FILE} names {next(iter(marks))!r} and {len(marks) - 1} others, none of which is beside it; "
            "expected the paths of volumes from there, with their endings"
        )
    return marks


def _stem(path: str) -> str:
    return path.removesuffix(".gz").removesuffix(".nii")
