"""How long the card waits for data: the project's own rows and workers, JPEGs from disk, a real step."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import models, samples
from benchmarks.gpu.models import PHASE_1, Phase
from benchmarks.gpu.steps import make_trainer
from huatuo_vision.inputs.encode import Encoder
from huatuo_vision.inputs.rows import PlannedRows
from huatuo_vision.model.flops import ModelShape

PICTURES = 256
WINDOW = 4  # optimizer steps between two lines of the log


def waiting(
    language: str, device: torch.device, toy: bool, folder: Path, row_tokens: int, workers: int, windows: int
) -> dict[str, Any]:
    """The trainer's own log, one line per four steps, the first left out."""
    config = models.llava_config(language, toy)
    shape = ModelShape.from_config(config)
    drawn = samples.drawn_pool(config.image_seq_length, toy)
    if not (folder / "jpegs").exists():
        samples.write_jpegs(folder / "jpegs", 8 if toy else PICTURES, workers=16)
        samples.write_processor_folder(folder / f"processor-{config.vision_config.image_size}", config)
    pictures = sorted((folder / "jpegs").iterdir())
    encoder = Encoder(folder / f"processor-{config.vision_config.image_size}")
    source = samples.TextSource(pictures, drawn, config.image_seq_length)
    # Lengths as preparation finds them: by encoding every sample once.
    begin = time.perf_counter()
    encoded = [encoder.encode(sample) for sample in source]
    encoded_per_s = len(encoded) / (time.perf_counter() - begin)
    pool = samples.Pool.of(
        np.array([len(e.input_ids) for e in encoded], dtype=np.int32),
        np.array([e.targets for e in encoded], dtype=np.int32),
    )
    plan = samples.plan_rows(pool, shape, PHASE_1, row_tokens=row_tokens, rows_per_step=1, steps=WINDOW * (windows + 1))
    phase = Phase(PHASE_1, log_every=WINDOW)
    model = models.ready_model(config, phase, device)
    rows = PlannedRows(plan, pool, {"drawn": source}, encoder)
    begin = time.perf_counter()
    one_row = rows[0]
    row_s = time.perf_counter() - begin
    trainer = make_trainer(model, phase, rows, config, folder / "trainer", workers)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "data_wait_share" in line][1:]

    def median(key: str) -> float | None:
        found = [line[key] for line in lines if key in line]
        return statistics.median(found) if found else None

    return {
        "workers": workers,
        "data_wait_share": median("data_wait_share"),
        "data_wait_share_worst": max(line["data_wait_share"] for line in lines),
        "images_per_s": median("images_per_second"),
        "samples_per_s": median("samples_per_second"),
        "supervised_tokens_per_s": median("supervised_tokens_per_second"),
        "mfu": median("mfu"),
        "peak_gib": median("peak_memory_gib") if device.type == "cuda" else None,
        "row_made_in_process_s": row_s,
        "images_per_core_s": one_row["stats"]["images"] / row_s,
        "encoded_samples_per_core_s": encoded_per_s,
        "jpeg_kb": statistics.mean(path.stat().st_size for path in pictures) / 1e3,
        "row_tokens": one_row["stats"]["tokens"],
    }
