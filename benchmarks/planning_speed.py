"""Time, memory and balance of the step plan over data sets as large as they come: python -m benchmarks.planning_speed

Lengths are drawn as PubMedVision's are assumed to be (inputs/assumed_lengths.yaml: 22 % of the samples have 2 to 6
images of 576 tokens), costs are those of training a Llama-3-8B with CLIP-L/336. Every plan is made in a process of its
own; its memory is the peak above the drawn arrays, which a run holds anyway.

imbalance   what waiting for each other costs: seconds are taken to be FLOPs, and over all micro-steps the slowest
            rank's sum is compared with the mean rank's: sum of maxima over sum of means, less 1
row fill    tokens in the rows over the rows' budget
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

PROCESSES, ROW_TOKENS, ROW_IMAGES = 8, 8192, 12


def measure(samples: int, global_batch_size: int) -> dict[str, Any]:
    """Plan one epoch; runs in a process of its own."""
    import numpy as np

    from huatuo_vision.inputs.assumed import draw_lengths
    from huatuo_vision.inputs.plan import plan_steps
    from huatuo_vision.model.flops import EncoderShape, LayerStack, ModelShape, ProjectorShape, sample_cost
    from huatuo_vision.recipe import TrainSpec

    drawn = draw_lengths("pubmedvision.instruction", tokens_per_image=576)
    chosen = np.random.default_rng(1).integers(0, len(drawn[0]), samples)
    tokens, targets, images = (column[chosen] for column in drawn)
    tokens = tokens + (chosen % 7).astype(tokens.dtype)  # fewer samples alike
    train = TrainSpec(projector={"lr": 1e-3}, language_model={"lr": 2e-5})
    stack = LayerStack(
        layers=24, layers_read=23, hidden=1024, intermediate=4096, tokens=577, layer_weights=12 * 1024**2
    )
    clip = EncoderShape((stack,), patch_weights=3 * 14**2 * 1024, position_weights=577 * 1024)
    projector = ProjectorShape.of_mlp(1024, 4096, 576)
    shape = ModelShape(**_LLAMA3_8B, encoders=(clip,), projector=projector, image_tokens=576)
    cost = sample_cost(shape, train, tokens, targets, images)
    tracemalloc.start()
    began = time.process_time()
    plan = plan_steps(
        tokens,
        images,
        targets,
        cost,
        global_batch_size=global_batch_size,
        world_size=PROCESSES,
        epochs=1,
        max_row_tokens=ROW_TOKENS,
        max_row_images=ROW_IMAGES,
        seed=0,
    )
    seconds = time.process_time() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # (steps, accumulation, ranks): the rows that run at the same time stand side by side.
    loads = np.add.reduceat(cost[plan.order], plan.row_starts[:-1]).reshape(plan.steps, -1, PROCESSES)
    return {
        "samples": samples,
        "global_batch_size": global_batch_size,
        "steps": plan.steps,
        "rows_per_step": plan.rows_per_step,
        "accumulation": plan.accumulation,
        "cpu_seconds": round(seconds, 2),
        "peak_mib": round(peak / 2**20),
        "bytes_of_the_plan_a_sample": round(
            (plan.order.nbytes + plan.row_starts.nbytes + plan.step_targets.nbytes) / samples, 1
        ),
        "imbalance": float(loads.max(axis=2).sum() / loads.mean(axis=2).sum() - 1),
        "row_fill": float(tokens[plan.order].sum() / (plan.rows * ROW_TOKENS)),
    }


# By ModelShape's names; beside it CLIP ViT-L/14 at 336 px.
_LLAMA3_8B = {
    "layers": 32,
    "hidden": 4096,
    "intermediate": 14336,
    "query_dim": 4096,
    "key_value_dim": 1024,
    "vocabulary": 128320,
    "tied_embeddings": False,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[1_300_000, 10_000_000])
    parser.add_argument("--global-batch-sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--json", action="store_true", help="print JSON lines in place of the table")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from rich.console import Console
    from rich.table import Table

    title = f"{PROCESSES} processes, rows of at most {ROW_TOKENS:,} tokens and {ROW_IMAGES} images"
    table = Table(title=title, title_justify="left")
    for column in ("samples", "batch", "rows a step", "CPU s", "peak", "plan a sample", "imbalance", "row fill"):
        table.add_column(column, justify="right")
    spawn = multiprocessing.get_context("spawn")
    for samples in arguments.samples:
        for global_batch_size in arguments.global_batch_sizes:
            with spawn.Pool(1) as pool:
                found = pool.apply(measure, (samples, global_batch_size))
            if arguments.json:
                print(json.dumps(found), flush=True)
            table.add_row(
                f"{found['samples']:,}",
                f"{found['global_batch_size']}",
                f"{found['rows_per_step']} = {PROCESSES} x {found['accumulation']}",
                f"{found['cpu_seconds']:.1f}",
                f"{found['peak_mib']:,} MiB",
                f"{found['bytes_of_the_plan_a_sample']:.1f} B",
                f"{found['imbalance']:.2%}",
                f"{found['row_fill']:.1%}",
            )
    if not arguments.json:
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
