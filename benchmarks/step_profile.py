"""Where the time of a training step goes, and what is left to gain: python -m benchmarks.step_profile

`train.py` itself trains the small LLaVA of `benchmarks.training_speed` on its rows, under torch's profiler, on one
thread. The matrix products are set against a product of two square matrices on this core, in FLOP/s: what they would
take at that speed, with attention as it is and all else for nothing, is a limit for fp32 with these kernels.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "reading and encoding samples": ("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__",),
    "AdamW and clipping": ("aten::_fused_adamw_", "aten::linalg_vector_norm", "aten::_foreach_mul_"),
}
OTHER = "activations, norms, rotary embedding, copies and Python"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=("single", "mixture"), default="single", help="of rows (default: single)")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="optimizer steps (default: 12)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step_profile"), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    # Read when torch is imported, and by accelerate.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}

    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(1)
    found, flops = profile_steps(arguments.kind, arguments.steps, arguments.out.resolve())
    total = sum(found.values())
    table = Table(title=f"Time of a step, {arguments.kind} rows, of {arguments.steps} steps", title_justify="left")
    for column in ("part", "s", "share"):
        table.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)
    for group in (*GROUPS, OTHER):
        table.add_row(group, f"{found[group] / arguments.steps:.3f}", f"{found[group] / total:.1%}")
    table.add_section()
    table.add_row("in all", f"{total / arguments.steps:.3f}", "")
    console = Console(width=100, highlight=False)
    console.print(table)
    fastest, reached = square_product_speed(), flops / found["matrix products"]
    limit = flops / fastest + found["attention"]
    console.print(
        f"matrix products: {reached / 1e9:.0f} GFLOP/s, {reached / fastest:.0%} of a product of two square matrices "
        f"({fastest / 1e9:.0f} GFLOP/s)\nat that speed, attention as it is and all else for nothing: "
        f"{total / limit:.2f} times as fast"
    )


def profile_steps(kind: str, steps: int, folder: Path) -> tuple[dict[str, float], float]:
    """Seconds of wall time by group over all steps, and the FLOPs of the matrix products."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import Trainer

    import train
    from benchmarks.samples import make_samples
    from benchmarks.training_speed import BATCH, MEGA_BATCH, build_workload, command

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "ours").mkdir(parents=True)
    path = make_samples(folder / "samples", kind, MEGA_BATCH * BATCH, 0)
    workload = build_workload(kind, path, folder, steps=steps, seed=0)
    _, script, *options = command("ours", workload, workload.random, folder / "ours", Path(sys.executable))
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    trained = Trainer.train

    def profiled(*args: object, **kwargs: object) -> object:
        with profiler:  # the optimizer steps alone, without preparing the rows and writing the model
            return trained(*args, **kwargs)

    with patch.object(Trainer, "train", profiled), patch.object(sys, "argv", [script, *options]):
        train.main()

    group_of = {name: group for group, names in GROUPS.items() for name in names}
    found, flops = dict.fromkeys((*GROUPS, OTHER), 0.0), 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        group = group_of.get(event.key, OTHER)
        found[group] += event.self_cpu_time_total / 1e6
        if group == "matrix products":
            # The profiler's own count leaves out the in-place product.
            first = 0 if event.key == "aten::mm" else 1  # behind what is added to
            (rows, inner), (_, columns) = event.input_shapes[first : first + 2]
            flops += event.count * 2 * rows * inner * columns
    return found, flops


def square_product_speed(side: int = 1024, turns: int = 9) -> float:
    """FLOP/s of the fastest of some products of two square fp32 matrices."""
    import torch

    left, right = torch.randn(side, side), torch.randn(side, side)
    seconds = []
    for _ in range(turns):
        began = time.process_time()
        left @ right
        seconds.append(time.process_time() - began)
    return 2 * side**3 / min(seconds)


if __name__ == "__main__":
    main()
