"""From replies to verdicts to scores. No torch here.

A reply counts only where it clearly names one option. Everything else is `unparsed`, a class of its own beside
`wrong`: never credited, never guessed.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from scipy.stats import binomtest

from huatuo_vision.schema import UserError

# Goes up whenever any reply would be read differently.
PARSER_VERSION = 1

# The gold answer of a row whose answer the benchmark hides.
HIDDEN = "?"

_OPEN, _CLOSE = r"[(\[\"']*", r"[)\]\"']*"
_ONLY_LETTER = re.compile(rf"{_OPEN}([A-Za-z]){_CLOSE}[.:,;!]?")
_LEADING_LETTER = re.compile(rf"{_OPEN}([A-Za-z])(?P<sign>[)\]\"][.:]?|[.:\n])\s*(?P<rest>.*)", re.DOTALL)
_MARKER = re.compile(r"\b(?:answer|(?:correct|right|best) (?:option|choice))\s*(?:is\b\s*:?|:)\s*", re.IGNORECASE)
# A marked letter ends in punctuation; a bare space is not enough: "the answer is A fracture", "Answer: I think".
_MARKED_LETTER = re.compile(rf"{_OPEN}([A-Za-z])(?=[)\]\"]|'?\s*(?:$|[.:,;!\n]|-\s|because\b|since\b))")
_OTHER_LETTER = re.compile(rf"{_CLOSE}\s*(?:,|/|&|\bor\b|\band\b)\s*{_OPEN}(?:option )?([A-Z])(?!\w)")
# A letter standing alone, unless it is the article "A" or the pronoun "I" before a word.
_LONE_LETTER = re.compile(r"(?<![\w'])([B-HJ-Z](?![\w'])|[AI](?![\w']|\s+[a-z])|[a-z](?=[)\]]))")


def parse_choice(reply: str, options: Sequence[str]) -> str | None:
    """The letter of the one option a reply chooses, or None where it chooses none, or two."""
    text = _clean(reply)
    letters = string.ascii_uppercase[: len(options)]
    if only := _ONLY_LETTER.fullmatch(text):
        return _within(only[1], letters)
    if stated := _option_with_text(text, options):
        return stated
    claims = {claim for marker in _MARKER.finditer(text) for claim in _marked_claims(text[marker.end() :], options)}
    if claims:
        return claims.pop() if len(claims) == 1 else None
    leading = _LEADING_LETTER.match(text)
    if leading and _agrees(leading[1].upper(), leading["sign"], leading["rest"], options):
        return leading[1].upper()
    return None


def _marked_claims(rest: str, options: Sequence[str]) -> Iterator[str | None]:
    """What "the answer is ..." claims: a letter, two letters that contradict, None for one beyond the options."""
    letters = string.ascii_uppercase[: len(options)]
    if stated := _option_with_text(rest, options):
        yield stated
    elif letter := _MARKED_LETTER.match(rest):
        yield _within(letter[1], letters)
        after = rest[letter.end() :]
        if other := _OTHER_LETTER.match(after):
            yield _within(other[1], letters)
        if stated := _option_with_text(after.lstrip(" .:)]\"'"), options):
            yield stated


def _agrees(letter: str, sign: str, rest: str, options: Sequence[str]) -> bool:
    """Whether what follows a leading letter and its sign is its option's text, or names no other option."""
    letters = string.ascii_uppercase[: len(options)]
    if letter not in letters:
        return False
    own = _normal(options[letters.index(letter)])
    if _normal(rest) == own:
        return True
    if own and rest.lower().startswith(own):
        rest = rest[len(own) :]
    elif _option_with_text(rest, options) or (sign == "." and rest[:1].islower()):
        # "B: text of A" contradicts itself; "E. coli" begins with no answer.
        return False
    return not any(other.upper() != letter and other.upper() in letters for other in _LONE_LETTER.findall(rest))


def _within(letter: str, letters: str) -> str | None:
    return letter.upper() if letter.upper() in letters else None


