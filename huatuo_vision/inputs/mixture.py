"""Which samples of each source one epoch of a phase uses: the phase's limits, then its mixture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from huatuo_vision.recipe import MixtureEntry, PhaseSpec


def over_limits(tokens: np.ndarray, images: np.ndarray, phase: PhaseSpec) -> dict[str, np.ndarray]:
    """Which samples, (n,) bool, a phase refuses for which reason; a sample has one reason at most.

    Such samples are left out whole: cutting one could cut through an image.
    """
    overlong = tokens > phase.max_sample_tokens
    return {"overlong": overlong, "too_many_images": ~overlong & (images > phase.max_row_images)}


def select_rows(
    entries: tuple[MixtureEntry, ...], available: Mapping[str, int], seed: int
) -> list[tuple[str, np.ndarray]]:
    """Per source, in the entries' order, the positions (n,) int64 among its `available` samples that one epoch uses.

    Neither rows nor weight: all, in order. `rows`: exactly that many. Weights: the largest epoch in these
    proportions in which no sample repeats. A subset is the beginning of a permutation seeded by `seed` and
    the source's name: other sources do not change it, and a larger number of rows extends it.
    Raises UserError where a source holds too few samples.
    """
    for entry in entries:
        if available[entry.source] == 0:
            raise UserError(f"source {entry.source!r} has no samples; remove it from data or mend its rows")
    if entries[0].weight is not None:  # all entries have one or none has: PhaseSpec refuses a mix
        counts = _weighted_counts(entries, available)
    else:
        counts = [_row_count(entry, available[entry.source]) for entry in entries]
    return [
        (entry.source, _positions(entry, available[entry.source], count, seed))
        for entry, count in zip(entries, counts, strict=True)
    ]


def _row_count(entry: MixtureEntry, available: int) -> int:
    if entry.rows is None:
        return available
    if entry.rows > available:
        raise UserError(
            f"source {entry.source!r}: rows asks for {entry.rows:,} samples but {available:,} are available; "
            f"lower rows to {available} or leave it out (all samples)"
        )
    return entry.rows


def _weighted_counts(entries: tuple[MixtureEntry, ...], available: Mapping[str, int]) -> list[int]:
    # Decimal fractions as they stand in the recipe: in binary 0.7 and 0.3 do not add up, and a row would be lost.
    weights = [Fraction(repr(entry.weight)) for entry in entries]
    shares = [weight / sum(weights) for weight in weights]
    total = int(min(available[entry.source] / share for entry, share in zip(entries, shares, strict=True)))
    quotas = [share * total for share in shares]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(entries)), key=lambda i: quotas[i] - counts[i], reverse=True)
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for entry, count in zip(entries, counts, strict=True):
        if count == 0:
            raise UserError(
                f"source {entry.source!r}: weight {entry.weight} gives it no sample in an epoch of {total:,}; "
                "raise its weight, or give exact rows instead of weights"
            )
    return counts


def _positions(entry: MixtureEntry, available: int, count: int, seed: int) -> np.ndarray:
    if entry.rows is None and entry.weight is None:
        return np.arange(available)
    name = hashlib.sha256(entry.source.encode()).digest()
    order = np.random.default_rng([seed, *np.frombuffer(name, dtype="<u4").tolist()]).permutation(available)
    return order[:count]
