"""How long the card waits for data: the project's own rows and workers, JPEGs from disk, a real step."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaConfig

from benchmarks.gpu import models, samples
from benchmarks.gpu.models import PHASE_1, Phase
from benchmarks.gpu.steps import make_trainer
from huatuo_vision.inputs.encode import Encoder
from huatuo_vision.inputs.plan import StepPlan
from huatuo_vision.inputs.rows import PlannedRows
from huatuo_vision.model.flops import ModelShape

PICTURES = 256
SAMPLES = 400
WINDOW = 4  # optimizer steps between two lines of the log


@dataclass(frozen=True)
class Prepared:
    """Samples with JPEGs on disk, their lengths as preparation finds them: by encoding each once."""

    source: samples.TextSource
    encoder: Encoder
    pool: samples.Pool
    jpeg_kb: float

    @classmethod
    def on_disk(cls, config: LlavaConfig, folder: Path, toy: bool) -> Prepared:
        """Written on the first call."""
        if not (folder / "jpegs").exists():
            samples.write_jpegs(folder / "jpegs", 8 if toy else PICTURES, workers=16)
            samples.write_processor_folder(folder / "processor", config)
        pictures = sorted((folder / "jpegs").iterdir())
        encoder = Encoder(folder / "processor")
        source = samples.TextSource(
            pictures, samples.drawn_pool(config.image_seq_length, toy), config.image_seq_length, SAMPLES
        )
        encoded = [encoder.encode(source.sample(row)) for row in range(SAMPLES)]
        pool = samples.Pool.of(
            np.array([len(e.input_ids) for e in encoded], dtype=np.int32),
            np.array([e.targets for e in encoded], dtype=np.int32),
        )
        return cls(source, encoder, pool, statistics.mean(path.stat().st_size for path in pictures) / 1e3)

    def rows(self, plan: StepPlan) -> PlannedRows:
        return PlannedRows(plan, self.pool, {"drawn": self.source}, self.encoder)


def waiting(
    language: str, device: torch.device, toy: bool, folder: Path, row_tokens: int, workers: int, windows: int
) -> dict[str, Any]:
    """The trainer's own log, one line per four steps, the first left out."""
    config = models.llava_config(language, toy)
    data = Prepared.on_disk(config, folder, toy)
    shape = ModelShape.from_config(config)
    steps = WINDOW * (windows + 1)
    plan = samples.plan_rows(data.pool, shape, PHASE_1, row_tokens=row_tokens, rows_per_step=1, steps=steps)
    phase = Phase(PHASE_1, log_every=WINDOW)
    model = models.ready_model(config, phase, device)
    rows = data.rows(plan)
    begin = time.perf_counter()
    one_row = rows[0]
    row_s = time.perf_counter() - begin
    trainer = make_trainer(model, phase, rows, config, folder / "trainer", workers)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    lines = [line for line in trainer.state.log_history if "data_wait_share" in line][1:]

    def median(key: str) -> float | None:
        found = [line[key] for line in lines if key in line]
        return statistics.median(found) if found else None

    return {
        "workers": workers,
        "data_wait_share": median("data_wait_share"),
        "data_wait_shares": [line["data_wait_share"] for line in lines],
        "images_per_s": median("images_per_second"),
        "samples_per_s": median("samples_per_second"),
        "supervised_tokens_per_s": median("supervised_tokens_per_second"),
        "mfu": median("mfu"),
        "peak_gib": median("peak_memory_gib") if device.type == "cuda" else None,
        "images_per_core_s": one_row["stats"]["images"] / row_s,
        "jpeg_kb": data.jpeg_kb,
        "row_tokens": one_row["stats"]["tokens"],
    }
