"""Packed rows beside what LLaVA's scripts do: padded batches through transformers' own forward, all logits."""

from __future__ import annotations

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


def padded_batch(chosen: list[Encoded], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """As LLaVA's collator makes it: padded to the longest on the right."""
    ids = [torch.from_numpy(e.input_ids) for e in chosen]
    labels = [torch.from_numpy(np.where(e.supervised, e.input_ids, -100)) for e in chosen]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "pixel_values": pixels,
    }


def against_padded(language: str, device: torch.device, toy: bool, row_tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of the same optimizer step (phase 1) three ways, taking turns: packed, padded, padded by length.

    The learning rate is 0, so that every turn begins with the same weights and must give the same loss.
    """
    config = models.llava_config(language, toy)
    model = models.ready_model(config, Phase(PHASE_1), device)
    pool = samples.drawn_pool(config.image_seq_length, toy)
    plan = samples.plan_rows(
        pool, ModelShape.from_config(config), PHASE_1, row_tokens=row_tokens, rows_per_step=4, steps=1
    )
    rows = samples.DrawnRows(plan, pool, config, device)
    pairs = [
        pair
        for index in range(plan.rows)
        for pair in zip(rows.samples[index], rows[index]["pixel_values"], strict=True)
    ]
    drawn = [pairs[n] for n in np.random.default_rng(0).permutation(len(pairs))]
    batches = {
        "padded": _batches(drawn, device),
        "padded, by length": _batches(sorted(drawn, key=lambda pair: len(pair[0].input_ids)), device),
    }
    targets = int(plan.step_targets[0])

    def packed(row: dict[str, Any]) -> torch.Tensor:
        inputs = {key: value for key, value in row.items() if key not in ("stats", "target_sources")}
        return model(**inputs).sum() / targets

    def padded(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return LlavaForConditionalGeneration.forward(model, **batch, num_items_in_batch=targets).loss

    sides = {"ours": (packed, list(map(rows.__getitem__, range(plan.rows))))}
    sides |= {name: (padded, inputs) for name, inputs in batches.items()}
    attention = dict.fromkeys(sides, "sdpa")
    attention["ours"] = choose_attention("auto", device=device, precision="bf16")
    optimizer = torch.optim.AdamW(parameter_groups(model, PHASE_1, 0.0), fused=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses, peaks = {}, {}
    for turn in range(rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            model.set_attn_implementation({"text_config": attention[name], "vision_config": "sdpa"})
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            loss = _step(*sides[name], optimizer, device)
            losses[name] = loss.item()  # waits for the device
            if turn > 0:  # the first turn warms up
                seconds[name].append(time.perf_counter() - begin)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    real = sum(len(sample.input_ids) for sample, _ in pairs)
    ratios = {
        name: [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)] for name in batches
    }
    return {
        "samples": len(pairs),
        "tokens": real,
        "padding": {name: 1 - real / sum(b["input_ids"].numel() for b in batches[name]) for name in batches},
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": {name: [statistics.median(r), min(r), max(r)] for name, r in ratios.items()},
        "loss": losses,
        "loss_difference": max(abs(losses[name] / losses["ours"] - 1) for name in batches),
        "peak_gib": peaks,
    }


def _step(
    forward: Callable[[dict[str, Any]], torch.Tensor],
    inputs: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> torch.Tensor:
    total = torch.zeros((), device=device)
    for values in inputs:
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(values)
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def _batches(pairs: list[tuple[Encoded, torch.Tensor]], device: torch.device) -> list[dict[str, torch.Tensor]]:
    groups = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    return [
        samples.to_device(padded_batch([e for e, _ in group], torch.stack([p for _, p in group])), device)
        for group in groups
    ]
