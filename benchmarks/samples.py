"""Made-up samples for measuring: text of a made-up vocabulary, JPEG pictures, in the layout of the `messages` adapter.

Two kinds. `single`: one picture a row, questions of 15 to 60 words, answers of 30 to 250. `mixture`: as PubMedVision
mixes them (facts of its card: 22 % of the rows have 2 to 6 pictures), and a twentieth without any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KINDS = ("single", "mixture")
SEVERAL_PICTURES, NO_PICTURE = 0.22, 0.05  # shares of the rows of a mixture
QUESTION_WORDS, ANSWER_WORDS = (15, 60), (30, 250)
_VOCABULARY = 4000
_CONSONANTS, _VOWELS = "bcdfghklmnprstvz", "aeiou"


def make_samples(folder: Path, kind: str, count: int, seed: int, side: int = 320) -> Path:
    """Write `count` rows to `folder`/rows.json and their pictures beside it; returns the file.

    side: the longer side of a picture in pixels; shapes vary from square to 2:3, so that padding to a square counts.
    """
    rng = np.random.default_rng(seed)
    words = _words(rng)
    frequency = 1 / np.arange(10, 10 + len(words))
    frequency /= frequency.sum()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words, rng.integers(low, high + 1), p=frequency))

    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        images = [f"{number}-{k}.jpg" for k in range(_pictures(kind, rng))]
        for name in images:
            _picture(rng, side).save(folder / name, quality=85)
        question = "<image>\n" * len(images) + text(*QUESTION_WORDS)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text(*ANSWER_WORDS)}]
        rows.append({"id": f"r{number}", "images": images, "messages": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def _words(rng: np.random.Generator) -> np.ndarray:
    """Distinct pronounceable words of two to four syllables."""
    words: dict[str, None] = {}
    while len(words) < _VOCABULARY:
        syllables = (rng.choice(list(_CONSONANTS)) + rng.choice(list(_VOWELS)) for _ in range(rng.integers(2, 5)))
        words["".join(syllables)] = None
    return np.array(list(words))


def _pictures(kind: str, rng: np.random.Generator) -> int:
    if kind == "single":
        return 1
    drawn = rng.random()
    return int(rng.integers(2, 7)) if drawn < SEVERAL_PICTURES else int(drawn < 1 - NO_PICTURE)


def _picture(rng: np.random.Generator, side: int) -> Image.Image:
    """Coarse noise, smoothly enlarged: it compresses as photographs do."""
    size = (side, int(rng.integers(2 * side // 3, side + 1)))
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    return coarse.resize(size if rng.random() < 0.5 else size[::-1], Image.Resampling.BICUBIC)
