"""What all backends share: images checked before the first question, a reply made a response, a bar. No torch here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from huatuo_vision.evaluation.rows import Row
from huatuo_vision.inputs.images import load_image
from huatuo_vision.schema import BadSample, ImageRef, UserError

# A list of missing images longer than this says nothing more.
SHOWN_IMAGES = 50


def check_images(rows: Sequence[Row]) -> None:
    """Raises UserError with the list of the images that can't be read, before any question is asked."""
    first_row: dict[ImageRef, str] = {}
    for row in rows:
        for ref in row.images:
            first_row.setdefault(ref, row.id)

    def check(ref: ImageRef) -> tuple[str, ...] | BadSample:
        try:
            return load_image(ref, first_row[ref]).notes
        except BadSample as error:
            return error

    # Pillow decodes without the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(check, first_row))
    broken = [str(result) for result in found if isinstance(result, BadSample)]
    if broken:
        more = f"; and {len(broken) - SHOWN_IMAGES} more" if len(broken) > SHOWN_IMAGES else ""
        raise UserError(
            f"{len(broken)} images of the benchmark can't be read: {'; '.join(broken[:SHOWN_IMAGES])}{more}"
        )
    converted = Counter(note for notes in found for note in notes)
    if converted:
        said = ", ".join(f"{note} {count}" for note, count in sorted(converted.items()))
        Console(stderr=True).print(f"images converted to RGB: {said}", highlight=False, soft_wrap=True)


def response_of(row: Row, reply: str, **extra: Any) -> dict[str, Any]:
    """The object of responses.jsonl: the contract's keys, then the row's own extra ones, then `extra`."""
    return {
        "benchmark": row.benchmark,
        "id": row.id,
        "question_type": row.question_type,
        "question": row.question,
        "options": None if row.options is None else list(row.options),
        "answer": list(row.answer) if isinstance(row.answer, tuple) else row.answer,
        "response": reply,
        "groups": dict(row.groups),
        "image_sha256": [ref.sha256 for ref in row.images],
        **row.extra,
        **extra,
    }


def progress_bar(doing: str, *, console: Console | None = None, hidden: bool = False) -> Progress:
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console or Console(stderr=True), disable=hidden)
