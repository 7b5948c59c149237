"""The options of a question, and where a reply says their texts. No torch here."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from huatuo_vision.evaluation.words import ARTICLES, CJK, STOPS, Words, clean, normal

# Characters that are read of the sentence that states an answer.
_SENTENCE = 600
_YES_NO = {"yes": "yes", "no": "no", "是": "yes", "是的": "yes", "否": "no", "不是": "no"}


# What a statement names: letters, or None for an option that does not exist.
Claims = set[str | None]


@dataclass(frozen=True)
class Choices:
    """The options of one question, ready to be looked for in replies. Made by `choices_of`."""

    options: tuple[str, ...]

    @cached_property
    def letters(self) -> str:
        return string.ascii_uppercase[: len(self.options)]

    @cached_property
    def cleaned(self) -> dict[str, str]:
        """Letter -> its option, without the letter that some data sets write before every option."""
        texts = {letter: clean(option) for letter, option in zip(self.letters, self.options, strict=True)}
        bare = {letter: re.sub(rf"^\(?{letter}[).:]\s+", "", text) for letter, text in texts.items()}
        return bare if all(bare[letter] != texts[letter] for letter in texts) else texts

    @cached_property
    def texts(self) -> dict[str, Words]:
        return {letter: Words.of(text) for letter, text in self.cleaned.items()}

    @cached_property
    def without_article(self) -> dict[str, Words]:
        """Texts without the article they begin with, where what is left is part of no other option's text."""
        shortened = {}
        for letter, text in self.texts.items():
            short = Words(text.words[1:], text.gaps[1:])
            others = [other for key, other in self.texts.items() if key != letter]
            has_article = bool(text.words and text.words[0] in ARTICLES and short.words)
            if has_article and not any(True for other in others for _ in _spans(other, short)):
                shortened[letter] = short
        return shortened

    @cached_property
    def yes_no(self) -> Mapping[str, str]:
        """ "yes" and "no" -> their letters, where these are the options; else empty."""
        answers = {_YES_NO.get("".join(text.words), ""): letter for letter, text in self.texts.items()}
        return answers if len(self.options) == 2 and set(answers) == {"yes", "no"} else {}

    @cached_property
    def are_letters(self) -> bool:
        return all(is_letter(text) for text in self.texts.values())

    @cached_property
    def _echo(self) -> re.Pattern[str]:
        each = (rf"\(?{letter}[).:]\s*{re.escape(text)}" for letter, text in self.cleaned.items())
        return re.compile(r"[\s.,;]*(?:(?:and|or)\s+)?".join(each), re.IGNORECASE)

    def without_echo(self, text: str) -> str:
        """A text without the list of all options that it repeats."""
        long_enough = len(text) > sum(map(len, self.cleaned.values()))
        return self._echo.sub(" ", text).strip() if long_enough else text

    @cached_property
    def _reach(self) -> int:
        """Characters of a reply that are read where an option's text must begin or end; spacing may differ."""
        return 40 + 2 * max(map(len, self.cleaned.values()))

    def claim(self, letter: str) -> str | None:
        """The letter, or None where no option has it."""
        return letter.upper() if letter.upper() in self.letters else None

    def same_text(self, letter: str) -> set[str | None]:
        return {other for other, text in self.texts.items() if text.words == self.texts[letter].words}

    def begins(self, text: str) -> str | None:
        """The letter of the longest option text that a text begins with, "the" apart."""
        return _longest_at_start(Words.of(text[: self._reach]), self.texts)

    def begins_loosely(self, text: str) -> str | None:
        """The same, for options without their articles too."""
        return self.begins(text) or _longest_at_start(Words.of(text[: self._reach]), self.without_article)

    def begins_with_text_of(self, letter: str, text: str) -> bool:
        """Whether a text begins with an option's text, and with no longer one."""
        stated = self.begins(text)
        return stated is not None and letter.upper() in self.same_text(stated)

    def ends(self, text: str) -> str | None:
        """The letter of the longest option text that a text ends with, single letters apart."""
        words = Words.of(text[-self._reach :]).words
        found = [
            (len(option.words), letter)
            for letter, option in self.texts.items()
            if option.words and words[-len(option.words) :] == option.words and not is_letter(option)
        ]
        return max(found)[1] if found else None

    def first_sentence(self, text: str) -> Words:
        """A text up to the first end of a sentence that is not inside an option's text ("E. coli")."""
        words = Words.of(text[:_SENTENCE])
        inside = {
            position
            for option in self.texts.values()
            for start in _spans(words, option)
            for position in range(start + 1, start + len(option.words))
        }
        ends = (i for i in range(1, len(words.words)) if words.gaps[i] in STOPS and i not in inside)
        return words.first(next(ends, len(words.words)))

    def mentions(self, words: Words) -> list[Mention]:
        """Where option texts stand; of texts within one another the longest only. Articles go where they must."""
        return _mentions(words, self.texts) or _mentions(words, self.without_article)

    def may_mean_longer(self, mention: Mention, words: Words, mentions: Sequence[Mention]) -> bool:
        """Whether a longer option's words surround a shorter one's text: "upper lobe of the left lung"."""
        own = self.texts[mention.letter].words
        elsewhere = {other.letter for other in mentions}
        said = set(words.sentence_at(mention.start))
        return any(
            letter not in elsewhere and len(text.words) > len(own) and set(own) < set(text.words) <= said
            for letter, text in self.texts.items()
        )


