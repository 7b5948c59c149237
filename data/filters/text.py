"""Stage text-filter: figures whose texts speak of medicine, by the number of distinct vocabulary entries in them.

The paper drops a figure whose caption and in-text mentions hold fewer than 5 terms of a medical lexicon (appendix B).
A vocabulary file has an entry a line; further spellings of it follow behind tabs and count as the same entry.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from data.config import TextFilter
from data.steps import Pass, Rows, row_pass
from data.tables import Dropped, Pair, RunFolder
from huatuo_vision.terms import Terms, read_terms

STAGE, PREVIOUS = "text-filter", "ingest"
# Nearly 700 entries written for this project, for tests and demonstrations: neither the paper's list nor a large one.
OWN_VOCABULARY = Path(__file__).with_name("terms.txt")


def vocabulary_path(settings: TextFilter) -> Path:
    return Path(settings.vocabulary) if settings.vocabulary is not None else OWN_VOCABULARY


def read_entries(path: Path) -> list[tuple[str, ...]]:
    """The entries of a vocabulary file. Raises UserError for a file of another format."""
    return read_terms(path, "text_filter.vocabulary")


@lru_cache(maxsize=1)
def _vocabulary(path: Path) -> Terms:
    return Terms(read_entries(path))  # once a process, not once a task


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
