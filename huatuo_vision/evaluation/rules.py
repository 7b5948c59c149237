"""How replies become verdicts, rule by rule: our own, and the published ones with their defects. No torch here.

A rule takes one object of a responses file whose gold answer is known to be well-formed. The published rules are
written anew from what their code does; where that code fails or draws at random, the rule says None.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huatuo_vision.evaluation import open_answers
from huatuo_vision.evaluation.parsing import parse_choice
from huatuo_vision.evaluation.words import clean


@dataclass(frozen=True, slots=True)
class Graded:
    """What a rule reads in a reply (None: nothing), and whether that is right."""

    parsed: str | None
    right: bool
    chance: float | None = None  # the credit that a random draw of the official code would expect; None: it draws none
    metrics: Mapping[str, float] | None = None  # of open rows: each 0..1


Rule = Callable[[Mapping[str, Any]], Graded]


def _accepted(response: Mapping[str, Any]) -> tuple[str, ...]:
    answer = response["answer"]
    return (answer,) if isinstance(answer, str) else tuple(answer)


def _open_metrics(response: Mapping[str, Any]) -> dict[str, float]:
    return open_answers.metrics(response["response"], _accepted(response))


# --- Our own ------------------------------------------------------------------------------------------------------


def default_choice(response: Mapping[str, Any]) -> Graded:
    parsed = parse_choice(response["response"], response["options"], response.get("question") or "")
    return Graded(parsed, parsed == response["answer"])


_ANSWER_LINE = re.compile(r"^\W*(?:final\s+|correct\s+|best\s+)*answer\b.*", re.IGNORECASE | re.MULTILINE)


def answer_line(response: Mapping[str, Any]) -> Graded:
    """The option that the lines beginning with "Answer" name; the whole reply where there is no such line.

    An explanation speaks of the other options too, so it is not read. Lines that name different options choose none.
    """
    question, options = response.get("question") or "", response["options"]
    lines = _ANSWER_LINE.findall(clean(response["response"]))
    if not lines:
        return default_choice(response)
    said = {parse_choice(line, options, question) for line in lines} - {None}
    parsed = said.pop() if len(said) == 1 else None
    return Graded(parsed, parsed == response["answer"])


def default_open(response: Mapping[str, Any]) -> Graded:
    reply = response["response"]
    right = open_answers.same_answer(reply, _accepted(response))
    # A gold answer may itself read like a refusal: "cannot be determined".
    parsed = open_answers.unwrapped(clean(reply)) if right else open_answers.parse_open(reply)
    return Graded(parsed, right, metrics=_open_metrics(response))


# --- HuatuoGPT-Vision -----------------------------------------------------------------------------------------------

_FIRST_LETTER = re.compile(r"(?<![^\W是为])(?![aA] )[a-nA-N](?!\w)")


def huatuo_first_letter(response: Mapping[str, Any]) -> Graded:
    """The first letter a to n that stands alone (HuatuoGPT-Vision, scorer.py, `match_choice3`).

    It may stand behind anything that is no word, or behind two Chinese words for "is"; an "a" before a space is taken
    for the article. Compared as written ("b" is wrong), however many options there are ("I think C" reads I). The
    official code goes on to option texts with the wrong argument and ends the run; here such a reply is unparsed.
    """
    found = _FIRST_LETTER.search(response["response"])
    parsed = found[0] if found else None
    return Graded(parsed, parsed == response["answer"])


# --- MMMU ---------------------------------------------------------------------------------------------------------


def mmmu_choice(response: Mapping[str, Any]) -> Graded:
    """MMMU's own rule (mmmu/utils/eval_utils.py), or MMMU-Pro's (mmmu-pro/evaluate.py) for a benchmark of that name.

    Where the official code draws a letter, parsed is None and chance is what the draw expects.
    """
    options = dict(zip(string.ascii_uppercase, response["options"], strict=False))
    is_pro = re.sub(r"[\W_]", "", response["benchmark"]).lower().startswith("mmmupro")
    parsed = _mmmu_pro_letter(response["response"], options) if is_pro else _mmmu_letter(response["response"], options)
    return Graded(parsed, parsed == response["answer"], chance=1 / len(options) if parsed is None else None)


def _mmmu_bare(reply: str) -> str:
    # One sign after the other, as the official code does: "B.'" and "B'." come out differently.
    for sign in ",.!?;:'":
        reply = reply.strip(sign)
    return f" {reply} "


def _last(letters: Sequence[str], position: Callable[[str], int]) -> str | None:
    """The letter found last, the first of those at one position; None where there are none."""
    return max(letters, key=position, default=None)


def _mmmu_letter(reply: str, options: Mapping[str, str]) -> str | None:
    reply = _mmmu_bare(reply)
    for form in ("({})", " {} "):
        if found := [letter for letter in options if form.format(letter) in reply]:
            return _last(found, lambda letter, form=form: reply.rfind(form.format(letter)))
    return _mmmu_by_text(reply, options)


def _mmmu_by_text(reply: str, options: Mapping[str, str]) -> str | None:
    if len(reply.split()) <= 5:
        return None
    reply = reply.lower()
    found = [letter for letter, text in options.items() if text.lower() in reply]
    return _last(found, lambda letter: reply.rfind(options[letter].lower()))


def _mmmu_pro_letter(reply: str, options: Mapping[str, str]) -> str | None:
    _, marker, answer = reply.rpartition("Answer:")
    inside = [letter for letter in options if letter in answer]
    if marker and len(inside) == 1:
        return inside[0]
    reply = _mmmu_bare(reply)
    # Both later forms may stand inside words ("DNA "), and are then ranked by a form they need not have.
    for form, ranked_by in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in options if form.format(letter) in reply]:
            return _last(found, lambda letter, ranked_by=ranked_by: reply.rfind(ranked_by.format(letter)))
    return _mmmu_by_text(reply, options)


_MMMU_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MMMU_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu_open(response: Mapping[str, Any]) -> Graded:
    """MMMU's own rule: a gold string inside one of the reply's key phrases, or a gold number among its numbers."""
    phrases = list(_mmmu_phrases(response["response"]))
    numbers = [number for phrase in phrases for pattern in _MMMU_NUMBERS for number in pattern.findall(phrase)]
    said = list(dict.fromkeys(value for text in (*phrases, *numbers) for value in _mmmu_values(text)))
    gold = [value for text in _accepted(response) for value in _mmmu_values(text)]
    right = any(
        any(isinstance(wanted, str) and wanted in value for wanted in gold) if isinstance(value, str) else value in gold
        for value in said
    )
    return Graded(" | ".join(map(str, said)), right, metrics=_open_metrics(response))


def _mmmu_phrases(reply: str) -> Iterator[str]:
    """Of each line the shortest that follows a key word, or the whole reply where no line has one.

    The official code means to split sentences too, at a full stop before a capital, but has lowered the reply by then.
    """
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    found = False
    for number, line in enumerate(lines, 1):
        keys = (*_MMMU_KEYS, "=") if number == len(lines) else _MMMU_KEYS
        shortest = None
        for tail in (line.split(key)[-1].strip() for key in keys if key in line):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            found = True
            yield shortest
    if not found:
        yield reply


def _mmmu_values(text: str) -> list[str | float]:
    """A number, rounded to two places; or the text in small letters, a single one only with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


