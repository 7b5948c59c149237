"""ImageRef -> the RGB picture that the model sees, or BadSample naming the sample and what is wrong with its image.

Every picture is decoded in full by Pillow at its stored size: no draft mode, no tolerance for truncated files. What
is legitimate but unusual (a rotated photo, CMYK, 16 bits) is converted and noted, never passed over in silence.
"""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import attrgetter
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from huatuo_vision.schema import BadSample, ImageRef

MAX_IMAGE_PIXELS = 100_000_000
# Padding to a square squares the longer side, so a thin strip would otherwise be a bomb of its own.
MAX_IMAGE_SIDE = 20_000
# The most that is read into memory: the largest picture allowed above, uncompressed, with room to spare.
MAX_ENCODED_BYTES = 512 * 2**20
# Blank bitmaps do compress a thousandfold, so the ratio counts only where the result is large.
MAX_ZIP_RATIO = 100
LARGE_ZIP_MEMBER = 32 * 2**20

# What data sets of medical figures hold. Pillow's other formats include some that start programs (EPS).
FORMATS = ("JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "JPEG2000")
HIGH_DEPTH_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
# Modes that Pillow converts to RGB without loss of meaning, and the word that a report counts them under.
CONVERTED_MODES = {"1": "1bit", "CMYK": "cmyk", "P": "palette", "YCbCr": "ycbcr", "HSV": "hsv", "RGBX": "rgbx"}

# Pillow's readers let their parsers' errors through: damaged files raise all of these.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    struct.error,
    zlib.error,
)

Refuse = Callable[[str, str], BadSample]  # (reason, explanation) -> what to raise


@dataclass(frozen=True, slots=True)
class LoadedImage:
    image: Image.Image  # mode RGB, at its stored size
    notes: tuple[str, ...]  # what was converted, as words to count: exif_rotated, cmyk, palette, alpha_over_white, ...


def load_image(ref: ImageRef, sample_id: str) -> LoadedImage:
    """The picture in RGB and what was converted on the way.

    Raises BadSample: missing_image, empty_image, image_too_large, animated_image, unreadable_image.
    """
    refuse = partial(_refusal, sample_id, ref)
    encoded = _read(ref, refuse)
    if not encoded:
        raise refuse("empty_image", "is 0 bytes long; expected an encoded picture, so copy or download it again")
    try:
        with _open(encoded, refuse) as image:
            _check_frames(image, refuse)
            notes = ["mpo_first_frame"] if image.format == "MPO" else []
            # Pillow turns a TIFF upright at load and drops the tag, so ask before; a PNG's may follow its pixels.
            orientation = _orientation(image, notes) if image.format == "TIFF" else 1
            image.load()
            orientation = max(orientation, _orientation(image, notes))
            if orientation > 1:
                ImageOps.exif_transpose(image, in_place=True)
                notes.append("exif_rotated")
            picture = _to_rgb(image, notes, refuse)
            picture.info.clear()  # EXIF, comments and texts: whoever saves the picture would save some of them with it
            return LoadedImage(picture, tuple(notes))
    except BadSample:
        raise
    except DECODE_ERRORS as error:
        raise refuse(
            "unreadable_image",
            f"does not decode in full ({_brief(error)}); it is cut short or damaged, so copy it again",
        ) from error


def _open(encoded: bytes, refuse: Refuse) -> Image.Image:
    """The picture's header, its size checked before a pixel is decoded."""
    too_large = (
        f"of more than {MAX_IMAGE_PIXELS:,} pixels in all or {MAX_IMAGE_SIDE:,} on a side is never decoded (it may be "
        "a decompression bomb); store a smaller copy"
    )
    try:
        with warnings.catch_warnings():
            # Pillow's limit lies below ours: where it only warns, ours decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise refuse("image_too_large", f"is too large; {_brief(error)}; a picture {too_large}") from None
    except Image.UnidentifiedImageError:
        start = encoded[:8].hex(" ")
        raise refuse(
            "unreadable_image",
            f"is not a picture: it begins with the bytes {start}; expected one of {', '.join(FORMATS)}",
        ) from None
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
        raise refuse("image_too_large", f"is {width:,} x {height:,} pixels; a picture {too_large}")
    return image


