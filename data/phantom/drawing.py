"""Drawing the pictures. Coordinates run from -1 to 1 over the picture, y downwards; brightness runs from 0 to 1.

An image is (height, width), or (3, height, width) in colour: NumPy is much slower with the short axis last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from data.phantom.facts import Facts
from data.phantom.streams import PICTURE, stream

Array = np.ndarray

# Three large findings in neighbouring slots stay apart, by a pixel of 60 at the least.
SMALL_RADIUS, LARGE_RADIUS = 0.12, 0.22
_EDGE = 0.05  # the width of a soft edge, about a pixel and a half of 64


def _soft(distance: Array) -> Array:
    """Coverage of a shape from the signed distance to its outline (positive inside)."""
    coverage = distance * np.float32(1 / _EDGE)
    coverage += np.float32(0.5)
    # Called most of all; np.clip takes twice as long on arrays this small.
    np.maximum(coverage, 0, out=coverage)
    return np.minimum(coverage, 1, out=coverage)


def _ellipse(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    radius = np.sqrt(((x - cx) * (1 / rx)) ** 2 + ((y - cy) * (1 / ry)) ** 2)
    return _soft((1 - radius) * min(rx, ry))


def _box(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    """A rectangle of half-widths rx and ry."""
    return _soft(rx - np.abs(x - cx)) * _soft(ry - np.abs(y - cy))


def _colour(value: float | Sequence[float]) -> Array:
    """A grey value, or a colour that broadcasts over an image's rows and columns."""
    return np.asarray(value, np.float32)[..., None, None]


def _paint(image: Array, coverage: Array, value: float | Sequence[float], strength: float = 1.0) -> None:
    """Lay `value` (grey, or one number per colour channel) over the image where `coverage` says."""
    if strength != 1.0:
        coverage = coverage * np.float32(strength)
    image += coverage * (_colour(value) - image)


