"""A DICOM file -> its picture in 8 bits. Nothing of its header, where names and dates are, goes any further."""

from __future__ import annotations

import io

import numpy as np
import pydicom
from PIL import Image
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

from huatuo_vision.inputs.images import MAX_IMAGE_PIXELS
from huatuo_vision.schema import BadSample

# pydicom lets through what its decoders raise.
READ_ERRORS = (
    InvalidDicomError,
    AttributeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    RuntimeError,
    OSError,
    EOFError,
)
READ_ERRORS += (NotImplementedError, ArithmeticError)


def is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def read_dicom(data: bytes, owner: str, window: tuple[float, float] | None) -> tuple[Image.Image, str]:
    """The picture, grey or RGB, and a word for how its values were brought to 8 bits.

    Grey values go through `window` (centre, width), else through the file's own first window or lookup table, else
    from darkest to brightest. Raises BadSample: unreadable_image, animated_image, image_too_large, burned_in_text.
    """
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        frames = int(dataset.get("NumberOfFrames") or 1)
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        burned_in = str(dataset.get("BurnedInAnnotation", "NO")).upper() == "YES"
    except READ_ERRORS as error:
        raise _unreadable(owner, error) from None
    if burned_in:
        raise BadSample(
            owner,
            "burned_in_text",
            "the DICOM file says that text is burned into its pixels, which may name the patient; remove it first",
        )
    if frames > 1:
        raise BadSample(
            owner,
            "animated_image",
            f"the DICOM file has {frames} frames; expected a single one, so store the one that is meant by itself",
        )
    if rows * columns > MAX_IMAGE_PIXELS:
        raise BadSample(owner, "image_too_large", f"the DICOM file has {columns:,} x {rows:,} pixels")
    try:
        return _picture(dataset, window)
    except READ_ERRORS as error:
        raise _unreadable(owner, error) from None


def _picture(dataset: pydicom.Dataset, window: tuple[float, float] | None) -> tuple[Image.Image, str]:
    values = pixel_array(dataset)
    if values.ndim == 3:  # colour; YBR comes out as RGB
        return Image.fromarray(_full_range(values) if values.dtype != np.uint8 else values, "RGB"), "dicom_colour"
    padding = dataset.get("PixelPaddingValue")
    meant = values != padding if padding is not None else np.ones(values.shape, bool)
    grey = apply_modality_lut(values, dataset).astype(np.float64)
    if window is not None:
        picture, how = windowed(grey, *window, "LINEAR"), "dicom_window_given"
    elif dataset.get("VOILUTSequence"):
        picture, how = _full_range(apply_voi_lut(values, dataset)), "dicom_lookup_table"
    elif dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        centre, width = (_first(dataset[name].value) for name in ("WindowCenter", "WindowWidth"))
        picture, how = windowed(grey, centre, width, dataset.get("VOILUTFunction", "LINEAR")), "dicom_window_of_file"
    else:
        picture, how = _full_range(grey, meant), "dicom_full_range"
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        picture = 255 - picture
    return Image.fromarray(picture, "L"), how


def windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Values to 0..255 by the formulas of DICOM PS3.3 C.11.2.1."""
    if width < 1 and function == "LINEAR" or width <= 0:
        raise ValueError(f"window width {width} is not positive")
    if function == "SIGMOID":
        scaled = 1 / (1 + np.exp(-4 * (values - centre) / width))
    elif function == "LINEAR_EXACT":
        scaled = (values - centre) / width + 0.5
    else:
        scaled = (values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def _full_range(values: np.ndarray, meant: np.ndarray | None = None) -> np.ndarray:
    values = values.astype(np.float64)
    chosen = values[meant] if meant is not None and meant.any() else values
    low, high = chosen.min(), chosen.max()
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _first(value: object) -> float:
    return float(value[0] if isinstance(value, (list, pydicom.multival.MultiValue)) else value)


def _unreadable(owner: str, error: Exception) -> BadSample:
    # The first line only: some errors print what they could not parse.
    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return BadSample(owner, "unreadable_image", f"the DICOM file can't be read ({said})")
