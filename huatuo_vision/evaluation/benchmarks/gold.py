"""Options and gold answers as data sets write them -> options and a letter. No torch here."""

from __future__ import annotations

import ast
import string
from collections.abc import Iterable
from typing import Any

from huatuo_vision.evaluation.benchmarks.sources import Record, shown
from huatuo_vision.evaluation.rows import HIDDEN

YES_NO = ("Yes", "No")


def yes_no_letter(answer: str) -> str | None:
    """The letter of a gold answer among YES_NO; None for every other answer."""
    return {"yes": "A", "no": "B"}.get(answer.strip().rstrip(".").casefold())


def options_of(value: Any, record: Record) -> tuple[str, ...]:
    """A list, or a list written as a Python literal. Raises UserError for anything else."""
    if isinstance(value, str):
        value = literal(value)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, (str, int, float)) for item in value):
        raise record.error(f"the options are {shown(record.get('options'))}; expected a list of texts")
    return _lettered([str(item).strip() for item in value], record)


def options_by_letter(values: Iterable[tuple[str, Any]], record: Record) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Options of which each has a column: (their published letters, their texts), empty cells left out."""
    given = [(letter, str(text).strip()) for letter, text in values if text is not None and str(text).strip()]
    return tuple(letter for letter, _ in given), _lettered([text for _, text in given], record)


def letter_of_letter(gold: Any, letters: tuple[str, ...], record: Record) -> str:
    """The option's letter of a gold letter, given the letters that the options were published under; or HIDDEN."""
    gold = gold.strip() if isinstance(gold, str) else gold
    if gold == HIDDEN:
        return HIDDEN
    if gold not in letters:
        raise record.error(
            f"the gold answer is {shown(gold)}; expected the letter of one of its options, {', '.join(letters)}"
        )
    return string.ascii_uppercase[letters.index(gold)]


def letter_of_text(gold: str, options: tuple[str, ...], record: Record) -> tuple[str, dict[str, Any]]:
    """The letter of a gold text and what to note of it: the first of equal options; case and spacing may differ.

    Returns (letter or HIDDEN, extra keys of the row). Raises UserError where the text is no option.
    """
    if gold.strip() == HIDDEN:
        return HIDDEN, {}
    notes = []
    same = [i for i, option in enumerate(options) if option == gold.strip()]
    if not same:
        same = [i for i, option in enumerate(options) if _plain(option) == _plain(gold)]
        notes.append("the gold text equals its option only without regard to case and spacing")
    if not same:
        texts = "; ".join(options)
        raise record.error(f"the gold answer {shown(gold)} is none of its options ({texts}); download the data again")
    letters = [string.ascii_uppercase[i] for i in same]
    if len(letters) > 1:
        notes.append(f"the options {' and '.join(letters)} are equal; {letters[0]} counts as the right one")
    return letters[0], {"notes": notes} if notes else {}


def accepted_answers(value: Any, record: Record) -> str | tuple[str, ...]:
    """The gold of an open question: one text, several (also as a Python literal of a list), or HIDDEN."""
    if isinstance(value, str) and value.strip().startswith("["):
        listed = literal(value)
        # The one answer "[3, 5]" is not two answers.
        if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed):
            value = listed
    if isinstance(value, (int, float)):
        value = str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (str, int, float)) for item in value):
        return tuple(str(item).strip() for item in value)
    raise record.error(f"the gold answer is {shown(value)}; expected a text or a list of texts")


def published_letters(options: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(string.ascii_uppercase[: len(options)])


def _lettered(options: list[str], record: Record) -> tuple[str, ...]:
    if not 1 <= len(options) <= len(string.ascii_uppercase):
        raise record.error(f"it has {len(options)} options; expected 1 to {len(string.ascii_uppercase)}")
    return tuple(options)


def literal(text: str) -> Any:
    """What a Python literal says; None for a text that is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