def _xray_chest(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += np.float32(0.16)
    _paint(image, _ellipse(x, y, 0, 0.5, 0.98, 1.45), 0.46)
    lungs = _ellipse(x, y, -0.44, 0.0, 0.33, 0.74) + _ellipse(x, y, 0.44, 0.0, 0.33, 0.74)
    _paint(image, lungs, 0.14)
    ribs = np.clip(np.sin((y + 0.45 * x * x + rng.uniform(0, 0.3)) * 21) * 2 - 0.6, 0, 1)
    _paint(image, ribs * lungs, 0.32, 0.8)
    _paint(image, _box(x, y, 0, 0.0, 0.1, 1.2), 0.62)
    _paint(image, _ellipse(x, y, 0.06, 0.45, 0.26, 0.3), 0.54)


def _xray_hand(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += np.float32(0.12)
    _paint(image, _ellipse(x, y, 0, 0.5, 0.66, 0.52), 0.32)
    thumb = -1 if rng.integers(2) else 1
    slanted = x - thumb * (0.85 - 0.45 * y)
    _paint(image, _box(slanted, y, 0, 0.4, 0.11, 0.4), 0.32)
    _paint(image, _box(slanted, y, 0, 0.4, 0.05, 0.34), 0.56)
    for cx, top in ((-0.51, -0.55), (-0.17, -0.8), (0.17, -0.85), (0.51, -0.65)):
        finger = x - cx * (1 - 0.3 * (y - 0.2) * (y > 0.2))
        middle, half = (top + 0.5) / 2, (0.5 - top) / 2
        _paint(image, _box(finger, y, 0, middle, 0.13, half), 0.32)
        bone = _box(finger, y, 0, (top + 0.75) / 2, 0.06, (0.75 - top) / 2)
        joints = np.abs(np.mod(y - top, 0.36) - 0.18) > 0.03
        _paint(image, bone * joints, 0.58)


def _xray_knee(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += np.float32(0.12)
    _paint(image, _soft(0.78 - 0.1 * y - np.abs(x)), 0.3)
    width = 0.24 + 0.22 * np.exp(-((y * 4) ** 2))
    _paint(image, _soft(width - np.abs(x)) * _soft(np.abs(y) - 0.05), 0.56)
    _paint(image, _soft(width - 0.1 - np.abs(x)) * _soft(np.abs(y) - 0.15), 0.42)
    # The fibula, beside the shin on either side.
    _paint(image, _box(x, y, 0.46 if rng.integers(2) else -0.46, 0.75, 0.06, 0.5), 0.5)


def _ct_table(image: Array, x: Array, y: Array) -> None:
    _paint(image, _soft(0.03 - np.abs(y - 0.95 + 0.1 * x * x)), 0.5)


def _ct_chest(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    _ct_table(image, x, y)
    _paint(image, _ellipse(x, y, 0, 0, 0.95, 0.82), 0.5)
    _paint(image, _ellipse(x, y, -0.45, 0, 0.36, 0.64), 0.06)
    _paint(image, _ellipse(x, y, 0.45, 0, 0.36, 0.64), 0.06)
    _paint(image, _ellipse(x, y, 0.04, -0.14, 0.2, 0.3), 0.6)
    _paint(image, _ellipse(x, y, 0, 0.52, 0.13, 0.14), 0.82)


def _ct_brain(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    _ct_table(image, x, y)
    _paint(image, _ellipse(x, y, 0, -0.03, 0.82, 0.92), 0.86)
    _paint(image, _ellipse(x, y, 0, -0.03, 0.72, 0.82), 0.38)
    _paint(image, _soft(0.02 - np.abs(x)) * _soft(0.8 - np.abs(y)), 0.5, 0.6)
    for cx in (-0.09, 0.09):
        _paint(image, _ellipse(x, y, cx, -0.02, 0.07, 0.26), 0.1)


def _ct_abdomen(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    _ct_table(image, x, y)
    _paint(image, _ellipse(x, y, 0, 0, 0.96, 0.84), 0.22)
    _paint(image, _ellipse(x, y, 0, 0, 0.86, 0.72), 0.42)
    _paint(image, _ellipse(x, y, -0.42, -0.08, 0.36, 0.5), 0.55)
    _paint(image, _ellipse(x, y, 0.38, -0.3, 0.28, 0.2), 0.3)
    for cx in (-0.34, 0.34):
        _paint(image, _ellipse(x, y, cx, 0.34, 0.15, 0.17), 0.58)
    _paint(image, _ellipse(x, y, 0, 0.1, 0.08, 0.08), 0.66)
    _paint(image, _ellipse(x, y, 0, 0.36, 0.15, 0.15), 0.84)


def _mri_brain(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    _paint(image, _ellipse(x, y, 0, 0, 0.86, 0.95), 0.62)
    _paint(image, _ellipse(x, y, 0, 0, 0.79, 0.88), 0.04)
    brain = _ellipse(x, y, 0, 0, 0.74, 0.83)
    _paint(image, brain, 0.48)
    radius, angle = np.hypot(x * 1.12, y), np.arctan2(y, x)
    folds = np.sin(angle * 14 + 5 * np.sin(radius * 9 + rng.uniform(0, 6)))
    _paint(image, brain * np.clip(folds * 3, 0, 1) * np.clip(radius * 4 - 1.4, 0, 1), 0.24, 0.8)
    _paint(image, brain * _soft(0.02 - np.abs(x)), 0.1)
    for cx in (-0.12, 0.12):
        _paint(image, _ellipse(x + cx * y, y, cx, -0.02, 0.06, 0.24), 0.08)


def _mri_knee(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    _paint(image, _soft(0.86 - np.abs(x)), 0.5)
    _paint(image, _soft(0.76 - np.abs(x)), 0.2)
    width = 0.34 + 0.26 * np.exp(-((y * 3) ** 2))
    for border, value in ((0.0, 0.02), (0.05, 0.6)):
        _paint(image, _soft(width - border - np.abs(x)) * _soft(np.abs(y) - 0.08 - border), value)
    _paint(image, _ellipse(x, y, 0, 0, 0.5, 0.07), 0.32)


def _mri_spine(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += np.float32(0.26)
    _paint(image, np.clip(np.sin(x * 34 + 3 * np.sin(y * 3)), 0, 1) * _soft(np.abs(x) - 0.3), 0.14, 0.7)
    _paint(image, _box(x, y, 0, 0, 0.24, 1.3), 0.05)
    phase = np.mod(y + rng.uniform(0, 0.4), 0.4)
    _paint(image, _soft(0.19 - np.abs(x)) * _soft(0.14 - np.abs(phase - 0.2)), 0.62)
    _paint(image, _soft(0.04 - np.abs(np.abs(x) - 0.3)), 0.5)


def _fan(x: Array, y: Array) -> tuple[Array, Array]:
    """The field of view of an ultrasound probe, and the depth below it."""
    depth = np.hypot(x, y + 1.75)
    return _soft(depth - 0.85) * _soft(2.62 - depth) * _soft((0.62 - np.abs(np.arctan2(x, y + 1.75))) * depth), depth


def _ultrasound(image: Array, x: Array, y: Array, rng: np.random.Generator, organ: Callable[..., None]) -> None:
    fan, depth = _fan(x, y)
    image += np.float32(0.34) + np.float32(0.06) * np.sin(depth * 16)
    organ(image, x, y)
    height, width = image.shape
    speckle = rng.standard_normal(((height + 1) // 2, (width + 1) // 2), np.float32).repeat(2, 0).repeat(2, 1)
    image *= 1 + np.float32(0.3) * np.clip(speckle[:height, :width], -2, 2)
    image *= fan


def _ultrasound_kidney(image: Array, x: Array, y: Array) -> None:
    _paint(image, _ellipse(x, y, 0, 0.15, 0.8, 0.56), 0.5)
    _paint(image, _ellipse(x, y, 0, 0.15, 0.72, 0.48), 0.17)
    _paint(image, _ellipse(x, y, 0, 0.15, 0.2, 0.22), 0.55)


def _ultrasound_heart(image: Array, x: Array, y: Array) -> None:
    for cx in (-0.33, 0.33):
        _paint(image, _ellipse(x, y, cx, -0.12, 0.27, 0.34), 0.04)
        _paint(image, _ellipse(x, y, cx, 0.5, 0.25, 0.22), 0.04)


def _ultrasound_thyroid(image: Array, x: Array, y: Array) -> None:
    for cx in (-0.45, 0.45):
        _paint(image, _ellipse(x, y, cx, 0.1, 0.3, 0.55), 0.52)
    _paint(image, _ellipse(x, y, 0, 0.3, 0.2, 0.34), 0.6)
    _paint(image, _ellipse(x, y, 0, 0.36, 0.17, 0.34), 0.02)


_NUCLEUS = (0.55, 0.33, 0.66)


def _nuclei(image: Array, rng: np.random.Generator, n: int) -> None:
    """Small cell nuclei scattered over the picture, each two pixels by two."""
    rows = rng.integers(0, image.shape[1] - 1, n)
    columns = rng.integers(0, image.shape[2] - 1, n)
    for down in (0, 1):
        for right in (0, 1):
            image[:, rows + down, columns + right] = np.asarray(_NUCLEUS, np.float32)[:, None]


def _histology_gland(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += _colour((0.93, 0.74, 0.83))
    _nuclei(image, rng, 70)
    for cx, cy, rx, ry in ((0, 0, 0.26, 0.62), (-0.95, 0, 0.2, 0.7), (0.95, 0, 0.2, 0.7)):
        u, v = (x - cx) * (1 / rx), (y - cy) * (1 / ry)
        radius = np.hypot(u, v) * (1 + 0.1 * np.cos(9 * np.arctan2(v, u)))
        _paint(image, _soft((1 - radius) * rx), (0.66, 0.42, 0.74))
        _paint(image, _soft((0.6 - radius) * rx), (0.98, 0.96, 0.97))


def _histology_skin(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += _colour((0.95, 0.7, 0.78))
    fibres = np.sin(y * 26 + 2.5 * np.sin(x * 5 + rng.uniform(0, 6)))
    _paint(image, np.clip(fibres, 0, 1), (0.98, 0.84, 0.88), 0.8)
    _nuclei(image, rng, 35)
    border = -0.52 + 0.07 * np.sin(x * 9 + rng.uniform(0, 6)) - y
    _paint(image, _soft(border), (0.62, 0.38, 0.7))
    _paint(image, _soft(border - 0.24), (0.97, 0.95, 0.96))


def _fundus_retina(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    distance = np.hypot(x, y)
    eye = _soft(0.97 - distance)
    _paint(image, eye, (0.74, 0.34, 0.13))
    image *= 1 - np.float32(0.3) * distance * distance
    # The macula, faintly darker, on either side of the optic disc.
    _paint(image, _ellipse(x, y, 0.45 if rng.integers(2) else -0.45, 0.02, 0.16, 0.16), (0.5, 0.2, 0.08), 0.5)
    reach = np.sqrt(np.abs(x) + np.float32(0.01))
    for bend in (rng.uniform(0.7, 0.9), rng.uniform(0.1, 0.22)):
        _paint(image, eye * _soft(0.02 - np.abs(np.abs(y) - bend * reach)), (0.42, 0.08, 0.06), 0.9)
    _paint(image, _ellipse(x, y, 0, 0, 0.15, 0.17), (0.9, 0.66, 0.3))


@dataclass(frozen=True, slots=True)
class _View:
    """How one modality shows one body part, and how far from the middle its findings lie."""

    draw: Callable[[Array, Array, Array, np.random.Generator], None]
    slot_x: float = 0.42


def _sonogram(organ: Callable[[Array, Array, Array], None]) -> Callable[..., None]:
    return lambda image, x, y, rng: _ultrasound(image, x, y, rng, organ)


_VIEWS: dict[tuple[str, str], _View] = {
    ("X-ray", "chest"): _View(_xray_chest, slot_x=0.44),
    ("X-ray", "hand"): _View(_xray_hand, slot_x=0.36),
    ("X-ray", "knee"): _View(_xray_knee, slot_x=0.4),
    ("CT", "chest"): _View(_ct_chest, slot_x=0.44),
    ("CT", "brain"): _View(_ct_brain, slot_x=0.37),
    ("CT", "abdomen"): _View(_ct_abdomen, slot_x=0.42),
    ("MRI", "brain"): _View(_mri_brain, slot_x=0.38),
    ("MRI", "knee"): _View(_mri_knee, slot_x=0.4),
    ("MRI", "spine"): _View(_mri_spine, slot_x=0.55),
    ("ultrasound", "kidney"): _View(_sonogram(_ultrasound_kidney), slot_x=0.42),
    ("ultrasound", "heart"): _View(_sonogram(_ultrasound_heart), slot_x=0.42),
    ("ultrasound", "thyroid"): _View(_sonogram(_ultrasound_thyroid), slot_x=0.44),
    ("histology", "gland"): _View(_histology_gland, slot_x=0.52),
    ("histology", "skin"): _View(_histology_skin, slot_x=0.45),
    ("fundus", "retina"): _View(_fundus_retina, slot_x=0.46),
}
_COLOURED = ("histology", "fundus")
_SLOT_Y = (-0.58, 0.0, 0.58)
# A finding is marked as an annotation tool would mark it: green inside a dark rim, in every manner of picture.
_FINDING, _RIM = (0.15, 0.95, 0.4), (0.02, 0.1, 0.05)


@lru_cache(maxsize=4096)
def _axes(height: int, width: int) -> tuple[Array, Array]:
    """The coordinates of the pixels' centres, as a column of y and a row of x."""
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / height) - 1
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / width) - 1
    return y[:, None], x[None, :]


def _draw_findings(image: Array, x: Array, y: Array, facts: Facts, view: _View, rng: np.random.Generator) -> None:
    radius = SMALL_RADIUS if facts.size == "small" else LARGE_RADIUS
    sign = -1 if facts.side == "left" else 1
    for slot in sorted(rng.permutation(3)[: facts.count].tolist()):
        cx = sign * view.slot_x + rng.uniform(-0.05, 0.05)
        cy = _SLOT_Y[slot] + rng.uniform(-0.02, 0.02)
        rx, ry = (radius * stretch for stretch in rng.uniform(0.92, 1.08, 2).tolist())
        _paint(image, _ellipse(x, y, cx, cy, rx + 0.06, ry + 0.06), _RIM, 0.7)
        _paint(image, _ellipse(x, y, cx, cy, rx, ry), _FINDING)


def draw_picture(facts: Facts, rng: np.random.Generator, size: int) -> Image.Image:
    """A picture of `facts`, its sides between 7/8 and 3/2 of `size`, in colour where the modality or a finding is."""
    area, shape = rng.uniform(1.0, 1.36), rng.uniform(0.88, 1.13)
    width, height = (
        int(np.clip(round(side), round(size * 7 / 8), round(size * 3 / 2)))
        for side in (size * area * shape, size * area / shape)
    )
    rows, columns = _axes(height, width)
    zoom = 1 / rng.uniform(0.95, 1.05)
    x = (columns - np.float32(rng.uniform(-0.05, 0.05))) * np.float32(zoom)
    y = (rows - np.float32(rng.uniform(-0.05, 0.05))) * np.float32(zoom)
    view = _VIEWS[facts.modality, facts.body_part]
    coloured = facts.modality in _COLOURED
    image = np.zeros((3, height, width) if coloured else (height, width), np.float32)
    view.draw(image, x, y, rng)
    if facts.modality == "MRI":
        # An uneven coil and faint ghosts along one direction.
        image *= 1 + np.float32(rng.uniform(-0.15, 0.15)) * x + np.float32(rng.uniform(-0.15, 0.15)) * y
        image += np.float32(0.025) * np.sin(y * 40 + np.float32(rng.uniform(0, 6)))
    contrast, brightness = rng.uniform(0.8, 1.1), rng.uniform(-0.05, 0.05)
    noise = rng.standard_normal((height, width), np.float32)
    noise *= np.float32(rng.uniform(0.01, 0.04))
    if facts.count and image.ndim == 2:
        image = np.repeat(image[None], 3, axis=0)
    # The last to take random numbers, so that nothing else in the picture depends on what the findings are.
    _draw_findings(image, x, y, facts, view, rng)
    image -= np.float32(0.5)
    image *= np.float32(contrast)
    image += np.float32(0.5 + brightness)
    image += noise
    pixels = (np.clip(image, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    return Image.fromarray(np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels)


def picture(seed: int, split: int, index: int, k: int, facts: Facts, size: int) -> Image.Image:
    """Picture `k` of record `index`, always the same for the same arguments."""
    return draw_picture(facts, stream(seed, split, PICTURE, index, k), size)
