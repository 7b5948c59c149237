"""Sample lengths of data that is not here, drawn from `assumed_lengths.yaml`: enough for a plan, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from huatuo_vision.inputs.mixture import over_limits, select_rows
from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from huatuo_vision.recipe import Recipe, SourceSpec

TABLE = Path(__file__).with_name("assumed_lengths.yaml")
DRAWS = 4096  # samples of each source; their mean is within 1 or 2 % of the table's
EXCERPT_STEPS = 32


@dataclass(frozen=True, slots=True)
class AssumedSamples:
    """Some optimizer steps' worth of an epoch's samples, the sources in proportion. N samples."""

    per_epoch: int  # how many samples the epoch has in truth
    tokens: np.ndarray  # (N,) int32, image features included
    targets: np.ndarray  # (N,) int32
    images: np.ndarray  # (N,) int16


def assumed_samples(recipe: Recipe, phase_name: str, rows: Mapping[str, int], tokens_per_image: int) -> AssumedSamples:
    """`rows`: how many rows each of the phase's sources has. The same arguments give the same samples.

    Rows over the phase's limits are left out in their share, as preparation would. Raises UserError for a source of a
    kind that the table does not know, and where the mixture asks for more rows than there are.
    """
    phase = recipe.phases[phase_name]
    drawn, available = {}, {}
    for entry in phase.data:
        spec = recipe.data[entry.source]
        tokens, targets, images = draw_lengths(_key(spec, phase_name, entry.source), tokens_per_image)
        kept = ~np.logical_or.reduce(list(over_limits(tokens, images, phase).values()))
        drawn[entry.source] = tokens[kept], targets[kept], images[kept]
        available[entry.source] = round(rows[entry.source] * kept.mean())
    counts = np.array([len(positions) for _, positions in select_rows(phase.data, available, recipe.seed)])
    per_epoch = int(counts.sum())
    size = min(per_epoch, EXCERPT_STEPS * phase.global_batch_size)
    # Sample i of the excerpt stands for an equal stretch of the epoch, source after source.
    source = np.searchsorted(np.cumsum(counts), (np.arange(size) + 0.5) / size * per_epoch, side="right")
    columns: tuple[list[np.ndarray], ...] = ([], [], [])
    for position, name in enumerate(drawn):
        wanted = int((source == position).sum())
        for column, values in zip(columns, drawn[name], strict=True):
            column.append(np.resize(values, wanted))
    return AssumedSamples(per_epoch, *map(np.concatenate, columns))


def _key(spec: SourceSpec, phase: str, name: str) -> str:
    keys = [f"{spec.adapter}.{spec.config}", f"{spec.adapter}.{phase}", spec.adapter]
    if spec.columns.options:
        keys.insert(0, f"{spec.adapter}.options")
    for key in keys:
        if key in _table():
            return key
    raise UserError(f"data.{name}: nothing is assumed of how long samples of adapter {spec.adapter} are in {phase}")


def draw_lengths(key: str, tokens_per_image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, targets and images, each (DRAWS,), of samples as the table's `key` has them; the same on every call."""
    lengths = _table()[key]
    random = np.random.default_rng(0)
    spread = lengths["spread"]
    # A log-normal's mean is exp(mu + spread^2 / 2).
    prompt, targets = (
        np.maximum(1, np.rint(lengths[key] * random.lognormal(-(spread**2) / 2, spread, DRAWS))).astype(np.int32)
        for key in ("prompt", "answer")
    )
    images = random.choice(list(lengths["images"]), size=DRAWS, p=list(lengths["images"].values())).astype(np.int16)
    return prompt + targets + images.astype(np.int32) * tokens_per_image, targets, images


@lru_cache
def _table() -> dict[str, dict]:
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))
