"""Yes and no: which of them a reply answers. No torch here."""

from __future__ import annotations

import re

from huatuo_vision.evaluation.choices import Choices, Claims, choices_of, stands_apart
from huatuo_vision.evaluation.words import BREAKS, STOPS, Words, clean, refuses

# No noun begins with these: a "no" or "A" before them is no determiner.
NO_NOUNS = frozenset(
    "in on at for from here because since as with according based by to of and or nor but so if when is are was were "
    "than".split()
)
_CLAUSE_BEGINNERS = frozenset(
    "it there this that these those the i we they he she because since its theres yes".split()
)
_ANSWERS = {"yes": "yes", "yeah": "yes", "yep": "yes", "yup": "yes", "no": "no", "nope": "no"}
# These are answers where they are the whole reply.
ALONE = {"true": "yes", "false": "no"} | _ANSWERS
_CJK_ANSWERS = {
    **dict.fromkeys(("不是", "没有", "不存在", "不对", "不正确", "否", "不", "无"), "no"),
    **dict.fromkeys(("是的", "是", "有", "存在", "对", "正确"), "yes"),
}
_YES_OR_NO = re.compile(r"\b(?:yes (?:or|and) no|no (?:or|and) yes|是 or 否|否 or 是)\b")


def said_yes_or_no(text: str) -> str | None:
    """ "yes" or "no", where a cleaned text says one of them and not the other."""
    choices = choices_of(("yes", "no"))
    words = Words.of(text)
    claims = leading_yes_or_no(words, choices) or (set() if refuses(text) else yes_or_no(words, choices))
    return next((word for word, letter in choices.yes_no.items() if claims == {letter}), None)


def leading_yes_or_no(words: Words, choices: Choices) -> Claims:
    beginning = "".join(words.words[:4])
    for word, answer in _CJK_ANSWERS.items():
        if beginning.startswith(word) and words.gaps[len(word)] in BREAKS:
            return {choices.yes_no[answer]}
    return yes_or_no(words, choices) if words.words and _yes_or_no_at(words, 0) else set()


def yes_or_no(words: Words, choices: Choices) -> Claims:
    """Every yes and no that is an answer."""
    if _YES_OR_NO.search(" ".join(words.words)):
        return {None}
    answers = (_yes_or_no_at(words, position) for position in range(len(words.words)))
    return {choices.yes_no[answer] for answer in answers if answer}


def _yes_or_no_at(words: Words, position: int) -> str | None:
    """ "yes" or "no" where the word at a position is an answer; the "no" of "no other finding" is none."""
    word = words.words[position]
    if word in ("是", "否"):
        return _CJK_ANSWERS[word] if stands_apart(words, position) else None
    if word in _ANSWERS and word != "no":
        return _ANSWERS[word]
    following = words.words[position + 1] if position + 1 < len(words.words) else ""
    begins_clause = position == 0 or words.gaps[position] in BREAKS
    alone = words.gaps[position + 1] in BREAKS or following in NO_NOUNS
    return "no" if word == "no" and (alone or (begins_clause and following in _CLAUSE_BEGINNERS)) else None


_ASKS = re.compile(r"\s*(?:is|are|was|were|do|does|did|has|have|can|could)\b", re.IGNORECASE)
_DENYING = frozenset("no not without absent absence isnt arent doesnt dont".split())
_EMPTY_WORDS = _DENYING | frozenset(
    "is are was were do does did has have can could be been there a an the any this that these those it in on of at to "
    "from for with by and evidence sign signs image images picture scan seen see show shows shown showing visible "
    "present identified detected noted observed here patient patients cannot".split()
)


def affirmed_or_denied(words: Words, question: str, choices: Choices) -> Claims:
    """One sentence that says, or denies, all that was asked: "There is no fracture" to "Is there a fracture?"."""
    asked, said = set(Words.of(clean(question)).words), set(words.words)
    subject = asked - _EMPTY_WORDS
    one_sentence = STOPS.isdisjoint(words.gaps[1:-1])
    if not _ASKS.match(question) or not one_sentence or not subject or {"or", "not", "no"} & asked:
        return set()
    if not subject <= said or len(said - _EMPTY_WORDS - subject) > 2 or {"but", "unclear", "possible", "maybe"} & said:
        return set()
    denials = sum(word in _DENYING for word in words.words)
    return {choices.yes_no["no" if denials else "yes"]} if denials <= 1 else set()
