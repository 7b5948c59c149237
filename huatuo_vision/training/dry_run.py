"""`train.py --dry-run`: everything a recipe decides, counted without loading a weight."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig

from huatuo_vision.inputs.encode import Encoder
from huatuo_vision.inputs.prepare import load_pool, prepare
from huatuo_vision.inputs.sources import ensure_made, open_source
from huatuo_vision.launch import launched_world
from huatuo_vision.model.backbones import known_shape
from huatuo_vision.model.compose import compose_processor
from huatuo_vision.model.flops import ModelShape
from huatuo_vision.recipe import PARTS, PhaseSpec, Recipe
from huatuo_vision.schema import OutOfReach
from huatuo_vision.training.phase import PhaseData, plan_phase
from huatuo_vision.training.planning import (
    ASSUMED_MFU,
    ASSUMED_PEAK,
    PhasePlan,
    assumed_plan,
    prepared_plan,
    rows_of,
)
from huatuo_vision.training.run import cache_folder, open_sources, recipe_texts, sources_of


def dry_run(recipe: Recipe, phases: Sequence[str], console: Console) -> None:
    """Print what training would come to: on the processes that this was launched as, or else on the recipe's own.

    The data are prepared and counted. Where the Hub or a source is out of reach, what the recipe declares is counted
    instead, and said to be assumed.
    """
    world = launched_world()
    if world.rank != 0:
        return
    if world.processes == 1 and recipe.launch is not None:
        processes, sharding = recipe.launch.processes, recipe.launch.sharding
    else:
        processes, sharding = world.processes, "fsdp" if world.fsdp else "zero2" if world.deepspeed else "ddp"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        counts, absent = _look(recipe, phases, out / "base")
        if absent:
            for sentence in absent:
                console.print(f"[yellow]out of reach:[/yellow] {escape(sentence)}", highlight=False)
            shape = known_shape(recipe.model)
            plans = {
                name: assumed_plan(recipe, name, shape, rows_of(recipe, name, counts), processes, sharding)
                for name in phases
            }
            prepared = {}
        else:
            prepared = _prepare(recipe, phases, out, processes, console)
            shape = prepared[phases[0]].shape
            plans = {
                name: prepared_plan(recipe.phases[name], shape, data.pool, data.plan, sharding)
                for name, data in prepared.items()
            }
        console.print(_steps_table(plans, assumed=bool(absent)))
        console.print(_cost_table(recipe, shape, plans))
        basis = "Rows as read or declared, lengths ASSUMED (inputs/assumed_lengths.yaml). " if absent else ""
        console.print(
            f"{basis}Parameters without norms and biases, some 0.1 % more. GPU-hours at {ASSUMED_MFU:.0%} MFU of "
            f"{ASSUMED_PEAK / 1e12:.0f} TFLOP/s (H100/H200, bf16). Memory is an estimate for {sharding} on {processes} "
            "process(es), before the allocator's own; the formula stands at huatuo_vision.model.flops.memory_estimate.",
            style="dim",
        )
        for name, data in prepared.items():
            console.print(_first_sample(name, data))


def _look(recipe: Recipe, phases: Sequence[str], base: Path) -> tuple[dict[str, int], list[str]]:
    """Rows of the sources that can be read here, and why what else the recipe needs cannot; the processor is written to
    `base` where it can."""
    rows, absent = {}, []
    for name in sources_of(recipe, phases):
        try:
            ensure_made(recipe.data[name], cache_folder())
            rows[name] = len(open_source(name, recipe.data[name], cache_folder()))
        except OutOfReach as error:
            absent.append(str(error))
    try:
        compose_processor(recipe.model, base, recipe_texts(recipe) if recipe.model.trains_tokenizer else None)
    except OutOfReach as error:
        absent.append(str(error))
    return rows, absent


def _prepare(
    recipe: Recipe, phases: Sequence[str], out: Path, processes: int, console: Console
) -> dict[str, PhaseData]:
    encoder, shape = Encoder(out / "base"), ModelShape.from_config(AutoConfig.from_pretrained(out / "base"))
    prepare(recipe, phases, encoder, cache_folder(), out, console)
    sources = open_sources(recipe, phases)
    pools = {name: load_pool(recipe, name, out, recipe.seed) for name in phases}
    return {name: plan_phase(recipe, name, pool, sources, encoder, shape, processes) for name, pool in pools.items()}


def _steps_table(plans: Mapping[str, PhasePlan], assumed: bool) -> Table:
    title = "optimizer steps (ASSUMED lengths)" if assumed else "optimizer steps"
    table = Table(title=title, title_justify="left")
    for column in (
        "phase",
        "samples",
        "steps",
        "x samples",
        "rows per step",
        "row fill",
        "left over",
        "tokens",
        "supervised tokens",
    ):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, plan in plans.items():
        table.add_row(
            name,
            f"{plan.samples:,}",
            f"{plan.steps:,}",
            f"{plan.global_batch_size}",
            f"{plan.processes * plan.accumulation} = {plan.processes} x {plan.accumulation}",
            f"{plan.row_fill:.0%}",
            f"{plan.left_over:,}",
            f"{plan.tokens:,}",
            f"{plan.supervised_tokens:,}",
        )
    return table


def _cost_table(recipe: Recipe, shape: ModelShape, plans: Mapping[str, PhasePlan]) -> Table:
    table = Table(title="what trains, and what it costs", title_justify="left")
    for column in ("phase", "trained parameters", "TFLOP per step", "GPU-hours", "memory per GPU"):
        table.add_column(column, justify="left" if column in ("phase", "trained parameters") else "right")
    for name, plan in plans.items():
        table.add_row(
            name,
            "\n".join(_trained(recipe.phases[name], shape)),
            f"{plan.flops / plan.steps / 1e12:,.3f}",
            f"{plan.gpu_hours:,.3f}",
            f"{plan.memory_gib:,.1f} GiB\n"
            + "\n".join(f"{part} {size / 2**30:.1f}" for part, size in plan.memory.items()),
        )
    return table


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
            aggregator = f" (aggregator {training.sva_lr:g})" if part == "projector" and training.sva_lr else ""
            lines.append(f"{part} {shape.weights[part]:,}, lr {training.lr:g}{aggregator}")
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
