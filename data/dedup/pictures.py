"""Whether two pictures show the same: hashes propose, a second look at the pixels decides.

A hash alone is either too strict (256 bits miss another crop: the sample's lies at 108) or too lax (64 bits take two
radiographs of one kind for one). So both only propose. The second look lays the edges of the two over each other at
the place and scale where they agree best: on the sample's labelled repeats they correlate by 0.79 and more, on the
other proposals by less than 0.7.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from data.dedup.nearest import near_hashes

MAX_COARSE_DISTANCE = 10  # of 64 bits
# Of each picture so many proposals are looked at, the nearest first.
MOST_PROPOSALS = 8
THUMBNAIL_SIDE = 112  # a little more than the largest scale asks for
_SIDE = 96  # pixels of the longer side where pictures are compared
_SCALES = (1.0, 0.98, 1.02, 0.96, 1.04, 0.94, 1.06, 0.92, 1.08)  # likely ones first
_MARGIN = 0.1  # of the one picture, that the other need not show
_BLUR = 2.5  # pixels; what is coarser is no edge

Hashes = tuple[np.ndarray, np.ndarray]  # fine (n, 32) and coarse (n, 8), uint8
Proposal = tuple[int, int, int]  # query, known, distance


def thumbnail(encoded: bytes) -> Image.Image:
    """The picture in grey, as small as the second look allows."""
    with Image.open(io.BytesIO(encoded)) as image:
        return shrunk(image)


def shrunk(image: Image.Image) -> Image.Image:
    scale = THUMBNAIL_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("L").resize(size, Image.Resampling.BOX)


def proposals(known: Hashes, queries: Hashes, max_distance: int) -> list[Proposal]:
    """Pairs that may show the same, the nearest MOST_PROPOSALS of each query; a picture is not proposed to itself."""
    found: dict[int, dict[int, int]] = {}
    # A distance of 64 bits counts four times, to be put beside one of 256.
    for hashes, asked, limit, weight in ((known[0], queries[0], max_distance, 1), (known[1], queries[1], -1, 4)):
        limit = limit if limit >= 0 else min(MAX_COARSE_DISTANCE, max_distance)
        for blocks in near_hashes(hashes, asked, limit):
            for query, other, distance in zip(*(block.tolist() for block in blocks), strict=True):
                if query != other or known is not queries:
                    of_query = found.setdefault(query, {})
                    of_query[other] = min(weight * distance, of_query.get(other, 256))
    nearest = ((q, sorted((d, other) for other, d in of.items())[:MOST_PROPOSALS]) for q, of in sorted(found.items()))
    return [(query, other, distance) for query, of in nearest for distance, other in of]


def likeness(first: Image.Image, second: Image.Image, enough: float = 1.0) -> float:
    """Correlation of the edges of two thumbnails where they agree best, or the first found that is `enough`."""
    best = 0.0
    sides = ((_edges(first, 1.0), second), (_edges(second, 1.0), first))
    for scale in _SCALES:
        for edges, moved in sides:
            best = max(best, _best_place(edges, _edges(moved, scale)))
            if best >= enough:
                return best
    return best


def same_pictures(
    proposed: Iterable[Proposal],
    thumbnails: Callable[[int], Image.Image],
    others: Callable[[int], Image.Image],
    least: float,
) -> Iterator[Proposal]:
    """The proposals that hold on a second look."""
    for query, other, distance in proposed:
        if likeness(thumbnails(query), others(other), least) >= least:
            yield query, other, distance


def neighbours_of(same: Iterable[Proposal]) -> Mapping[int, list[int]]:
    both_ways: dict[int, set[int]] = {}
    for one, other, _ in same:
        both_ways.setdefault(one, set()).add(other)
        both_ways.setdefault(other, set()).add(one)
    return {one: sorted(others) for one, others in both_ways.items()}


def _edges(image: Image.Image, scale: float) -> np.ndarray:
    factor = _SIDE * scale / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    values = np.asarray(image.resize(size, Image.Resampling.BOX), np.float64)
    return values - ndimage.gaussian_filter(values, _BLUR)


def _best_place(picture: np.ndarray, other: np.ndarray) -> float:
    """The highest normalised cross-correlation of the middle of `other` with any part of `picture`."""
    rows, columns = (int(side * _MARGIN) for side in other.shape)
    patch = other[rows : other.shape[0] - rows, columns : other.shape[1] - columns]
    if any(p > whole for p, whole in zip(patch.shape, picture.shape, strict=True)) or min(patch.shape) < 8:
        return 0.0
    patch = patch - patch.mean()
    norm = np.sqrt((patch**2).sum())
    if norm < 1e-6:
        return 0.0
    size = [fft.next_fast_len(w + p - 1, real=True) for w, p in zip(picture.shape, patch.shape, strict=True)]
    inside = tuple(slice(p - 1, w) for w, p in zip(picture.shape, patch.shape, strict=True))
    spectrum, window = fft.rfft2(picture, size), fft.rfft2(np.ones_like(patch), size)
    products = fft.irfft2(spectrum * fft.rfft2(patch[::-1, ::-1], size), size)[inside]
    sums = fft.irfft2(spectrum * window, size)[inside]
    squares = fft.irfft2(fft.rfft2(picture**2, size) * window, size)[inside]
    spread = np.sqrt(np.maximum(squares - sums**2 / patch.size, 1e-3 * patch.size))
    return float((products / (spread * norm)).max())
