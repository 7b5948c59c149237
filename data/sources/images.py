"""A source's picture -> the file that is kept: it opens the same way everywhere and holds nothing but pixels."""

from __future__ import annotations

import hashlib
import io

import imagehash
import numpy as np
from PIL import Image

from data.sources.dicom import windowed
from data.tables import StoredImage
from huatuo_vision.inputs.images import DECODE_ERRORS, HIGH_DEPTH_MODES, MAX_IMAGE_PIXELS, load_image, without_headers
from huatuo_vision.schema import BadSample, ImageRef

# Of the perceptual hashes: 16 x 16 and 8 x 8 bits.
_FINE, _COARSE = 16, 8


def store_encoded(data: bytes, owner: str) -> tuple[StoredImage, tuple[str, ...]]:
    """The picture of an image file, and what was converted. `owner` is the row that a BadSample names.

    JPEG and PNG files that need no conversion keep their pixels as they are encoded, so nothing is lost.
    Raises BadSample: empty_image, image_too_large, animated_image, unreadable_image, blank_image.
    """
    loaded = load_image(ImageRef(data=data), owner)
    refuse_blank(loaded.image, owner)
    if not loaded.notes and (kept := without_headers(data)) is not None:
        return _stored(loaded.image, *kept), ()
    return store_pixels(loaded.image), loaded.notes


def read_deep(data: bytes, centre: float, width: float, intercept: float) -> Image.Image | None:
    """A 16-bit grey picture seen through a window, after `intercept` was added to its values; None for any other."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "TIFF")) as image:
            if image.mode not in HIGH_DEPTH_MODES or image.width * image.height > MAX_IMAGE_PIXELS:
                return None
            values = np.asarray(image, np.float64)
    except DECODE_ERRORS:
        return None  # said by whoever reads it as any other picture
    return Image.fromarray(windowed(values + intercept, centre, width, "LINEAR_EXACT"))


def refuse_blank(image: Image.Image, owner: str) -> None:
    """Raises BadSample for a picture of one colour: it shows nothing, and its perceptual hash means nothing."""
    extrema = image.getextrema()
    if all(low == high for low, high in (extrema if image.mode == "RGB" else [extrema])):
        raise BadSample(owner, "blank_image", "the picture has one colour only")


def store_pixels(image: Image.Image) -> StoredImage:
    """A decoded picture (RGB or L) as PNG."""
    image = _grey_if_grey(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return _stored(image.convert("RGB"), buffer.getvalue(), "png")


def fingerprints(image: Image.Image) -> tuple[str, bytes, bytes]:
    """SHA-256 over size and pixels of an RGB picture, and its perceptual hashes of 256 and of 64 bits."""
    digest = hashlib.sha256(f"RGB {image.width} {image.height}\n".encode())
    digest.update(image.tobytes())
    grey = image.convert("L")
    fine, coarse = (np.packbits(imagehash.phash(grey, side).hash).tobytes() for side in (_FINE, _COARSE))
    return digest.hexdigest(), fine, coarse


def _stored(image: Image.Image, data: bytes, suffix: str) -> StoredImage:
    id_, phash, coarse = fingerprints(image)
    return StoredImage(id_, data, f"{id_}.{suffix}", image.width, image.height, phash, coarse)


def _grey_if_grey(image: Image.Image) -> Image.Image:
    if image.mode != "RGB":
        return image
    red, green, blue = image.split()
    return red if red.tobytes() == green.tobytes() == blue.tobytes() else image
