"""The words of a reply, in one spelling: what our own rules compare. No torch here."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

CJK = "\u3400-\u9fff\uf900-\ufaff"
KANA_HANGUL = "\u3040-\u30ff\uac00-\ud7af"


def any_of(*alternatives: str) -> str:
    """The pattern of one of several patterns."""
    return f"(?:{'|'.join(alternatives)})"


_SPECIAL_TOKENS = re.compile(
    any_of(
        r"<\|[^|<>]{1,40}\|>",
        r"</?s>",
        r"<(?:pad|unk|bos|eos|start_of_turn|end_of_turn)>",
        r"\[/?INST\]",
        "[\u200b-\u200f\u2060\ufeff\u00ad\ufffd\ud800-\udfff]",  # zero-width signs, soft hyphens, halves of signs
    )
)
# Behind the end of its turn a model talks to itself.
_TURN_ENDS = re.compile(
    r"(?<=\S)\s*(?:<\|(?:endoftext|im_end|eot_id|end_of_text|end)\|>|</s>|<eos>|<end_of_turn>).*", re.DOTALL
)
_TABLE_RULE = re.compile(r"^[ \t]*(?:\|[ \t]*)?:?-{3,}[-|: \t]*$\n?", re.MULTILINE)
_TABLE_ROW = re.compile(r"^[ \t]*\|(.+)\|[ \t]*$", re.MULTILINE)
_THOUGHT = re.compile(r"\A.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_HTML = re.compile(
    any_of(
        r"</?(?:em|strong|span|div|code|think(?:ing)?)>",
        r"<br\s*/?>",
        r"<(?P<tag>[biup])>(?=.*</(?P=tag)>)",  # only in pairs: "<B>" is an answer
        r"</[biup]>",
    ),
    re.IGNORECASE,
)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|bf|rm)\s*\{([^{}]*)\}")
_LATEX_SIGNS = re.compile(r"\\[()\[\],;! ]|\$")
_MARKDOWN = re.compile(
    any_of(r"\*+(?=\S)", r"(?<=\S)\*+", "`+", r"(?<!\w)_+", r"_+(?!\w)", r"^[ \t]*(?:#+|[-*•]|>(?![ \t]*\d))[ \t]+"),
    re.MULTILINE,
)
_EMPHATIC_NO = re.compile(r"\b(?:no|without(?: an?y?)?) (?:doubt|question)\b|\bnot only\b", re.IGNORECASE)
_PLAIN_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "−": "-"})


def clean(text: str) -> str:
    """One spelling of signs (NFKC), without special tokens, thoughts, HTML, LaTeX and Markdown."""
    text = _SPECIAL_TOKENS.sub("", _TURN_ENDS.sub("", text))
    text = unicodedata.normalize("NFKC", text).translate(_PLAIN_QUOTES)
    text = _HTML.sub(" ", _THOUGHT.sub("", text))
    text = _TABLE_ROW.sub(lambda row: ": ".join(row[1].split("|")), _TABLE_RULE.sub("", text))
    text = _LATEX_SIGNS.sub(" ", _LATEX_TEXT.sub(r"\1", text))
    return _EMPHATIC_NO.sub(" ", _MARKDOWN.sub("", text)).strip()


_OTHER_SCRIPT = rf"(?:(?![{CJK}])[^\W_])+"
_WORD = re.compile(
    any_of(
        f"[{CJK}]",  # every Chinese character is a word
        r"(?<![\w.])[-+]?(?:\d+(?:[.,]\d+)*|\.\d+)",
        r"(?<=\w)\+|(?<=\w)-(?!\w)|[<>≤≥=±%°^×↑↓]",  # signs that make a value another one: "<5", "10 %", "ER-"
        rf"{_OTHER_SCRIPT}(?:'{_OTHER_SCRIPT})*",
    )
)
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
UNITS = {
    unit: names[0]
    for names in (
        ("%", "percent", "per cent", "percentage"),
        ("mm", "millimeter", "millimeters", "millimetre", "millimetres", "毫米"),
        ("cm", "centimeter", "centimeters", "centimetre", "centimetres", "厘米"),
        ("m", "meter", "meters", "metre", "metres"),
        ("μm", "um", "micrometer", "micrometers", "micron", "microns"),
        ("ml", "milliliter", "milliliters", "millilitre", "millilitres"),
        ("l", "liter", "liters", "litre", "litres"),
        ("mg", "milligram", "milligrams"), ("g", "gram", "grams"), ("kg", "kilogram", "kilograms"),
        ("s", "sec", "second", "seconds"),
        ("min", "minute", "minutes"), ("h", "hr", "hrs", "hour", "hours"), ("day", "days"),
        ("week", "weeks"), ("month", "months"),
        ("year", "years", "yr", "yrs"), ("°", "degree", "degrees"), ("°c", "celsius"),
        ("mmhg",), ("bpm",), ("hu",), ("cc",),
    )
    for unit in names
}  # fmt: skip
NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}

_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？;；\n]")
_CLAUSE_END = re.compile(r"[,:、()/\[\]\"—–]|\s-\s")

# Gaps between words: those that end a sentence, and those that end at least a clause.
STOPS = frozenset(".?")
BREAKS = frozenset(".?,/")


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a text, casefolded and without apostrophes, numbers and units in one spelling, and the gaps.

    A gap is "." or "?" at the end of a sentence, "," of a clause, "/", " ", or "" between joined words. There is one
    more gap than words: the last is what follows the last word.
    """

    words: tuple[str, ...]
    gaps: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Words:
        words, gaps, end = [], [], 0
        for match in _WORD.finditer(text):
            word = _casefolded(match)
            words.append(_measured(word, words[-1] if words else ""))
            gaps.append(_gap(text, end, match.start()))
            end = match.end()
        text += "\n"
        gaps.append(_gap(text, end, len(text)))
        return cls(tuple(words), tuple(gaps))

    def first(self, count: int) -> Words:
        """The first words, as a sentence of their own."""
        return Words(self.words[:count], (*self.gaps[:count], "."))

    def sentence_at(self, position: int) -> tuple[str, ...]:
        """The words of the sentence that a word stands in."""
        begin = max((i for i in range(position + 1) if self.gaps[i] in STOPS), default=0)
        end = next((i for i in range(position + 1, len(self.words)) if self.gaps[i] in STOPS), len(self.words))
        return self.words[begin:end]


