"""SLAKE: bilingual questions about radiological pictures. No torch here.

Design decisions:

- Rows: test.json of BoKelvin/SLAKE (2,094 rows), one benchmark per language: English 1,061 (645 open + 416 closed),
  Chinese 1,033 (613 + 420). The id is the position in the whole file, so it is the same for either; the data set's
  own `qid` is kept beside it. Pictures lie in imgs.zip (`imgs/<img_name>`) and are read in place.
- The group `answer_type` is the data set's own label. English CLOSED rows whose gold is yes or no (355) become
  multiple choice between "Yes" and "No"; the other 61 closed rows have no list of options ("MRI", "Left") and stay
  open with answer_type closed. OPEN rows are open, whatever their gold.
- Chinese rows are all open: their yes and no are many words of the language itself, and a question in Chinese with
  options in English would be another question.
- Trap: scores over both languages together (2,094 rows) compare with neither. Trap: the paper of HuatuoGPT-Vision
  scores the 416 English closed rows with options that it made up for the 61 (benchmark huatuo-slake).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from huatuo_vision.evaluation.benchmarks import gold
from huatuo_vision.evaluation.benchmarks.sources import Repository, Source
from huatuo_vision.evaluation.rows import Benchmark, Loaded, Row

COLUMNS = ("img_name", "question", "answer", "q_lang", "answer_type")
GROUPS = ("modality", "location", "content_type")


def load(repository: Repository, language: str, path: Path | None) -> Loaded:
    with repository.open(path) as source:
        return source.loaded(_rows(source, language))


def _rows(source: Source, language: str) -> Iterator[Row]:
    for record in source.records(COLUMNS, (*GROUPS, "qid")):
        if record.text("q_lang") != language:
            continue
        answer, answer_type = record.text("answer"), record.text("answer_type").lower()
        if answer_type not in ("open", "closed"):
            raise record.error(f"the answer_type is {answer_type!r}; expected OPEN or CLOSED")
        yes_no = language == "en" and answer_type == "closed"
        letter = gold.yes_no_letter(answer) if yes_no else None
        yield Row(
            benchmark=source.benchmark,
            id=str(record.index),
            question=record.text("question"),
            question_type="multiple-choice" if letter else "open",
            options=gold.YES_NO if letter else None,
            answer=letter or gold.accepted_answers(answer, record),
            images=(source.images.named(record.text("img_name")),),
            groups={"answer_type": answer_type} | {name: record.text(name) for name in GROUPS if record.get(name)},
            extra={"qid": record.get("qid")} if record.get("qid") is not None else {},
        )


def _benchmark(name: str, language: str, title: str, expected_n: int, row_filter: str, note: str) -> Benchmark:
    files = Repository(name, "BoKelvin/SLAKE", ("test.json",), archives=("imgs.zip",), folders=("imgs",))
    return Benchmark(name, title, row_filter, expected_n, "answer_type", note, partial(load, files, language))


BENCHMARKS = (
    _benchmark(
        "slake-en",
        "en",
        "SLAKE, English",
        1_061,
        "test rows with q_lang en; closed rows with yes/no gold as multiple choice between Yes and No, all others open",
        "645 open and 416 closed rows, 61 of which have no options and are asked openly. Some harnesses mix both "
        "languages (2,094 rows).",
    ),
    _benchmark(
        "slake-zh",
        "zh",
        "SLAKE, Chinese",
        1_033,
        "test rows with q_lang zh, all open",
        "613 open and 420 closed rows, all asked openly in Chinese.",
    ),
)
