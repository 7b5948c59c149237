"""The demonstration's own benchmark: questions about synthetic pictures. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import constants

from huatuo_vision.evaluation.benchmarks import gold
from huatuo_vision.evaluation.benchmarks.sources import Record, Repository, Source
from huatuo_vision.evaluation.rows import Benchmark, Loaded, Row
from huatuo_vision.phantom import make_follow_up, make_phantom

SEED = 0
MANIFEST = "manifest.json"
CACHE = Path(constants.HF_HOME) / "huatuo_vision"


def _load(name: str, n: int, path: Path | None) -> Loaded:
    """`n` held-out questions about synthetic pictures, drawn on first use and kept in the Hugging Face cache.

    The first of more questions are those of fewer. They are of the test split, whose pictures are drawn from random
    streams that no training record uses. All are multiple choice and their gold is a letter as published. The
    revision is the generator's version and the checksum of the questions it wrote, so two versions never mix.
    """
    if path is None:
        path = make_phantom(CACHE, train=0, test=n, seed=SEED)
    loaded = _read(name, path, "phantom_test.json")
    manifest = (path if path.is_dir() else path.parent) / MANIFEST
    if not manifest.is_file():
        return loaded
    version = json.loads(manifest.read_text(encoding="utf-8"))["generator_version"]
    return replace(loaded, revision=f"generator {version}, {loaded.revision}")


def _load_follow_up(path: Path | None) -> Loaded:
    """Questions that a picture and the invented guideline answer together (data/phantom_cases.py); else as above."""
    path = path if path is not None else make_follow_up(CACHE, test=PHANTOM_FOLLOW_UP.expected_n, seed=SEED)
    return _read(PHANTOM_FOLLOW_UP.name, path, "phantom_follow_up.json")


def _read(name: str, path: Path, table: str) -> Loaded:
    # It is on no Hub: `open` only ever gets a path.
    with Repository(name, "phantom", tables=(table,)).open(path) as source:
        records = source.records(("id", "image", "question", "options", "answer", "groups"))
        return source.loaded(_row(name, record, source) for record in records)


def _row(name: str, record: Record, source: Source) -> Row:
    options = gold.options_of(record.get("options"), record)
    return Row(
        benchmark=name,
        id=record.text("id"),
        question=record.text("question"),
        question_type="multiple-choice",
        options=options,
        answer=gold.letter_of_letter(record.get("answer"), gold.published_letters(options), record),
        images=tuple(source.images.named(image) for image in record.get("image")),
        groups=record.get("groups"),
    )


def _benchmark(name: str, n: int, load: Callable[[Path | None], Loaded], about: str, macro_over: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=f"Phantom ({about}, {n:,} questions)",
        row_filter="all test rows",
        expected_n=n,
        macro_over=macro_over,
        note="Synthetic pictures: a demonstration of the machinery, no medical result.",
        load=load,
    )


PHANTOM = _benchmark("phantom", 600, partial(_load, "phantom", 600), "synthetic pictures", "subject")
# For comparisons: three times the questions find differences that are 1.7 times smaller.
PHANTOM_LARGE = _benchmark(
    "phantom-large", 1800, partial(_load, "phantom-large", 1800), "synthetic pictures", "subject"
)
# What no picture tells: only data that was written in the light of the invented guideline can teach it.
PHANTOM_FOLLOW_UP = _benchmark(
    "phantom-follow-up", 600, _load_follow_up, "synthetic pictures, an invented guideline", "modality"
)