def _check_frames(image: Image.Image, refuse: Refuse) -> None:
    # An MPO is a photograph with a preview or a second view behind it: its first frame is the photograph.
    # Formats that never have frames lack the attribute.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise refuse(
            "animated_image",
            f"({image.format}) has {image.n_frames} frames or pages; expected a single picture, so store the one that "
            "is meant as a file of its own",
        )


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """1 for upright, 2 to 8 as EXIF defines them. EXIF that cannot be read is noted: the pixels are still good."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        notes.append("unreadable_exif")
        return 1
    return orientation if orientation in range(2, 9) else 1


def _to_rgb(image: Image.Image, notes: list[str], refuse: Refuse) -> Image.Image:
    if image.mode in HIGH_DEPTH_MODES:
        notes.append("16bit_rescaled")
        return _rescaled(image).convert("RGB")
    if image.mode in CONVERTED_MODES:
        notes.append(CONVERTED_MODES[image.mode])
    if image.has_transparency_data:
        notes.append("alpha_over_white")
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    if image.mode in ("RGB", "L", *CONVERTED_MODES):
        return image.convert("RGB")
    raise refuse(
        "unreadable_image", f"has the colour mode {image.mode}, which has no exact way to RGB; store it as RGB or grey"
    )


def _rescaled(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits with its darkest value at 0 and its brightest at 255.

    Pillow's own convert clips instead: a 12-bit radiograph comes out almost all white, without a word.
    """
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
    # A picture of one value has no contrast to keep: it is black.
    scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def read_encoded(ref: ImageRef, sample_id: str) -> bytes:
    """The picture as it is stored. Raises BadSample: missing_image, image_too_large, unreadable_image."""
    return _read(ref, partial(_refusal, sample_id, ref))


def _read(ref: ImageRef, refuse: Refuse) -> bytes:
    """The encoded bytes, their number checked before any are read."""
    if ref.archive is not None:
        return _read_member(ref, refuse)
    if ref.path is None:
        _check_length(len(ref.data), refuse)
        return ref.data
    # isfile() is false for folders, devices and pipes, and for names that no file system takes.
    if not os.path.isfile(ref.path):
        raise refuse(
            "missing_image", "does not exist; download it, or correct the row's image name or the recipe's image_root"
        )
    try:
        _check_length(os.path.getsize(ref.path), refuse)
        with open(ref.path, "rb") as file:
            return file.read()
    except OSError as error:
        raise refuse(
            "unreadable_image", f"cannot be read ({error.strerror}); check its permissions and the disk"
        ) from None


def _read_member(ref: ImageRef, refuse: Refuse) -> bytes:
    try:
        status = os.stat(ref.archive)
        archive = _open_archive(ref.archive, status.st_size, status.st_mtime_ns, os.getpid())
        member = archive.find(ref.member)
        if member is None:
            raise refuse("missing_image", "does not exist: the archive has no such member; download the archive again")
        _check_length(member.file_size, refuse)
        if member.file_size > max(LARGE_ZIP_MEMBER, MAX_ZIP_RATIO * member.compress_size):
            raise refuse(
                "image_too_large",
                f"would unpack {member.compress_size:,} bytes to {member.file_size:,}; more than {MAX_ZIP_RATIO} times "
                "may be a zip bomb and is not unpacked, so store the picture as a file of its own",
            )
        return archive.read(member)
    except FileNotFoundError:
        raise refuse(
            "missing_image", "does not exist: the archive is gone; download it or correct the recipe's image_root"
        ) from None
    # RuntimeError: an encrypted member, or a compression that zipfile lacks.
    except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, zlib.error) as error:
        raise refuse("unreadable_image", f"cannot be unpacked ({_brief(error)}); download the archive again") from error


def _check_length(length: int, refuse: Refuse) -> None:
    if length > MAX_ENCODED_BYTES:
        raise refuse(
            "image_too_large",
            f"is {length:,} bytes long; more than {MAX_ENCODED_BYTES:,} are never read, so store a smaller copy",
        )


