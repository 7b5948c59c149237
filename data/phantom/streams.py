"""Random streams: what makes record i of a split a pure function of (seed, split, i)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# Tags of the random streams. A stream's spawn key is (split, purpose, index, index), always four numbers, so that
# no two streams coincide: a test picture is never a training picture, whatever the seeds and the numbers of records.
TRAIN, TEST = 0, 1
CONTENT, PICTURE, SUBJECT, KIND, TURNS, PAIR, ANSWER, CAPTION, REWRITING, READING = range(10)
HIGHEST_SEED = 2**32 - 1


def stream(seed: int, split: int, purpose: int, index: int, part: int = 0) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(split, purpose, index, part)))


@lru_cache(maxsize=4096)
def _permutation(seed: int, split: int, purpose: int, part: int, block: int, length: int) -> tuple[int, ...]:
    return tuple(stream(seed, split, purpose, block, part).permutation(length).tolist())


def stratified(seed: int, split: int, purpose: int, index: int, length: int, part: int = 0) -> int:
    """A number below `length` that takes each value once in every `length` consecutive indices, in seeded order."""
    return _permutation(seed, split, purpose, part, index // length, length)[index % length]


def pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
