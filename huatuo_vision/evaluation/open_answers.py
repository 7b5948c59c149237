"""Our own reading of answers to open questions, and the metrics every open row gets. No torch here.

An answer is right where it says the same as one accepted string: the same words without case, articles and
punctuation; the same number in the same unit; the same list in any order; the same yes or no.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from sacrebleu.metrics import BLEU

from huatuo_vision.evaluation.phrases import enclosed
from huatuo_vision.evaluation.words import CJK, NUMBER_WORDS, UNITS, clean, normal, refuses
from huatuo_vision.evaluation.yes_no import said_yes_or_no

# What is said before an answer.
_MARKER = re.compile(
    r"\b(?:(?:the|my|final|correct|best)\s+)*answer(?:\s+to\s+(?:the|this)\s+question)?\s*(?:is\b\s*:?|:|=)\s*"
    r"|答案(?:应该)?(?:是|为|:)\s*",
    re.IGNORECASE,
)
_WRAPPER = re.compile(
    r"(?:(?:so|thus|therefore|hence|well|sure)[\s,]+)?(?:i\s+(?:think|believe)\s+(?:that\s+)?)?"
    r"(?:(?:it|this|that)(?:\s+is|'s)|they\s+are|there\s+(?:is|are)|these\s+are|about|approximately|around"
    r"|(?:the|this)\s+(?:image|picture|scan|figure|x-?ray|photo)\s+(?:shows|is|depicts)|[AQ]:)\s+"
    r"|(?:这是|图像显示)\s*",
    re.IGNORECASE,
)

_QUANTITY = re.compile(r"([-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?)\s*([^\d\s].*)?")


def parse_open(reply: str) -> str | None:
    """What a reply says, as it is compared; None where it says nothing or declines to answer."""
    text = clean(reply)
    said = unwrapped(text)
    return None if not said or refuses(text) else said


def unwrapped(text: str) -> str:
    """The answer of a cleaned reply without what is said around it, in the words that are compared."""
    return normal(_without_wrapping(text))


def _without_wrapping(text: str) -> str:
    contents = enclosed(text)
    text = clean(contents[-1]) if contents else text
    markers = list(_MARKER.finditer(text))
    if markers and text[markers[-1].end() :].strip(" ."):
        text = text[markers[-1].end() :]
    while (wrapper := _WRAPPER.match(text)) and text[wrapper.end() :].strip(" ."):
        text = text[wrapper.end() :]
    return text


def same_answer(reply: str, accepted: Sequence[str]) -> bool:
    """Whether a reply says the same as one of the accepted strings."""
    text = clean(reply)
    readings = {normal(text), unwrapped(text)}
    return any(_agrees(text, readings, clean(gold)) for gold in accepted)


def _agrees(text: str, readings: set[str], gold: str) -> bool:
    wanted = normal(gold)
    if _in_digits(wanted) in map(_in_digits, readings):
        return wanted != ""
    if wanted in ("yes", "no"):
        return said_yes_or_no(text) == wanted
    if quantity := _quantity(gold):
        return any(_quantity(reading) == quantity for reading in (text, *readings))
    items = _items(gold)
    return len(items) > 1 and items == _items(_without_wrapping(text))


def _in_digits(text: str) -> str:
    return " ".join(NUMBER_WORDS.get(word, word) for word in text.split())


def _quantity(text: str) -> tuple[float, str] | None:
    """The number and unit ("" for none) that are all a text says: "3.0 cm", "two", "50 percent"."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.casefold().strip(" .,;:!"))
    match = _QUANTITY.fullmatch(_in_digits(text))
    if not match:
        return None
    unit = (match[2] or "").strip()
    if unit and unit not in UNITS:
        return None
    return float(match[1]), UNITS.get(unit, "")


def _items(text: str) -> frozenset[str]:
    parts = re.split(r",(?!\d{3})|[;、\n]|\s&\s|\band\b|和|及|与", text)
    return frozenset(filter(None, map(normal, parts)))


def metrics(reply: str, accepted: Sequence[str]) -> dict[str, float]:
    """exact_match, token_recall, token_f1 and bleu of a reply, each 0 to 1, each the best over the accepted strings.

    Tokens are SQuAD's (Rajpurkar et al. 2016): lower case, without articles and punctuation; each Chinese character
    is one. BLEU is sacrebleu's sentence BLEU with effective order, in lower case.
    """
    said = normal(reply).split()
    overlaps = [_overlap(said, normal(gold).split()) for gold in accepted]
    return {
        "exact_match": float(any(said and said == normal(gold).split() for gold in accepted)),
        "token_recall": max(recall for recall, _ in overlaps),
        "token_f1": max(f1 for _, f1 in overlaps),
        "bleu": max(_bleu(reply, gold) for gold in accepted),
    }


def _overlap(said: Sequence[str], gold: Sequence[str]) -> tuple[float, float]:
    """Recall and F1 of the gold's tokens, counted with repetitions."""
    shared = sum((Counter(said) & Counter(gold)).values())
    if not shared:
        return 0.0, 0.0
    recall, precision = shared / len(gold), shared / len(said)
    return recall, 2 * precision * recall / (precision + recall)


@cache
def _scorer(tokenize: str) -> BLEU:
    return BLEU(effective_order=True, lowercase=True, tokenize=tokenize)


def _bleu(reply: str, gold: str) -> float:
    tokenize = "zh" if re.search(f"[{CJK}]", gold) else "13a"
    if not reply.strip() or not gold.strip():
        return 0.0
    # An exact match comes out a rounding error above 100.
    return min(1.0, _scorer(tokenize).sentence_score(reply, [gold]).score / 100)


def accepted_strings(answer: str | Sequence[str]) -> tuple[str, ...]:
    return (answer,) if isinstance(answer, str) else tuple(answer)