class _Archive:
    """A zip archive, open for reading members by name, that keeps 40 bytes of memory per member.

    `zipfile` keeps about 600, which for PubMedVision's 20 archives is 0.5 GB in every worker process.
    """

    _FIELDS = "hash header_offset compress_size file_size CRC compress_type flag_bits"
    _RECORD = np.dtype(list(zip(_FIELDS.split(), ("i8", "i8", "i8", "i8", "u4", "u2", "u2"), strict=True)))

    def __init__(self, path: str):
        self._zip = zipfile.ZipFile(path)
        attributes = attrgetter(*self._FIELDS.split()[1:])
        rows = ((hash(info.filename), *attributes(info)) for info in self._zip.infolist())
        records = np.fromiter(rows, self._RECORD, len(self._zip.infolist()))
        self._records = records[np.argsort(records["hash"])]
        self._zip.filelist.clear()
        self._zip.NameToInfo.clear()

    def find(self, name: str) -> zipfile.ZipInfo | None:
        position = int(np.searchsorted(self._records["hash"], hash(name)))
        if position == len(self._records) or self._records["hash"][position] != hash(name):
            return None
        info = zipfile.ZipInfo(name)
        for attribute in self._FIELDS.split()[1:]:
            setattr(info, attribute, self._records[attribute][position].item())
        return info

    def read(self, member: zipfile.ZipInfo) -> bytes:
        # Bounded by the size that was checked, whatever the packed bytes would give; zipfile checks name and CRC.
        with self._zip.open(member) as file:
            return file.read(member.file_size)


@lru_cache(maxsize=64)
def _open_archive(path: str, size: int, mtime_ns: int, pid: int) -> _Archive:
    # Anew for an archive that was replaced, and in each process: a handle kept over fork shares its file offset.
    return _Archive(path)


_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PNG_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
# The first marker after a scan: in its coded pixels FF is followed by 00, or by D0 to D7 where decoding may restart.
_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")


def without_headers(encoded: bytes) -> tuple[bytes, Literal["jpg", "png"]] | None:
    """A JPEG or PNG file with its pixels as they are encoded and nothing else: no EXIF with its places and names, no
    comments, thumbnails and editors' XML, nothing behind its end. None for other formats, and for what is laid out so
    oddly that this is not certain. The file decodes in full (`load_image`)."""
    if encoded.startswith(_JPEG):
        pixels = _pixels_of_jpeg(encoded)
        return None if pixels is None else (pixels, "jpg")
    return (_pixels_of_png(encoded), "png") if encoded.startswith(_PNG) else None


def _pixels_of_jpeg(encoded: bytes) -> bytes | None:
    kept, at = [encoded[:2]], 2
    while encoded[at : at + 1] == b"\xff":
        marker = encoded[at + 1] if at + 1 < len(encoded) else 0
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xD9:
            return b"".join([*kept, b"\xff\xd9"])
        length = int.from_bytes(encoded[at + 2 : at + 4], "big")
        # Of the application segments, JFIF's and Adobe's say how the colours are coded.
        if not (0xE1 <= marker <= 0xEF or marker == 0xFE) or marker == 0xEE:
            kept.append(encoded[at : at + 2 + length])
        at += 2 + length
        if marker == 0xDA:
            following = _AFTER_SCAN.search(encoded, at)
            if following is None:
                return None
            kept.append(encoded[at : following.start()])
            at = following.start()
    return None


def _pixels_of_png(encoded: bytes) -> bytes:
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(encoded):
        length, kind = struct.unpack(">I4s", encoded[at : at + 8])
        if kind in _PNG_PIXEL_CHUNKS:
            kept.append(encoded[at : at + 12 + length])
        at += 12 + length
        if kind == b"IEND":
            break
    return b"".join(kept)


def _refusal(sample_id: str, ref: ImageRef, reason: str, explanation: str) -> BadSample:
    return BadSample(sample_id, reason, f"image {ref.name} {explanation}")


def _brief(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
