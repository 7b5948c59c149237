"""The same question with its options in every cyclic order: who knows the answer finds it anywhere. No torch here."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from huatuo_vision.evaluation.rows import HIDDEN, Row

# Rows with more options stay as they are: ten times the work would mostly repeat what five rotations say.
MAX_ROTATED_OPTIONS = 5


def with_rotations(rows: Sequence[Row]) -> list[Row]:
    """Each row followed by its rotations; rotation r moves option i to position (i + r) % n.

    A rotation is a row of its own with the id `<id>#r<r>`, `rotation` and `rotation_of` in its extra keys, and the
    letter at which the gold option stands now. Open questions and those with more than MAX_ROTATED_OPTIONS options
    stay alone; of the latter the number is said on stderr.
    """
    found: list[Row] = []
    unrotated = 0
    for row in rows:
        found.append(row)
        if row.options is None:
            continue
        if len(row.options) > MAX_ROTATED_OPTIONS:
            unrotated += 1
            continue
        found.extend(_rotated(row, rotation) for rotation in range(1, len(row.options)))
    if unrotated:
        said = f"{unrotated} rows with more than {MAX_ROTATED_OPTIONS} options are asked in their own order only"
        Console(stderr=True).print(said, highlight=False, soft_wrap=True)
    return found


def _rotated(row: Row, rotation: int) -> Row:
    n = len(row.options)
    answer = row.answer
    if answer != HIDDEN:
        answer = string.ascii_uppercase[(string.ascii_uppercase.index(answer) + rotation) % n]
    return replace(
        row,
        id=f"{row.id}#r{rotation}",
        options=tuple(row.options[(position - rotation) % n] for position in range(n)),
        answer=answer,
        extra={**row.extra, "rotation": rotation, "rotation_of": row.id},
    )