@dataclass(frozen=True, slots=True)
class Mention:
    """An option's text in a reply: its first word, and the one after its last."""

    start: int
    end: int
    letter: str
    denied: bool  # said not to be: "no evidence of ...", "... is ruled out"


@lru_cache(maxsize=512)
def choices_of(options: tuple[str, ...]) -> Choices:
    return Choices(options)


def equal_options(options: Sequence[str]) -> set[str]:
    """The letters of the options whose text another option repeats, so that the text alone names neither."""
    texts = {letter: normal(option) for letter, option in zip(string.ascii_uppercase, options, strict=False)}
    return {letter for letter, text in texts.items() if list(texts.values()).count(text) > 1}


def is_letter(option: Words) -> bool:
    """Whether an option's text is a single letter, which stands in any sentence without being meant."""
    return len(option.words) == 1 and re.fullmatch("[a-z]", option.words[0]) is not None


def stands_apart(words: Words, position: int) -> bool:
    """Whether a word is joined to no other. Chinese characters are, without being one word."""
    joined_before = position > 0 and words.gaps[position] == ""
    return not joined_before and words.gaps[position + 1] != ""


def _spans(words: Words, option: Words) -> Iterator[int]:
    """Where an option's words stand in a text. A match runs over the end of a sentence only where the option does."""
    length = len(option.words)
    one_character = length == 1 and re.fullmatch(f"[{CJK}]", option.words[0])
    for start in range(len(words.words) - length + 1):
        if words.words[start : start + length] != option.words or (one_character and not stands_apart(words, start)):
            continue
        inner_gaps = zip(words.gaps[start + 1 : start + length], option.gaps[1:length], strict=True)
        if all(gap not in STOPS or own in STOPS for gap, own in inner_gaps):
            yield start


