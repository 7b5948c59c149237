"""`train.py --dry-run`: everything a recipe decides, counted without loading a weight."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig

from huatuo_vision.inputs.encode import Encoder
from huatuo_vision.inputs.prepare import load_pool, prepare
from huatuo_vision.launch import launched_world
from huatuo_vision.model.compose import compose_processor
from huatuo_vision.model.flops import ModelShape, memory_estimate, step_flops
from huatuo_vision.recipe import PARTS, PhaseSpec, Recipe
from huatuo_vision.training.phase import PhaseData, plan_phase
from huatuo_vision.training.run import cache_folder, open_sources, recipe_texts

ASSUMED_MFU = 0.40
ASSUMED_PEAK = 989e12  # H100 or H200 SXM, dense bf16


def dry_run(recipe: Recipe, phases: Sequence[str], console: Console) -> None:
    """Prepare the data and print what training would do, for as many processes as this was launched with."""
    world = launched_world()
    if world.rank != 0:
        return
    sharding = "fsdp" if world.fsdp else "zero2" if world.deepspeed else "ddp"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        tokenizer = recipe.model.language_model.tokenizer
        compose_processor(
            recipe.model, out / "base", recipe_texts(recipe) if tokenizer and tokenizer.vocab_size else None
        )
        encoder, shape = Encoder(out / "base"), ModelShape.from_config(AutoConfig.from_pretrained(out / "base"))
        prepare(recipe, phases, encoder, cache_folder(), out, console)
        sources = open_sources(recipe, phases)
        plans = {}
        for name in phases:
            pool = load_pool(recipe, name, out, recipe.seed)
            plans[name] = plan_phase(recipe, name, pool, sources, encoder, shape, world.processes)
        console.print(_steps_table(recipe, plans))
        console.print(_cost_table(recipe, plans, world.processes, sharding))
        console.print(
            f"GPU-hours at {ASSUMED_MFU:.0%} MFU of {ASSUMED_PEAK / 1e12:.0f} TFLOP/s (H100/H200, bf16). Memory is an "
            f"estimate for {sharding} on {world.processes} process(es); the formula stands at "
            "huatuo_vision.model.flops.memory_estimate.",
            style="dim",
        )
        for name in phases:
            console.print(_first_sample(name, plans[name]))


def _steps_table(recipe: Recipe, plans: dict[str, PhaseData]) -> Table:
    table = Table(title="optimizer steps", title_justify="left")
    for column in (
        "phase",
        "samples",
        "steps",
        "x samples",
        "rows per step",
        "row fill",
        "left over",
        "supervised tokens",
    ):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, data in plans.items():
        phase, plan = recipe.phases[name], data.plan
        tokens = int(data.pool.tokens[plan.order].sum())
        table.add_row(
            name,
            f"{len(plan.order):,}",
            f"{plan.steps:,}",
            f"{plan.global_batch_size}",
            f"{plan.rows_per_step} = {plan.world_size} x {plan.accumulation}",
            f"{tokens / (plan.rows * phase.max_row_tokens):.0%}",
            f"{plan.dropped_per_epoch * phase.epochs}",
            f"{int(plan.step_targets.sum()):,}",
        )
    return table


def _cost_table(recipe: Recipe, plans: dict[str, PhaseData], world_size: int, sharding: str) -> Table:
    table = Table(title="what trains, and what it costs", title_justify="left")
    for column in ("phase", "trained parameters", "TFLOP per step", "GPU-hours", "memory per GPU"):
        table.add_column(column, justify="left" if column in ("phase", "trained parameters") else "right")
    for name, data in plans.items():
        phase, plan = recipe.phases[name], data.plan
        flops = _phase_flops(phase, data)
        per_row_targets = int(np.diff(plan.row_starts).max() * data.pool.targets.mean())
        memory = memory_estimate(
            data.shape,
            phase.train,
            optimizer_name=phase.optimizer.name,
            precision=phase.precision,
            world_size=world_size,
            sharding=sharding,
            row_tokens=phase.max_row_tokens,
            row_targets=per_row_targets,
            recompute=phase.recompute,
        )
        table.add_row(
            name,
            "\n".join(_trained(phase, data.shape)),
            f"{flops / plan.steps / 1e12:,.3f}",
            f"{flops / (ASSUMED_MFU * ASSUMED_PEAK) / 3600:,.3f}",
            f"{sum(memory.values()) / 2**30:,.1f} GiB\n"
            + "\n".join(f"{part} {size / 2**30:.1f}" for part, size in memory.items()),
        )
    return table


def _phase_flops(phase: PhaseSpec, data: PhaseData) -> float:
    pool, order = data.pool, data.plan.order
    tokens = pool.tokens[order].astype(np.int64)
    return step_flops(
        data.shape,
        phase.train,
        tokens=int(tokens.sum()),
        squared_lengths=int((tokens**2).sum()),
        targets=int(pool.targets[order].sum()),
        images=int(pool.images[order].sum()),
    )


def _trained(phase: PhaseSpec, shape: ModelShape) -> list[str]:
    lines = []
    for part in PARTS:
        training = getattr(phase.train, part)
        if not training:
            lines.append(f"{part} frozen ({shape.weights[part]:,})")
        elif part == "language_model" and phase.train.lora:
            kind = "QLoRA" if phase.train.lora.quantize else "LoRA"
            lines.append(
                f"{part} {kind} {shape.lora_weights(phase.train.lora):,} of {shape.weights[part]:,}, lr {training.lr:g}"
            )
        else:
            lines.append(f"{part} {shape.weights[part]:,}, lr {training.lr:g}")
    return lines


def _first_sample(name: str, data: PhaseData) -> Text:
    """The first sample of the first step as the model gets it: supervised tokens in reverse, image tokens counted."""
    position = int(data.plan.order[0])
    source = data.sources[data.pool.sources[int(data.pool.source[position])]]
    sample = source.sample(int(data.pool.row[position]))
    encoded = data.encoder.encode(sample)
    text = Text(f"\n{name}: sample {sample.id!r} of source {source.name!r}, {len(encoded.input_ids)} tokens, ")
    text.append("supervised tokens marked", style="reverse")
    text.append("\n")
    changes = np.flatnonzero(np.diff(encoded.supervised)) + 1
    for ids, marked in zip(np.split(encoded.input_ids, changes), np.split(encoded.supervised, changes), strict=True):
        for run in np.split(ids, np.flatnonzero(np.diff(ids == data.encoder.image_token_id)) + 1):
            if run[0] == data.encoder.image_token_id:
                text.append(f"[{len(run)} image tokens]", style="dim")
            else:
                text.append(data.encoder.decode(run), style="reverse" if marked[0] else "")
    text.append("\n")
    return text
