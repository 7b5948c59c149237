"""A list of terms, and which of its entries a text names. Needs pyahocorasick.

A file has an entry a line, further spellings of it behind tabs: what python -m data.filters.vocabulary writes, and what
a cut of the UMLS gives (huatuo_vision/evaluation/README.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import ahocorasick

from huatuo_vision.schema import UserError

_LONGEST = 200  # characters of an entry; a longer line is no list's


class Terms:
    """Finds entries in texts, whole words only, capitals or not."""

    def __init__(self, entries: Iterable[Iterable[str]]):
        self._automaton = ahocorasick.Automaton()
        for number, spellings in enumerate(entries):
            for spelling in spellings:
                # Two entries may share a spelling: it then counts for both.
                known = self._automaton.get(spelling, (len(spelling), ()))[1]
                self._automaton.add_word(spelling, (len(spelling), (*known, number)))
        self._automaton.make_automaton()

    def count(self, text: str) -> int:
        """The number of distinct entries in the text, those inside longer ones included."""
        return len({number for _, _, numbers in self._matches(text) for number in numbers})

    def longest(self, text: str) -> set[int]:
        """The entries that the text names; of "chest pain" that one, and neither "chest" nor "pain"."""
        found: set[int] = set()
        until = 0
        for _, end, numbers in sorted(self._matches(text), key=lambda match: (match[0], -match[1])):
            if end > until:
                found.update(numbers)
                until = end
        return found

    def _matches(self, text: str) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Begin, end and entries of every spelling in the text."""
        text = text.lower()
        for last, (length, numbers) in self._automaton.iter(text):
            begin, end = last + 1 - length, last + 1
            if (begin == 0 or not text[begin - 1].isalnum()) and (end == len(text) or not text[end].isalnum()):
                yield begin, end, numbers


def read_terms(path: Path, setting: str) -> list[tuple[str, ...]]:
    """The entries of a file, each with its spellings, in lower case.

    setting: what an error calls the file. Raises UserError for one that is not there or has another format.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{setting}: {path} does not exist; python -m data.filters.vocabulary makes one from MeSH or the "
            "SPECIALIST Lexicon"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise _wrong_format(setting, path, f"can't be read as UTF-8 text ({said})") from None
    return list(_entries(text, setting, path))


def _entries(text: str, setting: str, path: Path) -> Iterator[tuple[str, ...]]:
    empty = True
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#") or not line.strip():
            continue
        if line.startswith(("<", "{", "[")) or "\0" in line or "|" in line or len(line) > 50 * _LONGEST:
            raise _wrong_format(setting, path, f"line {number} is {line[:60]!r}")
        spellings = tuple(dict.fromkeys(" ".join(s.lower().split()) for s in line.split("\t") if s.strip()))
        if max(map(len, spellings)) > _LONGEST:
            raise _wrong_format(setting, path, f"line {number} has a spelling of more than {_LONGEST} characters")
        empty = False
        yield spellings
    if empty:
        raise _wrong_format(setting, path, "it holds no entry")


def _wrong_format(setting: str, path: Path, what: str) -> UserError:
    return UserError(
        f"{setting}: {path}: {what}; expected an entry a line, further spellings behind tabs, as "
        "python -m data.filters.vocabulary writes them"
    )
