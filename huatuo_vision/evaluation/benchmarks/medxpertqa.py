"""MedXpertQA-MM: expert questions with five options and one to six pictures. No torch here.

Design decisions:

- Rows: the test split (2,000) of configuration MM in TsinghuaC3I/MedXpertQA, all multiple choice; the id is the data
  set's own ("MM-26").
- The published question already ends in "Answer Choices: (A) ... (B) ...". That part is cut off from its last
  occurrence on: every protocol lists the options in its own form, and twice would be another prompt.
- Options are an object of letters, or a list of {letter, content}; gold is a letter.
- Pictures are named in `images`, lie in images.zip, and are all shown.
- Groups: task (medical_task), body_system, and skill (the data set's question_type: Reasoning or Understanding).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huatuo_vision.evaluation.benchmarks import gold
from huatuo_vision.evaluation.benchmarks.sources import Record, Repository, Source
from huatuo_vision.evaluation.rows import Benchmark, Loaded, Row

NAME = "medxpertqa-mm"
FILES = Repository(NAME, "TsinghuaC3I/MedXpertQA", ("MM/test*",), archives=("images.zip",), folders=("images",))
CHOICES = "Answer Choices:"
GROUPS = {"task": "medical_task", "body_system": "body_system", "skill": "question_type"}


def load(path: Path | None) -> Loaded:
    with FILES.open(path) as source:
        return source.loaded(_rows(source))


def _rows(source: Source) -> Iterator[Row]:
    for record in source.records(("id", "question", "options", "label", "images"), tuple(GROUPS.values())):
        letters, options = _options(record)
        names = record.get("images")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise record.error("its images are no list of names; check that it is a row of configuration MM")
        yield Row(
            benchmark=NAME,
            id=record.text("id"),
            question=_question(record),
            question_type="multiple-choice",
            options=options,
            answer=gold.letter_of_letter(record.get("label"), letters, record),
            images=tuple(source.images.named(name) for name in names),
            groups={group: record.text(column) for group, column in GROUPS.items() if record.get(column)},
        )


def _question(record: Record) -> str:
    text = record.text("question")
    question, found, _ = text.rpartition(CHOICES)
    if found and not question.strip():
        raise record.error(f"the question consists of {CHOICES!r} alone; download the data again")
    return question.strip() if found else text


def _options(record: Record) -> tuple[tuple[str, ...], tuple[str, ...]]:
    value: Any = record.get("options")
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        value = {item.get("letter"): item.get("content") for item in value}
    if not isinstance(value, Mapping) or not all(isinstance(letter, str) for letter in value):
        raise record.error("the options are no object of letters and texts; check that it is the right file")
    return gold.options_by_letter(sorted(value.items()), record)


MEDXPERTQA_MM = Benchmark(
    name=NAME,
    title="MedXpertQA-MM",
    row_filter="all test rows of configuration MM, without the choices in the question's text",
    expected_n=2_000,
    macro_over="task",
    note="Five options. The official numbers come from two turns of reasoning, not from a direct answer.",
    load=load,
)
