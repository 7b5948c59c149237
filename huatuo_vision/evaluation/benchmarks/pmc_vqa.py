"""PMC-VQA: four options about a figure of a paper, in three test sets. No torch here.

Design decisions:

- Rows: all of test_clean.csv (pmc-vqa, 2,000, checked by hand: the set that papers mean), test.csv (pmc-vqa-v1,
  50,000) or test_2.csv (pmc-vqa-v2, 33,430, panels of compound figures) of RadGenome/PMC-VQA; the id is the position
  in the file. All rows are multiple choice.
- Choices carry a prefix of their own ("A: Liver", " B:Spleen"); a choice's own letter with a colon is cut off, and
  nothing else ("A. fumigatus" is an option).
- Gold is the letter in `Answer_label` where the file has that column, else `Answer`: a letter, or the text of a
  choice (also with its prefix).
- Pictures are found by `Figure_path` in images.zip (images_2.zip for v2), read in place, or in its unpacked folder.
- Trap: in v2 the gold letters are skewed, a constant C has 37.8 %. Trap: the three sets share next to no rows, so a
  number that does not say which one compares with nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from huatuo_vision.evaluation.benchmarks import gold
from huatuo_vision.evaluation.benchmarks.sources import Record, Repository, Source
from huatuo_vision.evaluation.rows import Benchmark, Loaded, Row

LETTERS = "ABCD"
COLUMNS = ("Figure_path", "Question", "Answer", *(f"Choice {letter}" for letter in LETTERS))


def load(repository: Repository, path: Path | None) -> Loaded:
    with repository.open(path) as source:
        return source.loaded(_rows(source))


def _rows(source: Source) -> Iterator[Row]:
    for record in source.records(COLUMNS, ("Answer_label",)):
        choices = [(letter, _without_prefix(record.get(f"Choice {letter}") or "", letter)) for letter in LETTERS]
        letters, options = gold.options_by_letter(choices, record)
        answer, extra = _answer(record, letters, options)
        yield Row(
            benchmark=source.benchmark,
            id=str(record.index),
            question=record.text("Question"),
            question_type="multiple-choice",
            options=options,
            answer=answer,
            images=(source.images.named(record.text("Figure_path")),),
            groups={},
            extra=extra,
        )


def _answer(record: Record, letters: tuple[str, ...], options: tuple[str, ...]) -> tuple[str, dict]:
    if record.get("Answer_label"):
        return gold.letter_of_letter(record.get("Answer_label"), letters, record), {}
    answer = record.text("Answer")
    # "D" is the letter even where an option reads "D": in files without Answer_label, Answer is one.
    if answer in letters:
        return gold.letter_of_letter(answer, letters, record), {}
    if prefix := re.match(r"([A-D])\s*:", answer):
        answer = _without_prefix(answer, prefix[1])
    return gold.letter_of_text(answer, options, record)


def _without_prefix(choice: str, letter: str) -> str:
    return re.sub(rf"^\s*{letter}\s*:\s*", "", choice).strip() or choice


def _benchmark(name: str, title: str, table: str, archive: str, expected_n: int, note: str) -> Benchmark:
    folders = (archive.removesuffix(".zip"), "images", "figures")
    files = Repository(name, "RadGenome/PMC-VQA", (table,), archives=(archive,), folders=tuple(dict.fromkeys(folders)))
    # No column says what a question is about, so the only group is the kind of question.
    return Benchmark(name, title, f"all rows of {table}", expected_n, "question_type", note, partial(load, files))


BENCHMARKS = (
    _benchmark(
        "pmc-vqa",
        "PMC-VQA (clean test set)",
        "test_clean.csv",
        "images.zip",
        2_000,
        "The 2,000 rows checked by hand. Numbers on test.csv (50,000) or test_2.csv (33,430) do not compare.",
    ),
    _benchmark(
        "pmc-vqa-v1", "PMC-VQA, test v1", "test.csv", "images.zip", 50_000, "Generated rows, not checked by hand."
    ),
    _benchmark(
        "pmc-vqa-v2",
        "PMC-VQA, test v2",
        "test_2.csv",
        "images_2.zip",
        33_430,
        "Skewed gold letters: a constant C has 37.8 %. Not the 2,000 rows that papers mean.",
    ),
)
