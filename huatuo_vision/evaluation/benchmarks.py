"""The benchmarks: where the rows come from, which of them count, and how many there must be. No torch here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from huatuo_vision.schema import ImageRef, UserError

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Row:
    """One multiple-choice question."""

    benchmark: str
    id: str  # unique within its benchmark
    question: str
    options: tuple[str, ...]
    answer: str  # the letter of the right option
    images: tuple[ImageRef, ...]  # each with its sha256
    groups: Mapping[str, str]  # what accuracy is broken down by: subject, modality, ...


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Rows in the benchmark's own order, and what identifies them."""

    name: str
    revision: str
    row_filter: str
    expected_n: int
    note: str  # what a reader of a number must know; shown beside it
    rows: tuple[Row, ...]


def phantom() -> Benchmark:
    """600 held-out questions about synthetic pictures, drawn on first use and kept in the Hugging Face cache.

    They are of the test split, whose pictures are drawn from random streams that no training record uses. The
    revision is the generator's version and the checksum of the questions it wrote, so two versions never mix.
    """
    expected_n, seed = 600, 0
    folder = Path(constants.HF_HOME) / "huatuo_vision" / f"phantom-eval-{expected_n}-{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["--out", str(folder), "--train", "0", "--test", str(expected_n), "--seed", str(seed)]
    made = subprocess.run(
        [sys.executable, "-m", "data.phantom", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if made.returncode != 0:
        raise UserError(f"benchmark phantom could not be made: {' '.join(made.stderr.split())}")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    rows = json.loads((folder / "phantom_test.json").read_text(encoding="utf-8"))
    return Benchmark(
        name="phantom",
        revision=f"generator {manifest['generator_version']}, sha256 {manifest['sha256']['phantom_test.json']}",
        row_filter="all test rows",
        expected_n=expected_n,
        note="Synthetic pictures: a demonstration of the machinery, no medical result.",
        rows=tuple(
            Row(
                benchmark="phantom",
                id=row["id"],
                question=row["question"],
                options=tuple(row["options"]),
                answer=row["answer"],
                images=tuple(_picture(folder / name) for name in row["image"]),
                groups=row["groups"],
            )
            for row in rows
        ),
    )


def _picture(path: Path) -> ImageRef:
    return ImageRef(path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


BENCHMARKS: dict[str, Callable[[], Benchmark]] = {"phantom": phantom}
