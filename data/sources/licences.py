"""A licence in whatever form a source states it -> one short name: CC-BY-4.0, CC0-1.0, CC-BY-NC-ND-4.0, ..."""

from __future__ import annotations

import re

_URL = re.compile(r"creativecommons\.org/licen[cs]es/([a-z-]+)(?:/(\d\.\d))?", re.IGNORECASE)
_ZERO_URL = re.compile(r"creativecommons\.org/publicdomain/(zero|mark)(?:/(\d\.\d))?", re.IGNORECASE)
_CODE = re.compile(r"\bCC[ -]?(BY(?:[ -](?:NC|ND|SA))*)(?:[ -]v?(\d\.\d))?\b", re.IGNORECASE)
_ZERO_CODE = re.compile(r"\bCC[ -]?0(?:[ -](\d\.\d))?\b|\bCC[ -]?Zero\b", re.IGNORECASE)
_NAME = re.compile(
    r"Creative\s+Commons\s+Attribution((?:[\s–-]*(?:Non-?\s?Commercial|No\s?-?Deriv(?:ative)?s?(?:\s+Works)?"
    r"|Share\s?-?Alike))*)(?:\s+(?:International|Unported|Generic|License|Licence))*\s*\(?v?(?:ersion)?\s*(\d\.\d)?",
    re.IGNORECASE,
)


def licence_name(text: str) -> str | None:
    """The Creative Commons licence that an address, a code or a sentence names; None where it names none."""
    if match := _ZERO_URL.search(text):
        return "CC0-1.0" if match[1].lower() == "zero" else "Public-Domain"
    if match := _URL.search(text):
        return _joined(match[1].upper(), match[2])
    if match := _CODE.search(text):
        return _joined(re.sub(r"[ -]+", "-", match[1].upper()), match[2])
    if _ZERO_CODE.search(text):
        return "CC0-1.0"
    if match := _NAME.search(text):
        said = match[1].lower()
        parts = ["BY"] + [
            short for short, word in (("NC", "commercial"), ("ND", "deriv"), ("SA", "alike")) if word in said
        ]
        return _joined("-".join(parts), match[2])
    return None


def family(licence: str) -> str:
    """The licence without its version."""
    return re.sub(r"-\d+(?:\.\d+)*$", "", licence)


def _joined(kind: str, version: str | None) -> str:
    return f"CC-{kind}-{version}" if version else f"CC-{kind}"
