"""Small copies of the pictures that the report shows, so that it can be sent around as one file. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from PIL import Image

from huatuo_vision.evaluation.rows import Row
from huatuo_vision.inputs.images import load_image

FOLDER = "images"
LONGEST_SIDE = 320
QUALITY = 85


def save_pictures(out: Path, rows: Iterable[Row], wanted: Collection[tuple[str, str]]) -> None:
    """Write `<out>/images/<sha256>.jpg` for every picture of the rows whose (benchmark, id) is wanted.

    The longest side is LONGEST_SIDE pixels at most; a picture that is there already is left alone.

    Raises:
        BadSample for a picture that does not open.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    keys = set(wanted)
    for row in rows:
        if (row.benchmark, row.id) not in keys:
            continue
        for reference in row.images:
            path = folder / f"{reference.sha256}.jpg"
            if path.exists():
                continue
            picture = load_image(reference, row.id).image
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
            unfinished = path.with_suffix(".unfinished")
            picture.save(unfinished, format="JPEG", quality=QUALITY)
            unfinished.replace(path)
