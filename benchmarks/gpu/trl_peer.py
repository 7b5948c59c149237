"""TRL's SFTTrainer on the same samples, weights and card, both from data on disk."""

from __future__ import annotations

import dataclasses
import gc
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.trainer_callback import PrinterCallback

from benchmarks.gpu import models, samples
from benchmarks.gpu.loading import Prepared
from benchmarks.gpu.models import Phase, Train
from benchmarks.gpu.steps import StepClock, make_trainer
from huatuo_vision.inputs.plan import StepPlan
from huatuo_vision.inputs.processor import load_processor
from huatuo_vision.model.flops import ModelShape
from huatuo_vision.model.trainable import apply_training

BATCH = 4  # samples in one of TRL's forwards, about as many tokens as half a row of 8k


def against_trl(
    language: str, train: Train, device: torch.device, toy: bool, folder: Path, row_tokens: int, turns: int
) -> dict[str, Any]:
    """Seconds of the same optimizer steps by our trainer, plain and compiled, and by TRL's SFTTrainer.

    The same weights, samples of every step, pictures on disk and number of workers, in bf16 autocast over the same
    fp32 and bf16 parameters, without recomputation; TRL's batches hold 4 samples. The sides take turns.
    """
    workers, warm, timed = (0, 1, 1) if toy else (8, 3, 6)
    config = models.llava_config(language, toy)
    data = Prepared.on_disk(config, folder, toy)
    plan = samples.plan_rows(
        data.pool,
        ModelShape.from_config(config),
        train,
        row_tokens=row_tokens,
        rows_per_step=2,
        steps=warm + timed,
        multiple_of=BATCH,
    )
    plain = Phase(train, log_every=1)
    compiled = dataclasses.replace(plain, compile=not toy)
    turns_of: dict[str, list[_Turn]] = {}
    for turn in range(turns):
        for side in ("ours", "ours, compiled", "TRL")[:: -1 if turn % 2 else 1]:
            if side == "TRL":
                trainer = _trl_trainer(data, plan, config, train, device, folder, workers)
            else:
                phase = plain if side == "ours" else compiled
                model = models.ready_model(config, phase, device)
                trainer = make_trainer(model, phase, data.rows(plan), config, folder / "trainer", workers)
                del model
            turns_of.setdefault(side, []).append(_timed(trainer, device, warm))
            del trainer
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    tokens = int(data.pool.tokens[plan.order[warm * plan.global_batch_size :]].sum()) / timed
    seconds = {side: [statistics.median(turn.seconds) for turn in found] for side, found in turns_of.items()}
    losses = {side: found[0].losses for side, found in turns_of.items()}
    ratios = {
        side: sorted(theirs / ours for theirs, ours in zip(found, seconds["ours"], strict=True))
        for side, found in seconds.items()
        if side != "ours"
    }
    return {
        "samples_per_step": plan.global_batch_size,
        "tokens_per_step": tokens,
        "turns": turns,
        "seconds": seconds,
        "tokens_per_s_of": {side: tokens / statistics.median(found) for side, found in seconds.items()},
        "ratio": {side: [statistics.median(found), found[0], found[-1]] for side, found in ratios.items()},
        "peak_gib": {side: max(turn.peak_gib for turn in found) for side, found in turns_of.items()},
        "losses": losses,
        "loss_difference": max(
            abs(theirs / ours - 1)
            for found in losses.values()
            for theirs, ours in zip(found, losses["ours"], strict=True)
        ),
    }


@dataclass(frozen=True)
class _Turn:
    seconds: list[float]  # of the steps after the warm-up
    losses: list[float]  # of all steps
    peak_gib: float


def _timed(trainer: Any, device: torch.device, warm: int) -> _Turn:
    clock = StepClock(warm, device, None, watched=False)
    trainer.add_callback(clock)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return _Turn(clock.seconds()[warm:], losses, peak)


def _trl_trainer(
    data: Prepared,
    plan: StepPlan,
    config: LlavaConfig,
    train: Train,
    device: torch.device,
    folder: Path,
    workers: int,
) -> Any:
    from benchmarks.peers import trl_trainer

    model = models.random_llava(config, device, torch.bfloat16, LlavaForConditionalGeneration)
    model.config.image_token_index = data.encoder.image_token_id
    model = apply_training(model, train)
    chosen = [data.source.sample(int(n)) for n in plan.order]
    rows = [
        {
            "messages": [{"role": m.role, "content": m.content} for m in sample.messages],
            "images": [image.path for image in sample.images],
        }
        for sample in chosen
    ]
    part = train.language_model or train.projector
    settings = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": plan.global_batch_size // BATCH,
        "num_train_epochs": 1,
        "learning_rate": part.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_num_workers": workers,
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
    }
    processor = load_processor(data.encoder.folder)
    trainer = trl_trainer(rows, Path(), settings, model=model, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    return trainer
