"""A planned row -> tensors. A row is one dataset item: the samples that share one forward pass.

    input_ids     | sample 17 ............ | sample 4 ....... |
    position_ids  | 0 1 2 ............ s-1 | 0 1 2 ...... s-1 |      restart at every sample
    cu_seq_lens   0                        s                  S

Legend: S tokens of the row, D samples in it, N images in it, P features per image, T supervised tokens in it,
from G sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from huatuo_vision.inputs.encode import Encoded, Encoder
from huatuo_vision.inputs.images import load_image
from huatuo_vision.inputs.plan import StepPlan
from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from huatuo_vision.inputs.prepare import Pool
    from huatuo_vision.inputs.sources import Source


class PlannedRows(torch.utils.data.Dataset):
    """The rows of a step plan, in plan order; images are decoded and text is tokenised where the item is asked for."""

    def __init__(self, plan: StepPlan, pool: Pool, sources: Mapping[str, Source], encoder: Encoder):
        self.plan, self.pool, self.sources, self.encoder = plan, pool, sources, encoder

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        positions = self.plan.row(index)
        encoded, images, source_ids = [], [], []
        for position in positions:
            source_id, row = int(self.pool.source[position]), int(self.pool.row[position])
            sample = self.sources[self.pool.sources[source_id]].sample(row)
            encoded.append(self.encoder.encode(sample))
            if len(encoded[-1].input_ids) != self.pool.tokens[position]:
                raise UserError(
                    f"sample {sample.id!r} of source {sample.source!r} has {len(encoded[-1].input_ids)} tokens; it had "
                    f"{self.pool.tokens[position]} when it was prepared; the data changed during the run, start again"
                )
            images.extend(load_image(ref, sample.id).image for ref in sample.images)
            source_ids.append(source_id)
        pixel_values = self.encoder.pixel_values(images) if images else None
        step_targets = int(self.plan.step_targets[index // self.plan.rows_per_step])
        return pack_row(encoded, source_ids, pixel_values, step_targets, self.encoder.image_token_id)


def pack_row(
    encoded: Sequence[Encoded],
    source_ids: Sequence[int],
    pixel_values: np.ndarray | None,
    step_targets: int,
    image_token_id: int,
) -> dict[str, Any]:
    """Model inputs of one packed row, and `stats` as plain numbers, so that counting never waits for the device."""
    lengths = np.array([len(e.input_ids) for e in encoded], dtype=np.int32)
    input_ids = np.concatenate([e.input_ids for e in encoded])
    supervised = np.concatenate([e.supervised for e in encoded])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    supervised[starts[:-1]] = False  # a sample's first token has no predecessor inside the sample
    predicted = np.flatnonzero(supervised)  # (T,) positions of the supervised tokens
    of_source = np.repeat(source_ids, lengths)[predicted]  # (T,)
    predicted = predicted[np.argsort(of_source, kind="stable")]  # one source's after another's, to be summed together
    sources, counts = np.unique(of_source, return_counts=True)  # (G,)
    row: dict[str, Any] = {
        "input_ids": torch.from_numpy(input_ids)[None],  # (1, S)
        "position_ids": torch.from_numpy(np.arange(starts[-1]) - np.repeat(starts[:-1], lengths))[None],  # (1, S)
        "logits_to_keep": torch.from_numpy(predicted - 1),  # (T,) positions that predict them
        "shift_labels": torch.from_numpy(input_ids[predicted]),  # (T,)
        "cu_seq_lens": torch.from_numpy(starts),  # (D + 1,)
        "sample_lengths": tuple(lengths.tolist()),
        "target_sources": tuple(sources.tolist()),
        "target_counts": tuple(counts.tolist()),
        "stats": {
            "samples": len(encoded),
            "tokens": int(starts[-1]),
            "squared_lengths": int((lengths.astype(np.int64) ** 2).sum()),
            "targets": len(predicted),
            "images": 0 if pixel_values is None else len(pixel_values),
            "step_targets": step_targets,
        },
    }
    if pixel_values is not None:
        row["pixel_values"] = torch.from_numpy(pixel_values)  # (N, 3, H, W), or (N, F) for several encoders
        # Counted here, because a mask on the device makes the host wait for how many there are.
        row["image_positions"] = torch.from_numpy(np.flatnonzero(input_ids == image_token_id))  # (N * P,)
    return row


def only_row(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Collator: a batch is one row already."""
    (row,) = batch
    return row