# --- LLaVA-Med ------------------------------------------------------------------------------------------------------

_LLAVA_MED_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_LLAVA_MED_NUMBERS = dict(
    zip("none zero one two three four five six seven eight nine ten".split(), map(str, (0, *range(11))), strict=True)
)


def llava_med_closed(response: Mapping[str, Any]) -> Graded:
    """Yes/no: the reply contains "yes" or "no", and the gold word ("abnormal" contains "no").

    This is the rule since 2023-12-11 (commit b9a98a7 of microsoft/LLaVA-Med); a reply with neither word is unparsed,
    and stays in the denominator. Its options other than yes and no have no published rule that can be met: the default
    rule reads them.
    """
    letters = {_llava_med_normal(option): letter for letter, option in zip("AB", response["options"], strict=False)}
    if set(letters) != {"yes", "no"} or len(response["options"]) != 2:
        return default_choice(response)
    reply = _llava_med_normal(response["response"])
    said = [letter for word, letter in letters.items() if word in reply]
    parsed = response["answer"] if response["answer"] in said else next(iter(said), None)
    return Graded(parsed, parsed == response["answer"])


def llava_med_recall(response: Mapping[str, Any]) -> Graded:
    """Right where every word of the gold answer is said; the metric token_recall is the published number.

    Theirs counts a word that is said twice twice (`calculate_f1score` in evaluate_metrics.py).
    """
    said = Counter(_llava_med_normal(response["response"]).split())
    recall = max(_llava_med_recall(said, Counter(_llava_med_normal(gold).split())) for gold in _accepted(response))
    parsed = " ".join(said.elements()) or None
    return Graded(parsed, recall == 1, metrics=_open_metrics(response) | {"token_recall": recall})


def _llava_med_recall(said: Counter[str], gold: Counter[str]) -> float:
    hits = sum(said[word] for word in gold)
    misses = sum(count for word, count in gold.items() if word not in said)
    return hits / (hits + misses) if hits else 0.0


def _llava_med_normal(text: str) -> str:
    """Small letters, numbers as digits ("none" is 0), no articles, no punctuation.

    A sign beside a space goes, any other becomes a space, and all go where the text has a number with a comma.
    """
    text = text.lower()
    grouped = re.search(r"\d,\d", text)
    beside_space = {sign for sign in _LLAVA_MED_SIGNS if f"{sign} " in text or f" {sign}" in text}
    text = text.translate({ord(sign): None if grouped or sign in beside_space else " " for sign in _LLAVA_MED_SIGNS})
    words = (_LLAVA_MED_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split())
    return " ".join(word for word in words if word not in ("a", "an", "the"))
