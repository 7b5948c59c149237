"""What a benchmark is made of: the contract between benchmarks, protocols, backends and scorers. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huatuo_vision.schema import ImageRef

QuestionType = Literal["multiple-choice", "open"]

# The gold answer of a row whose answer the benchmark hides.
HIDDEN = "?"

# The group that says what a question asks for, and its two values.
REASONING, KNOWLEDGE, INFERENCE = "reasoning", "knowledge", "inference"


@dataclass(frozen=True, slots=True)
class Row:
    """One question.

    `options` and a letter as `answer` for multiple choice (yes/no questions are multiple choice between "Yes" and
    "No"); None and the accepted strings for open ones; HIDDEN where the benchmark keeps the answer to itself.
    `extra` goes into the responses file as it is (a case id under `case` joins rows of one patient in the
    bootstrap; `notes`, a list of strings, says what the loader changed; `reference` is what a rubric judge holds an
    explanation against). The group `reasoning` is "knowledge" or "inference".
    """

    benchmark: str
    id: str  # unique within its benchmark
    question: str
    question_type: QuestionType
    options: tuple[str, ...] | None
    answer: str | tuple[str, ...]
    images: tuple[ImageRef, ...]  # each with its sha256
    groups: Mapping[str, str]  # what accuracy is broken down by: subject, modality, ...
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A benchmark's rows in its own order, and which data they are."""

    rows: tuple[Row, ...]
    revision: str  # the Hub commit, or a checksum of the local files


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What is known of a benchmark without its data.

    `load` takes a local folder or file, or None for the Hub (or, for what is made on the spot, the cache).
    """

    name: str
    title: str
    row_filter: str  # in words; part of the protocol's hash
    expected_n: int | None  # rows, hidden and open ones included; None where no number is published
    macro_over: str  # the group over whose values the macro average is taken
    note: str  # what a reader of a number must know; shown beside it
    load: Callable[[Path | None], Loaded]
    controls: tuple[str, ...] = ()  # of variants.CONTROLS: how its rows are asked besides, unless one says otherwise


def by_name(benchmarks: Iterable[Benchmark]) -> dict[str, Benchmark]:
    return {benchmark.name: benchmark for benchmark in benchmarks}