def _casefolded(match: re.Match[str]) -> str:
    word = match[0].casefold().replace("'", "")
    return word.replace(",", "") if _GROUPED.fullmatch(word) else word


def _measured(word: str, before: str) -> str:
    """ "3.50" -> "3.5", "three" -> "3", and behind a number "centimeters" -> "cm"; "one" is mostly a pronoun."""
    if re.fullmatch(r"[-+]?\d*\.\d+", word):
        return word.rstrip("0").rstrip(".") or "0"
    if re.fullmatch(r"[-+]?[\d.]+", before) and word in UNITS:
        return UNITS[word]
    return NUMBER_WORDS.get(word, word) if word != "one" else word


def _gap(text: str, begin: int, end: int) -> str:
    between = text[begin:end]
    # With the sign that follows: a full stop before a word is none ("E.coli").
    if stop := _SENTENCE_END.search(text[begin : end + 1], 0, end - begin):
        return "?" if stop[0] == "?" else "."
    if _CLAUSE_END.search(between):
        return "/" if between == "/" else ","
    return " " if between else ""


ARTICLES = ("a", "an", "the")


def normal(text: str) -> str:
    """Text as it is compared: words without case, articles, punctuation and spacing (of an article alone, itself)."""
    words = tuple(map(_casefolded, _WORD.finditer(clean(text))))
    return " ".join([word for word in words if word not in ARTICLES] or words)


_UNABLE = any_of(
    *("cannot", "can't", "could not", "couldn't", "unable to", "not able to", "can not"),
    *("impossible to", "not possible to", "difficult to", "hard to"),
)
_ANSWERING = any_of(
    *("determined?", "answer(?:ed)?", "say", "said", "tell", "told", "identif(?:y|ied)", "provide", r"diagnos\w+"),
    *(
        "see",
        "view",
        "assist",
        "help",
        "concluded?",
        "assess(?:ed)?",
        "interpret(?:ed)?",
        "analy[sz]ed?",
        "make",
        "give",
    ),
    *("confirm(?:ed)?", "choose", "decided?", "judged?", "know"),
)
_REFUSAL = re.compile(
    any_of(
        rf"\b{_UNABLE}\s+(?:\w+\s+){{0,3}}?{_ANSWERING}\b",
        r"\bas an ai\b",
        r"\bi(?:'m| am) (?:sorry|unable|not (?:sure|certain|able))",
        r"\bi apologi[sz]e|\bi (?:must )?(?:decline|refuse)\b",
        r"\b(?:do not|don't|doesn't) (?:know|have enough)|\bno idea\b",
        r"\b(?:insufficient|not enough) (?:information|data|evidence|context)",
        "无法|不能(?:确定|判断|回答)|抱歉|对不起|不知道|不确定|不清楚",
    ),
    re.IGNORECASE,
)


def refuses(text: str) -> bool:
    """Whether a reply, cleaned, declines to answer."""
    return _REFUSAL.search(text) is not None
