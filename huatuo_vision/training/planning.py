"""What training a recipe comes to: steps, tokens, FLOPs, GPU-hours, memory. From its data where they are prepared, and
from declared row counts and assumed lengths where not.

`python -m huatuo_vision.training.planning` prints the table of all recipes under recipes/, without a weight, a data set
or the Hub; with `--write recipes/README.md` it puts the table into that file, between its markers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from huatuo_vision.cli import run_command
from huatuo_vision.inputs.assumed import assumed_samples
from huatuo_vision.inputs.plan import StepPlan, plan_steps
from huatuo_vision.inputs.prepare import Pool
from huatuo_vision.model.backbones import known_shape
from huatuo_vision.model.flops import ModelShape, memory_estimate, sample_cost, step_flops
from huatuo_vision.recipe import PhaseSpec, Recipe, load_recipe
from huatuo_vision.schema import OutOfReach, UserError

ASSUMED_MFU = 0.40
ASSUMED_PEAK = 989e12  # H100 or H200 SXM, dense bf16

MARKERS = ("<!-- plans: begin -->", "<!-- plans: end -->")
# What a recipe for somebody's own data is counted with.
ROWS_OF_YOUR_OWN = 10_000

Sharding = Literal["ddp", "zero2", "fsdp"]


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """What one phase comes to, all its epochs together."""

    samples: int
    left_over: int  # samples of incomplete last steps, one epoch after another
    steps: int
    global_batch_size: int
    processes: int
    accumulation: int
    row_fill: float  # tokens over the budget of all rows
    tokens: int
    supervised_tokens: int
    flops: float
    memory: dict[str, int]  # bytes of one GPU, by what they are for

    @property
    def gpu_hours(self) -> float:
        return self.flops / (ASSUMED_MFU * ASSUMED_PEAK) / 3600

    @property
    def memory_gib(self) -> float:
        return sum(self.memory.values()) / 2**30


def prepared_plan(phase: PhaseSpec, shape: ModelShape, pool: Pool, plan: StepPlan, sharding: Sharding) -> PhasePlan:
    """Counted from prepared data and the plan that training will follow."""
    return _plan(phase, shape, pool.tokens, pool.targets, pool.images, plan, sharding, plan.steps, len(pool))


def assumed_plan(
    recipe: Recipe, name: str, shape: ModelShape, rows: Mapping[str, int], processes: int, sharding: Sharding
) -> PhasePlan:
    """Counted from `rows` of each source and assumed lengths (`inputs.assumed`): an excerpt of steps, scaled up."""
    phase = recipe.phases[name]
    samples = assumed_samples(recipe, name, rows, shape.image_tokens)
    plan = plan_steps(
        samples.tokens,
        samples.images,
        samples.targets,
        sample_cost(shape, phase.train, samples.tokens, samples.targets, samples.images),
        global_batch_size=phase.global_batch_size,
        world_size=processes,
        epochs=1,
        max_row_tokens=phase.max_row_tokens,
        max_row_images=phase.max_row_images,
        seed=recipe.seed,
    )
    steps = samples.per_epoch // phase.global_batch_size * phase.epochs
    return _plan(
        phase, shape, samples.tokens, samples.targets, samples.images, plan, sharding, steps, samples.per_epoch
    )


def rows_of(recipe: Recipe, name: str, counted: Mapping[str, int]) -> dict[str, int]:
    """The rows of each source of a phase: counted, or else declared. Raises OutOfReach for a source that is neither."""
    rows = {}
    for entry in recipe.phases[name].data:
        expected = counted.get(entry.source, recipe.data[entry.source].expected_rows)
        if expected is None:
            raise OutOfReach(f"data.{entry.source} cannot be read and has no expected_rows, so nothing can be counted")
        rows[entry.source] = expected
    return rows


def _plan(
    phase: PhaseSpec,
    shape: ModelShape,
    tokens: np.ndarray,
    targets: np.ndarray,
    images: np.ndarray,
    plan: StepPlan,
    sharding: Sharding,
    steps: int,
    per_epoch: int,
) -> PhasePlan:
    """`plan` lays out all steps, or an excerpt of them that stands for all."""
    scale = steps / plan.steps
    tokens, targets, images = (array[plan.order].astype(np.int64) for array in (tokens, targets, images))
    flops = step_flops(
        shape,
        phase.train,
        tokens=int(tokens.sum()),
        squared_lengths=int((tokens**2).sum()),
        targets=int(targets.sum()),
        images=int(images.sum()),
    )
    memory = memory_estimate(
        shape,
        phase.train,
        optimizer_name=phase.optimizer.name,
        precision=phase.precision,
        world_size=plan.world_size,
        sharding=sharding,
        row_tokens=phase.max_row_tokens,
        row_targets=int(np.add.reduceat(targets, plan.row_starts[:-1]).max()),
        recompute=phase.recompute,
    )
    return PhasePlan(
        samples=steps * phase.global_batch_size,
        left_over=per_epoch * phase.epochs - steps * phase.global_batch_size,
        steps=steps,
        global_batch_size=phase.global_batch_size,
        processes=plan.world_size,
        accumulation=plan.accumulation,
        row_fill=float(tokens.sum() / (plan.rows * phase.max_row_tokens)),
        tokens=round(tokens.sum() * scale),
        supervised_tokens=round(targets.sum() * scale),
        flops=flops * scale,
        memory=memory,
    )


# The table of all recipes


def shipped_recipes(folder: Path) -> Iterator[Path]:
    """Every recipe under `folder`, a base before what is built on it. Other files that lie there name no model."""

    def place(path: Path) -> tuple[int, str]:
        return len(path.relative_to(folder).parts), str(path.with_suffix(""))

    for path in sorted(folder.rglob("*.yaml"), key=place):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "model" in values or "ablates" in values:
            yield path


def plans_table(folder: Path) -> str:
    """Markdown: a line for each phase of each recipe that names its launch; a phase that they share is counted once."""
    columns = ("samples", "steps x batch", "rows per step", "supervised tokens", "PFLOP", "GPU-hours", "GiB per GPU")
    lines = [f"| recipe | GPUs | phase | {' | '.join(columns)} |", "| --- | --- | --- |" + " ---: |" * len(columns)]
    before: dict[str, str] = {}  # fingerprint through a phase -> the first recipe that has it
    for path in shipped_recipes(folder):
        recipe = load_recipe(path)
        launch = recipe.launch
        if launch is None or launch.config == "cpu":
            continue
        shape = known_shape(recipe.model)
        relative = path.relative_to(folder)
        title = f"[{relative.with_suffix('')}]({relative})"
        gpus = f"{launch.processes} x {launch.gpu_gb} GB, {launch.config}"
        for name, phase in recipe.phases.items():
            same = before.setdefault(recipe.fingerprint(name), recipe.name)
            if same != recipe.name:
                lines.append(f"| {title} | {gpus} | {name} | as {same} |{' |' * (len(columns) - 1)}")
            else:
                rows = {e.source: recipe.data[e.source].expected_rows or ROWS_OF_YOUR_OWN for e in phase.data}
                plan = assumed_plan(recipe, name, shape, rows, launch.processes, launch.sharding)
                cells = (
                    f"{plan.samples:,}",
                    f"{plan.steps:,} x {plan.global_batch_size}",
                    f"{plan.processes} x {plan.accumulation}",
                    f"{plan.supervised_tokens / 1e6:,.1f} M",
                    f"{plan.flops / 1e15:,.0f}",
                    f"{plan.gpu_hours:,.1f}",
                    f"{plan.memory_gib:,.0f}",
                )
                lines.append(f"| {title} | {gpus} | {name} | {' | '.join(cells)} |")
            title = gpus = ""
    return "\n".join(lines) + "\n"


def with_table(text: str, table: str, where: str) -> str:
    """`text` with the table between its markers. Raises UserError where they are not there."""
    begin, end = MARKERS
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{where} has no place for the table; put the lines {begin} and {end} where it belongs")
    return f"{before}{begin}\n{table}{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m huatuo_vision.training.planning", description="What training each recipe comes to."
    )
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="folder of recipes (default: recipes)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers in this file")
    arguments = parser.parse_args()
    from rich.console import Console

    table = plans_table(arguments.recipes)
    if arguments.write is None:
        Console(width=10_000, soft_wrap=True, highlight=False, markup=False).print(table)
        return
    text = arguments.write.read_text(encoding="utf-8")
    arguments.write.write_text(with_table(text, table, str(arguments.write)), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