def _option_with_text(text: str, options: Sequence[str]) -> str | None:
    """The letter of the only option whose text this is."""
    normal = _normal(text)
    same = [
        letter for letter, option in zip(string.ascii_uppercase, options, strict=False) if _normal(option) == normal
    ]
    return same[0] if normal and len(same) == 1 else None


def _clean(text: str) -> str:
    """Full-width signs made plain, Markdown's emphasis taken away."""
    return re.sub(r"[*`]|(?<!\w)_+|_+(?!\w)", "", unicodedata.normalize("NFKC", text)).strip()


def _normal(text: str) -> str:
    # Only at the end: a leading point or minus belongs to a number.
    return " ".join(_clean(text).casefold().split()).lstrip("\"'").rstrip(" .,:;!\"'")


@dataclass(frozen=True, slots=True)
class Verdict:
    benchmark: str
    id: str
    parsed: str | None
    verdict: Literal["correct", "wrong", "unparsed", "ungraded"]  # ungraded: the benchmark hides the answer


def judge(response: Mapping[str, Any]) -> Verdict:
    """The verdict on one line of a responses file. Raises UserError for a row that can't be graded."""
    benchmark, row_id, options, gold = (response[key] for key in ("benchmark", "id", "options", "answer"))
    if response["question_type"] != "multiple-choice":
        raise UserError(
            f"{benchmark} row {row_id!r} has the question_type {response['question_type']!r}; expected multiple-choice"
        )
    if gold != HIDDEN and gold not in tuple(string.ascii_uppercase[: len(options)]):
        raise UserError(
            f"{benchmark} row {row_id!r} has the answer {gold!r}; expected the letter of one of {len(options)} options"
        )
    parsed = parse_choice(response["response"], options)
    if gold == HIDDEN:
        return Verdict(benchmark, row_id, parsed, "ungraded")
    if parsed is None:
        return Verdict(benchmark, row_id, None, "unparsed")
    return Verdict(benchmark, row_id, parsed, "correct" if parsed == gold else "wrong")


@dataclass(frozen=True, slots=True)
class Tally:
    """n graded rows: correct, unparsed, and the rest wrong. Rates are fractions of n, None where n is 0."""

    n: int
    correct: int
    unparsed: int
    accuracy: float | None
    ci95: tuple[float, float] | None  # Wilson score interval


def tally(verdicts: Sequence[Verdict]) -> Tally:
    kinds = [verdict.verdict for verdict in verdicts if verdict.verdict != "ungraded"]
    n, correct, unparsed = len(kinds), kinds.count("correct"), kinds.count("unparsed")
    if n == 0:
        return Tally(0, 0, 0, None, None)
    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Tally(n, correct, unparsed, correct / n, (float(interval.low), float(interval.high)))


def score_benchmark(
    responses: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict], *, expected_n: int, limit: int | None
) -> dict[str, Any]:
    """One benchmark's entry of scores.json: overall, micro and macro (mean over subjects), and every group."""
    overall = tally(verdicts)
    members: dict[str, dict[str, list[Verdict]]] = {}
    for response, verdict in zip(responses, verdicts, strict=True):
        for group, value in response["groups"].items():
            members.setdefault(group, {}).setdefault(value, []).append(verdict)
    groups = {
        group: {value: tally(some) for value, some in sorted(values.items())} for group, values in members.items()
    }
    rates = [value.accuracy for value in groups.get("subject", {}).values() if value.accuracy is not None]
    return {
        "n": overall.n,
        "expected_n": expected_n,
        "correct": overall.correct,
        "unparsed": overall.unparsed,
        "ungraded": len(verdicts) - overall.n,
        "accuracy": overall.accuracy,
        "ci95": overall.ci95,
        "micro": overall.accuracy,
        "macro": fmean(rates) if rates else None,
        "comparable": limit is None and len(verdicts) == expected_n,
        "groups": {group: {value: asdict(some) for value, some in values.items()} for group, values in groups.items()},
    }
