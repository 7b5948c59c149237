"""A question asked otherwise, to see what its answer rests on. No torch here.

Rotations: the options in every cyclic order; who knows the answer finds it anywhere. Controls: without the images, or
with the options alone; what is answered right then needed neither. Each variant is a row of its own that names its
original, and only originals count.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from huatuo_vision.evaluation.rows import HIDDEN, Row

# Rows with more options stay as they are: ten times the work would mostly repeat what five rotations say.
MAX_ROTATED_OPTIONS = 5

TEXT_ONLY, OPTIONS_ONLY = "text-only", "options-only"
CONTROLS = (TEXT_ONLY, OPTIONS_ONLY)
WHOLE = "whole"  # the question as it is, beside its controls
OPTIONS_ONLY_QUESTION = "The case and its question are withheld. Which of these options is most likely the right one?"


def is_original(answer: Mapping[str, Any]) -> bool:
    """Whether an object of a responses file is a question as its benchmark asks it."""
    return not answer.get("rotation") and not answer.get("control")


def condition_of(answer: Mapping[str, Any]) -> str | None:
    """WHOLE, or which control it is; None of a rotation, which no table of conditions holds."""
    return None if answer.get("rotation") else answer.get("control") or WHOLE


def by_condition(answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """benchmark -> condition -> answers; the whole question first."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for condition in (WHOLE, *CONTROLS):
        for answer in answers:
            if condition_of(answer) == condition:
                found.setdefault(answer["benchmark"], {}).setdefault(condition, []).append(answer)
    return found


def with_controls(rows: Sequence[Row], controls: Sequence[str]) -> list[Row]:
    """Each row with options followed by its controls, with the id `<id>#<control>`.

    A control has no images; of the options alone also no question. `control` and `control_of` are in its extra keys,
    and the case, so that a bootstrap over cases keeps it with its original.
    """
    found: list[Row] = []
    for row in rows:
        found.append(row)
        if row.options is not None:
            found.extend(_control(row, control) for control in controls)
    return found


def _control(row: Row, control: str) -> Row:
    question = OPTIONS_ONLY_QUESTION if control == OPTIONS_ONLY else row.question
    extra = {**row.extra, "control": control, "control_of": row.id}
    return replace(row, id=f"{row.id}#{control}", question=question, images=(), extra=extra)


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
        if row.options is None or row.extra.get("control"):
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