def _longest_at_start(words: Words, texts: Mapping[str, Words]) -> str | None:
    starts = (0, 1) if words.words[:1] == ("the",) else (0,)
    near = words.first(max((len(option.words) for option in texts.values()), default=0) + 1)
    near = near if len(near.words) < len(words.words) else words
    found = [
        (len(option.words), letter)
        for letter, option in texts.items()
        if option.words and any(start in starts for start in _spans(near, option))
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _mentions(words: Words, texts: Mapping[str, Words]) -> list[Mention]:
    spans = [
        (start, start + len(option.words), letter)
        for letter, option in texts.items()
        if option.words and not is_letter(option)
        for start in _spans(words, option)
        if not _counts_letters(words, start, option)
    ]
    longest = [
        (start, end, letter)
        for start, end, letter in spans
        if not any(s <= start and end <= e and e - s > end - start for s, e, _ in spans)
    ]
    inside = {position for start, end, _ in longest for position in range(start, end)}
    return [Mention(start, end, letter, denied(words, start, end, inside)) for start, end, letter in longest]


def _counts_letters(words: Words, start: int, option: Words) -> bool:
    """Whether an option "Both" or "Neither" is said of letters here: "both A and B"."""
    if option.words not in {("both",), ("neither",), ("either",)}:
        return False
    following = [word for word in words.words[start + 1 : start + 3] if word not in ("option", "options")]
    return bool(following) and re.fullmatch("[a-z]", following[0]) is not None


# --- Denial -------------------------------------------------------------------------------------------------------

_NEGATORS = frozenset(
    "no not nothing without never neither nor cannot cant isnt arent wasnt werent doesnt dont didnt hasnt havent "
    "wouldnt couldnt shouldnt exclude excludes excluded excluding absent absence lack lacks lacking unlikely except "
    "denies non eliminate eliminates eliminated reject rejects rejected against".split()
)
_NEGATING_PAIRS = frozenset(
    [("rather", "than"), ("likely", "than"), ("other", "than"), ("instead", "of"), ("less", "likely")]
    + [("negative", "for"), ("free", "of")]
    + [(rule, "out") for rule in ("rule", "rules", "ruled", "ruling")]
)
# What ends a negation's reach.
_BREAKERS = frozenset(
    "but however although though instead rather leaving leaves is are was were shows show showing suggests suggest "
    "indicates indicate represents represent demonstrates reveals has have so therefore thus hence because since "
    "consistent it this".split()
)
_DENIED_AFTER = re.compile(
    r"(?:(?:is|are|was|were|can|could|would|may|might|seems?|appears?|be|been|has|have|does|do|did|also|very|highly"
    r"|therefore|clearly|an?) )*"
    r"(?:not|isnt|arent|wasnt|werent|doesnt|dont|didnt|cannot|cant|couldnt|unlikely|less likely|absent|excluded"
    r"|ruled out|wrong|incorrect|false|never)\b"
)
_CJK_DENIED_BEFORE = re.compile(
    "(?:不是|不存在|不支持|没有|沒有|未见|未見|无|無|非|排除|并非|否认|不像|除外|不考虑)[的是为有]?$"
)
_CJK_DENIED_AFTER = re.compile(
    "的?可能性(?:较|很)?小|是?不对|不正确|是?错|不是|不符|被排除|可以?排除|不成立|不支持|除外"
)


def denied(words: Words, start: int, end: int, inside: Collection[int] = ()) -> bool:
    """Whether the words from start to end are asked about, or said not to be.

    Words `inside` option texts do not negate what follows: "no fracture or fracture".
    """
    if next(gap for gap in words.gaps[end:] if gap in STOPS) == "?":
        return True
    before, after = "".join(words.words[max(0, start - 6) : start]), "".join(words.words[end : end + 8])
    if _CJK_DENIED_BEFORE.search(before) or _CJK_DENIED_AFTER.match(after):
        return True
    stop = next((i for i in range(end, len(words.words)) if words.gaps[i] in (*STOPS, ",")), len(words.words))
    return _DENIED_AFTER.match(" ".join(words.words[end:stop])) is not None or _denied_before(words, start, inside)


def _denied_before(words: Words, start: int, inside: Collection[int]) -> bool:
    for position in range(start - 1, -1, -1):
        if words.gaps[position + 1] in STOPS:
            return False
        if position in inside:
            continue
        word, pair = words.words[position], words.words[position : position + 2]
        if word in _NEGATORS or pair in _NEGATING_PAIRS:
            return True
        if word == "unlike":
            return "," not in words.gaps[position + 1 : start + 1]
        if word in _BREAKERS:
            return position > 0 and words.gaps[position] == " " and words.words[position - 1] in _NEGATORS
    return False
