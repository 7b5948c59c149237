"""What a source yields: a figure whose pictures can be read, or what became of one that can't be used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data.tables import Dropped, Pair
from huatuo_vision.schema import BadSample


@dataclass(frozen=True, slots=True)
class Found:
    """A figure. Its pair has no image ids yet; each entry of `pictures` reads one encoded picture.

    They raise BadSample (missing_image, unsafe_path, checksum_mismatch, ...), or OSError where the source itself fails.
    """

    pair: Pair
    pictures: tuple[Callable[[], bytes], ...]


@dataclass(frozen=True, slots=True)
class Note:
    """Something to count that loses no row."""

    name: str
    count: int = 1


FoundRows = Iterator[Found | Dropped | Note]


def slug(name: str) -> str:
    """A name fit for files and unlike that of any other: what had to be replaced is told apart by a short hash."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[:100]
    if safe == name:
        return name
    return f"{safe or 'row'}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def refused(error: BadSample) -> Dropped:
    return Dropped(error.sample_id, error.reason, error.explanation)
