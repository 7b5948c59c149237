"""Stage text-filter: figures whose texts speak of medicine, by the number of distinct vocabulary entries in them.

The paper drops a figure whose caption and in-text mentions hold fewer than 5 terms of a medical lexicon (appendix B).
A vocabulary file has an entry a line; further spellings of it follow behind tabs and count as the same entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import ahocorasick
from datatrove.pipeline.base import PipelineStep

from data.config import TextFilter
from data.steps import Pass, Rows, row_pass
from data.tables import Dropped, Pair, RunFolder
from huatuo_vision.schema import UserError

STAGE, PREVIOUS = "text-filter", "ingest"
# Nearly 700 entries written for this project, for tests and demonstrations: neither the paper's list nor a large one.
OWN_VOCABULARY = Path(__file__).with_name("terms.txt")
_LONGEST = 200  # characters of an entry; a longer line is no vocabulary's


class Vocabulary:
    """Finds a vocabulary's entries in texts, whole words only, capitals or not."""

    def __init__(self, entries: Iterable[Iterable[str]]):
        self._automaton = ahocorasick.Automaton()
        for number, spellings in enumerate(entries):
            for spelling in spellings:
                # Two entries may share a spelling: it then counts for both.
                known = self._automaton.get(spelling, (len(spelling), ()))[1]
                self._automaton.add_word(spelling, (len(spelling), (*known, number)))
        self._automaton.make_automaton()

    def count(self, text: str) -> int:
        """The number of distinct entries in the text."""
        text = text.lower()
        found: set[int] = set()
        for end, (length, numbers) in self._automaton.iter(text):
            before, after = end - length, end + 1
            if (before < 0 or not text[before].isalnum()) and (after == len(text) or not text[after].isalnum()):
                found.update(numbers)
        return len(found)


def vocabulary_path(settings: TextFilter) -> Path:
    return Path(settings.vocabulary) if settings.vocabulary is not None else OWN_VOCABULARY


def read_entries(path: Path) -> list[tuple[str, ...]]:
    """The entries of a vocabulary file, in lower case. Raises UserError for a file of another format."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"text_filter.vocabulary: {path} does not exist; python -m data.filters.vocabulary makes one from MeSH or "
            "the SPECIALIST Lexicon"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong_format(path, f"can't be read as UTF-8 text ({' '.join(str(error).split())})") from None
    return list(_entries(text, path))


def _entries(text: str, path: Path) -> Iterator[tuple[str, ...]]:
    empty = True
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#") or not line.strip():
            continue
        if line.startswith(("<", "{", "[")) or "\0" in line or "|" in line or len(line) > 50 * _LONGEST:
            raise _wrong_format(path, f"line {number} is {line[:60]!r}")
        spellings = tuple(dict.fromkeys(" ".join(s.lower().split()) for s in line.split("\t") if s.strip()))
        if max(map(len, spellings)) > _LONGEST:
            raise _wrong_format(path, f"line {number} has a spelling of more than {_LONGEST} characters")
        empty = False
        yield spellings
    if empty:
        raise _wrong_format(path, "it holds no entry")


def _wrong_format(path: Path, what: str) -> UserError:
    return UserError(
        f"text_filter.vocabulary: {path}: {what}; expected an entry a line, further spellings behind tabs, as "
        "python -m data.filters.vocabulary writes them"
    )


@lru_cache(maxsize=1)
def _vocabulary(path: Path) -> Vocabulary:
    return Vocabulary(read_entries(path))  # once a process, not once a task


def text_filter_pass(run: RunFolder, settings: TextFilter, tasks: int) -> Pass:
    path = vocabulary_path(settings)
    entries = read_entries(path)
    record = {
        "min_terms": settings.min_terms,
        "min_words": settings.min_words,
        "vocabulary": path.name if path != OWN_VOCABULARY else "our own short list (for tests and demonstrations)",
        "entries": len(entries),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    return row_pass(run, STAGE, PREVIOUS, tasks, (CountTerms(path, settings),), record)


class CountTerms(PipelineStep):
    type, name = "filter", "terms"

    def __init__(self, vocabulary: Path, settings: TextFilter):
        super().__init__()
        self.vocabulary, self.settings = vocabulary, settings

    def run(self, data: Rows, rank: int = 0, world_size: int = 1) -> Rows:
        vocabulary = _vocabulary(self.vocabulary)
        for row in data:
            if not isinstance(row, Pair) or not row.annotated:
                yield row
                continue
            if (words := len(row.caption.split())) < self.settings.min_words:
                yield Dropped(row.id, "few_words", f"{words} of at least {self.settings.min_words}")
                continue
            terms = vocabulary.count("\n".join((row.caption, *row.context)))
            if terms < self.settings.min_terms:
                yield Dropped(row.id, "few_terms", f"{terms} of at least {self.settings.min_terms}")
            else:
                yield replace(row, terms=terms)
