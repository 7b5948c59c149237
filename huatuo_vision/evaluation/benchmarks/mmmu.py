"""MMMU and MMMU-Pro, Health & Medicine: college questions with one to seven pictures. No torch here.

Design decisions:

- Rows of MMMU: the five subjects in alphabetical order, one configuration of MMMU/MMMU each: dev 25, validation 150
  (145 multiple choice + 5 open), test 1,752 (1,712 + 40). The id is the data set's own ("validation_Pharmacy_1").
  Rows of MMMU-Pro: the 286 of its 1,730 test rows whose `subject` is one of the five, with ten options, with four,
  or as a screenshot.
- `options` is a list written as a Python literal. Gold is a letter; for open questions a text, or several in a list
  literal, each of which is accepted. Gold "?" of the test split is hidden: its rows are asked, written into the
  submission file, and never graded. Copies of the test answers circulate; they are not used here, and a training mix
  that contains them spoils the number.
- Pictures are the columns image_1 to image_7 that are not empty, in this order, all shown; "<image 2>" in a question
  or an option stays as plain text and names the second of them. They are held in memory, equal ones once (test: about
  1 GB).
- Trap: many harnesses show only image_1. Trap: HuatuoGPT-Vision's validation numbers are over 145 rows. Trap:
  MMMU-Pro's options are shuffled, so `<image i>` occur out of order.
- MMMU-Pro's vision rows have no question text, and both question and options are in the picture. `extra` says
  `options_in_image`: the prompt must not repeat the options; they are kept for reading the reply.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from huatuo_vision.evaluation.benchmarks import gold
from huatuo_vision.evaluation.benchmarks.sources import Record, Repository, Source
from huatuo_vision.evaluation.rows import Benchmark, Loaded, Row

SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
VISION_QUESTION = "Answer the multiple-choice question in the picture."


def load(repository: Repository, path: Path | None) -> Loaded:
    with repository.open(path) as source:
        return source.loaded(_rows(source))


def load_pro(repository: Repository, path: Path | None) -> Loaded:
    with repository.open(path) as source:
        return source.loaded(_pro_rows(source))


def load_pro_vision(repository: Repository, path: Path | None) -> Loaded:
    with repository.open(path) as source:
        return source.loaded(_vision_rows(source))


def _rows(source: Source) -> Iterator[Row]:
    required = ("id", "question", "options", "answer", "question_type", "image_1")
    for record in source.records(required, (*IMAGES, "topic_difficulty", "subfield")):
        found = re.fullmatch(r"[a-z]+_(\w+)_\d+", record.text("id"))
        if found is None:
            raise record.error(f"the id is {record.text('id')!r}; expected one such as validation_Pharmacy_1")
        if found[1] not in SUBJECTS:
            continue
        kind = record.text("question_type")
        if kind not in ("multiple-choice", "open"):
            raise record.error(f"the question_type is {kind!r}; expected multiple-choice or open")
        options, answer = (
            _choices(record)
            if kind == "multiple-choice"
            else (None, gold.accepted_answers(record.get("answer"), record))
        )
        groups = {"subject": found[1].replace("_", " ")}
        groups |= {n: record.text(n) for n in ("topic_difficulty", "subfield") if record.get(n)}
        yield _row(source, record, record.text("question"), options, answer, _pictures(source, record), groups)


def _pro_rows(source: Source) -> Iterator[Row]:
    required = ("id", "question", "options", "answer", "subject", "image_1")
    for record in source.records(required, (*IMAGES, "topic_difficulty")):
        if (groups := _pro_groups(record)) is None:
            continue
        options, answer = _choices(record)
        yield _row(source, record, record.text("question"), options, answer, _pictures(source, record), groups)


def _vision_rows(source: Source) -> Iterator[Row]:
    for record in source.records(("id", "image", "options", "answer", "subject")):
        if (groups := _pro_groups(record)) is None:
            continue
        options, answer = _choices(record)
        pictures = (source.images.encoded(record.get("image"), record.where),)
        extra = {"options_in_image": True}
        yield _row(source, record, VISION_QUESTION, options, answer, pictures, groups, extra)


def _row(
    source: Source,
    record: Record,
    question: str,
    options: tuple[str, ...] | None,
    answer: str | tuple[str, ...],
    images: tuple[Any, ...],
    groups: dict[str, str],
    extra: dict[str, Any] | None = None,
) -> Row:
    kind = "open" if options is None else "multiple-choice"
    return Row(source.benchmark, record.text("id"), question, kind, options, answer, images, groups, extra or {})


def _choices(record: Record) -> tuple[tuple[str, ...], str]:
    options = gold.options_of(record.get("options"), record)
    return options, gold.letter_of_letter(record.get("answer"), gold.published_letters(options), record)


def _pictures(source: Source, record: Record) -> tuple[Any, ...]:
    given = [record.get(name) for name in IMAGES]
    # A row always has its first picture; where it is empty, it is missing.
    return tuple(
        source.images.encoded(value, record.where) for i, value in enumerate(given) if value is not None or i == 0
    )


def _pro_groups(record: Record) -> dict[str, str] | None:
    subject = record.text("subject").replace(" ", "_")
    if subject not in SUBJECTS:
        return None
    difficulty = record.get("topic_difficulty")
    return {"subject": subject.replace("_", " ")} | ({"topic_difficulty": difficulty} if difficulty else {})


def _mmmu(name: str, split: str, title: str, expected_n: int, note: str) -> Benchmark:
    files = Repository(name, "MMMU/MMMU", tuple(f"{subject}/{split}-*.parquet" for subject in SUBJECTS))
    row_filter = f"all {split} rows of the five Health & Medicine subjects, open questions included"
    return Benchmark(name, title, row_filter, expected_n, "subject", note, partial(load, files))


def _pro(name: str, config: str, title: str, note: str, loader: Any = load_pro) -> Benchmark:
    files = Repository(name, "MMMU/MMMU_Pro", (f"{config}/test-*.parquet",))
    row_filter = f"test rows of configuration {config} in the five Health & Medicine subjects"
    return Benchmark(name, title, row_filter, 286, "subject", note, partial(loader, files))


BENCHMARKS = (
    _mmmu("mmmu-medical-dev", "dev", "MMMU Health & Medicine, dev", 25, "25 rows, meant as examples in a prompt."),
    _mmmu(
        "mmmu-medical-val",
        "validation",
        "MMMU Health & Medicine, validation",
        150,
        "145 multiple-choice and 5 open rows; HuatuoGPT-Vision's numbers are over the 145 (huatuo-mmmu-val).",
    ),
    _mmmu(
        "mmmu-medical-test",
        "test",
        "MMMU Health & Medicine, test",
        1_752,
        "The answers are hidden: the official server grades the submission file.",
    ),
    _pro(
        "mmmu-pro-medical", "standard (10 options)", "MMMU-Pro Health & Medicine", "Ten options: chance is near 10 %."
    ),
    _pro(
        "mmmu-pro-medical-4",
        "standard (4 options)",
        "MMMU-Pro Health & Medicine, 4 options",
        "The same questions with at most four options; compares with no ten-option number.",
    ),
    _pro(
        "mmmu-pro-medical-vision",
        "vision",
        "MMMU-Pro Health & Medicine, vision",
        "Question and options are in a screenshot; the ten options are not repeated in the prompt.",
        load_pro_vision,
    ),
)
