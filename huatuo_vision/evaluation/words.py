"""The words of a reply, in one spelling: what our own rules compare. No torch here."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

CJK = "\u3400-\u9fff\uf900-\ufaff"

_SPECIAL_TOKENS = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?s>|<(?:pad|unk|bos|eos|start_of_turn|end_of_turn)>|\[/?INST\]|[\u200b-\u200f\u2060\ufeff\u00ad]"
)
_THOUGHT = re.compile(r".*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_HTML = re.compile(r"</?(?:em|strong|span|div|code|think(?:ing)?)>|<br\s*/?>|<(?P<tag>[biup])>(?=.*</(?P=tag)>)|</[biup]>", re.IGNORECASE)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|bf|rm)\s*\{([^{}]*)\}")
_LATEX_SIGNS = re.compile(r"\\[()\[\],;! ]|\$")
_MARKDOWN = re.compile(r"\*+(?=\S)|(?<=\S)\*+|`+|(?<!\w)_+|_+(?!\w)|^[ \t]*(?:#+|[-*•]|>(?![ \t]*\d))[ \t]+", re.MULTILINE)
_EMPHATIC_NO = re.compile(r"\b(?:no|without(?: an?y?)?) (?:doubt|question)\b|\bnot only\b", re.IGNORECASE)


def clean(text: str) -> str:
    """One spelling of signs (NFKC), without special tokens, thoughts, HTML, LaTeX and Markdown."""
    text = unicodedata.normalize("NFKC", _SPECIAL_TOKENS.sub("", text)).replace("’", "'").replace("−", "-")
    text = _THOUGHT.sub("", text).replace("“", '"').replace("”", '"').replace("‘", "'")
    text = _LATEX_SIGNS.sub(" ", _LATEX_TEXT.sub(r"\1", _HTML.sub(" ", text)))
    return _EMPHATIC_NO.sub(" ", _MARKDOWN.sub("", text)).strip()


# Signs that make a value another one are words of their own: "<5", "10 %", "ER-".
_WORD = re.compile(
    rf"[{CJK}]|(?<![\w.])[-+]?(?:\d+(?:[.,]\d+)*|\.\d+)|(?<=\w)\+|(?<=\w)-(?!\w)|[<>≤≥=±%°^×↑↓]"
    rf"|(?:(?![{CJK}])[^\W_])+(?:'(?:(?![{CJK}])[^\W_])+)*"
)
STOPS = frozenset(".?")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？;；\n]")
_CLAUSE_END = re.compile(r"[,:、()/\[\]\"—–]|\s-\s")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a text, casefolded, and what stands before each: "." and "?" end a sentence, "," a clause, "/" joins."""

    words: tuple[str, ...]
    gaps: tuple[str, ...]  # one more than words: the last is what follows the last word

    @classmethod
    def of(cls, text: str) -> Words:
        words, gaps, end = [], [], 0
        for match in _WORD.finditer(text):
            word = match[0].casefold().replace("'", "")
            words.append(word.replace(",", "") if _GROUPED.fullmatch(word) else word)
            gaps.append(_gap(text[end : match.end()], match.start() - end))
            end = match.end()
        gaps.append(_gap(text[end:] + "\n", len(text)))
        return cls(tuple(words), tuple(gaps))

    @property
    def joined(self) -> str:
        """The words with spaces between, and the slash of "yes/ no"."""
        return " ".join(word + ("/" if gap == "/" else "") for word, gap in zip(self.words, self.gaps[1:], strict=True))


def _gap(text: str, length: int) -> str:
    if end := _SENTENCE_END.search(text[: length + 1], 0, length):
        return "?" if end[0] in "?？" else "."
    if text[:length] == "/":
        return "/"
    return "," if _CLAUSE_END.search(text, 0, length) else ""


ARTICLES = ("a", "an", "the")


def normal(text: str) -> str:
    """Text as it is compared: words without case, articles, punctuation and spacing (of an article alone, itself)."""
    words = Words.of(clean(text)).words
    return " ".join([word for word in words if word not in ARTICLES] or words)


_REFUSAL = re.compile(
    r"\b(?:cannot|can't|can\s+not|could\s+not|couldn't|unable\s+to|not\s+able\s+to|impossible\s+to|difficult\s+to|hard\s+to|not\s+possible\s+to)\s+(?:\w+\s+){0,3}?"
    r"(?:determined?|answer(?:ed)?|say|said|tell|told|identif(?:y|ied)|provide|diagnos\w+|see|view|assist|help|concluded?|assess(?:ed)?|interpret|analy[sz]e|make|give|confirm|choose|decide|judge|know)\b"
    r"|\bas an ai\b|\bi(?:'m| am) (?:sorry|unable|not (?:sure|certain|able))|\bi apologi[sz]e|\b(?:do not|don't|doesn't) (?:know|have enough)|\bno idea\b|\b(?:insufficient|not enough) (?:information|data|evidence|context)"
    r"|\bi (?:must )?(?:decline|refuse)\b|无法|不能(?:确定|判断|回答)|抱歉|对不起|不知道|不确定|不清楚",
    re.IGNORECASE,
)


def refuses(text: str) -> bool:
    """Whether a reply, cleaned, declines to answer."""
    return _REFUSAL.search(text) is not None
