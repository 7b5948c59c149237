"""VQA-RAD and PathVQA: short answers about one picture, yes/no questions among them. No torch here.

Design decisions:

- Rows: the whole test splits of flaviagiammarino/vqa-rad (451) and flaviagiammarino/path-vqa (6,719), in published
  order; the id is the position in it. Pictures are columns of the table and are held in memory, equal ones once
  (PathVQA: about 0.3 GB).
- Neither has an answer-type column. A row whose gold is yes or no (251 of 451; 3,362 of 6,719) becomes multiple
  choice between "Yes" and "No", in this order: A and B. All others are open; the gold text is the one accepted
  answer. The group `answer_type` is "closed" for the former, "open" for the latter.
- Trap: the older MEVF copy of VQA-RAD labels 272 rows CLOSED; the 21 that are not yes/no ("left or right") are open
  here. "VQA-RAD accuracy" in papers means at least six things; the paper of HuatuoGPT-Vision scores the 251 alone
  (benchmark huatuo-vqa-rad, as letters with the bundle's own options).
- Trap: LLaVA-Med's copy of PathVQA has 6,761 test rows, not 6,719.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from huatuo_vision.evaluation.benchmarks import gold
from huatuo_vision.evaluation.benchmarks.sources import Repository, Source
from huatuo_vision.evaluation.rows import Benchmark, Loaded, Row


def load(repository: Repository, path: Path | None) -> Loaded:
    with repository.open(path) as source:
        return source.loaded(_rows(source))


def _rows(source: Source) -> Iterator[Row]:
    for record in source.records(("image", "question", "answer")):
        answer = record.text("answer")
        letter = gold.yes_no_letter(answer)
        yield Row(
            benchmark=source.benchmark,
            id=str(record.index),
            question=record.text("question"),
            question_type="multiple-choice" if letter else "open",
            options=gold.YES_NO if letter else None,
            answer=letter or gold.accepted_answers(answer, record),
            images=(source.images.encoded(record.get("image"), record.where),),
            groups={"answer_type": "closed" if letter else "open"},
        )


BENCHMARKS = (
    Benchmark(
        name="vqa-rad",
        title="VQA-RAD",
        row_filter="all 451 test rows; yes/no gold as multiple choice between Yes and No, all others open",
        expected_n=451,
        macro_over="answer_type",
        note=(
            "251 yes/no rows and 200 open ones. Published accuracies differ in rows and rule: 251 yes/no, 272 closed, "
            "or all 451 with token recall for the open ones."
        ),
        load=partial(load, Repository("vqa-rad", "flaviagiammarino/vqa-rad", ("data/test-*.parquet",))),
    ),
    Benchmark(
        name="pathvqa",
        title="PathVQA",
        row_filter="all 6,719 test rows; yes/no gold as multiple choice between Yes and No, all others open",
        expected_n=6_719,
        macro_over="answer_type",
        note=(
            "3,362 yes/no rows and 3,357 open ones. The yes/no questions come from templates and are nearly balanced: "
            "read the blind result first."
        ),
        load=partial(load, Repository("pathvqa", "flaviagiammarino/path-vqa", ("data/test-*.parquet",))),
    ),
)
