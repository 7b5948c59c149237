"""Packed rows beside what LLaVA's scripts do: padded batches through transformers' own forward, all logits."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration

from benchmarks.gpu import models, samples
from benchmarks.gpu.models import PHASE_1, Phase
from huatuo_vision.inputs.encode import Encoded
from huatuo_vision.model.attention import choose_attention
from huatuo_vision.model.flops import ModelShape
from huatuo_vision.model.trainable import parameter_groups

BATCH = 4  # samples in one forward, as a long row holds


def padded_batch(chosen: list[Encoded], pixels: np.ndarray) -> dict[str, torch.Tensor]:
    ids = [torch.from_numpy(e.input_ids) for e in chosen]
    labels = [torch.from_numpy(np.where(e.supervised, e.input_ids, -100)) for e in chosen]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "pixel_values": torch.from_numpy(pixels),
    }


def against_padded(language: str, device: torch.device, toy: bool, row_tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of the same optimizer step (phase 1) three ways, taking turns: packed, padded, padded by length."""
    config = models.llava_config(language, toy)
    phase = Phase(PHASE_1)
    model = models.ready_model(config, phase, device)
    pool = samples.drawn_pool(config.image_seq_length, toy)
    plan = samples.plan_rows(
        pool, ModelShape.from_config(config), PHASE_1, row_tokens=row_tokens, rows_per_step=4, steps=1
    )
    rows = samples.DrawnRows(plan, pool, config, device)
    in_order = [
        (sample, row["pixel_values"][n].cpu().numpy())
        for row, chosen in zip(rows, rows.samples, strict=True)
        for n, sample in enumerate(chosen)
    ]
    np.random.default_rng(0).shuffle(in_order := [*in_order])
    batches = {
        "padded": _batches(in_order, device),
        "padded, by length": _batches(sorted(in_order, key=lambda pair: len(pair[0].input_ids)), device),
    }
    targets = int(plan.step_targets[0])
    parameters = [p for p in model.parameters() if p.requires_grad]
    attention = {True: choose_attention("auto", device=device, precision="bf16"), False: "sdpa"}

    def packed() -> torch.Tensor:
        return sum(_backward(_packed_loss(model, row) / targets) for row in rows)

    def padded(name: str) -> torch.Tensor:
        return sum(
            _backward(LlavaForConditionalGeneration.forward(model, **batch, num_items_in_batch=targets).loss)
            for batch in batches[name]
        )

    sides: dict[str, Callable[[], torch.Tensor]] = {"packed": packed}
    sides |= {name: (lambda name=name: padded(name)) for name in batches}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses, peaks = {}, {}
    for turn in range(rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            model.set_attn_implementation({"text_config": attention[name == "packed"], "vision_config": "sdpa"})
            # The same start on every turn: a fresh optimizer, the learning rate 0.
            optimizer = torch.optim.AdamW(parameter_groups(model, PHASE_1, 0.0), lr=0.0, fused=True)
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            begin = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                loss = sides[name]()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[name] = loss.item()  # waits for the device
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            if turn > 0:  # the first turn warms up
                seconds[name].append(time.perf_counter() - begin)
    real = sum(len(sample.input_ids) for sample, _ in in_order)
    ratios = {
        name: [theirs / ours for theirs, ours in zip(seconds[name], seconds["packed"], strict=True)] for name in batches
    }
    return {
        "samples": len(in_order),
        "tokens": real,
        "padding": {name: 1 - real / sum(b["input_ids"].numel() for b in batches[name]) for name in batches},
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": {name: [statistics.median(r), min(r), max(r)] for name, r in ratios.items()},
        "loss": losses,
        "loss_difference": max(abs(losses[name] / losses["packed"] - 1) for name in batches),
        "peak_gib": peaks,
    }


def _batches(pairs: list[tuple[Encoded, np.ndarray]], device: torch.device) -> list[dict[str, torch.Tensor]]:
    groups = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    return [
        samples.to_device(padded_batch([e for e, _ in group], np.stack([p for _, p in group])), device)
        for group in groups
    ]


def _packed_loss(model: torch.nn.Module, row: dict[str, Any]) -> torch.Tensor:
    return model(**{key: value for key, value in row.items() if key not in ("stats", "target_sources")}).sum()


def _backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss.detach()
