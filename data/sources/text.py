"""Text of other people's making -> plain text on one line."""

from __future__ import annotations

import html
import re

from huatuo_vision.html import encodable

# Only what is certainly a tag: "p < 0.05 and n > 3" stays as it is.
_TAG_NAMES = (
    "a|abbr|b|blockquote|br|code|div|em|font|h[1-6]|hr|i|img|li|ol|p|pre|s|small|span|strong|sub|sup|table|tbody|td"
)
_TAG_NAMES += "|th|thead|tr|u|ul|jats:[a-z]+"
_TAG = re.compile(rf"</?(?:{_TAG_NAMES})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_BETWEEN_BLOCKS = re.compile(r"</?(?:br|p|div|li|tr|td|th|h[1-6]|table|ul|ol|blockquote|hr)\b[^<>]*>", re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")


def plain_text(text: str) -> tuple[str, bool]:
    """The text without HTML and with its white space folded, and whether there was HTML to take out."""
    was_html = bool(_TAG.search(text) or _HIDDEN.search(text))
    if was_html:
        text = _HIDDEN.sub(" ", text)
        text = html.unescape(_TAG.sub("", _BETWEEN_BLOCKS.sub(" ", text)))
    return folded(text), was_html


def folded(text: str) -> str:
    return encodable(" ".join(_UNPRINTABLE.sub(" ", text).split()))
