"""Times the optimizer steps of the project's own trainer, on the device's clock."""

from __future__ import annotations

import statistics
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlavaConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from benchmarks.gpu.models import Phase
from huatuo_vision.model.flops import ModelShape, memory_estimate, step_flops
from huatuo_vision.training.phase import training_arguments
from huatuo_vision.training.stop import StopRequest
from huatuo_vision.training.trainer import PhaseTrainer

PEAK = 989e12  # dense bf16 FLOP/s of H100 and H200 (SXM), from the data sheet
BAR, GOAL = 0.45, 0.50  # MFU


def make_trainer(
    model: nn.Module, phase: Phase, rows: torch.utils.data.Dataset, config: LlavaConfig, folder: Path, workers: int
) -> PhaseTrainer:
    """The trainer as `run_phase` makes it, but that nothing is saved."""
    recipe = SimpleNamespace(name="gpu", phases={"timed": phase}, report_to=(), workers=workers, seed=0)
    arguments = training_arguments(recipe, "timed", folder, rows.plan)
    arguments.save_strategy = "no"
    if workers == 0:  # the rows are on the device already, where nothing can be pinned
        arguments.dataloader_pin_memory = arguments.accelerator_config.non_blocking = False
    shape = ModelShape.from_config(config)

    def row_flops(stats: dict[str, int]) -> float:
        return counted_flops(shape, phase, stats)

    trainer = PhaseTrainer(phase, rows, row_flops, StopRequest(), model=model, args=arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


def counted_flops(shape: ModelShape, phase: Phase, stats: dict[str, int]) -> float:
    return step_flops(
        shape, phase.train, **{key: stats[key] for key in ("tokens", "squared_lengths", "targets", "images")}
    )


class StepClock(TrainerCallback):
    """An event at the end of every optimizer step; the last warm-up step can be watched for waits of the host."""

    def __init__(self, warm: int, device: torch.device, profiled: Path | None, watched: bool = True):
        self.warm, self.device, self.profiled, self.watched = warm, device, profiled, watched
        self.marks: list[Any] = []
        self.waits: dict[str, int] = {}
        self._watch: ExitStack | None = None
        self._profiler: profile | None = None

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.mark()
        if self._watch is not None:
            self._end_watch()
        elif self.watched and state.global_step == self.warm - 1 and self.device.type == "cuda":
            self._watch = ExitStack()
            self._caught = self._watch.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if self._profiler is not None:
            self._end_profile()
        elif self.profiled is not None and state.global_step == state.max_steps - 1:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self._profiler = profile(activities=activities)
            self._profiler.__enter__()

    def _end_watch(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        for warning in self._caught:
            if "synchroniz" in str(warning.message):
                place = "/".join(Path(warning.filename).parts[-2:]) + f":{warning.lineno}"
                self.waits[place] = self.waits.get(place, 0) + 1
        self._watch.close()
        self._watch = None

    def _end_profile(self) -> None:
        self._profiler.__exit__(None, None, None)
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        averages = self._profiler.key_averages()
        self.profiled.write_text(averages.table(sort_by=by, row_limit=60, max_name_column_width=90))
        self._profiler, self.profiled = None, None

    def seconds(self) -> list[float]:
        """Of every step, warm-up included."""
        pairs = list(zip(self.marks[:-1], self.marks[1:], strict=True))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in pairs]


def time_steps(
    model: nn.Module,
    phase: Phase,
    rows: torch.utils.data.Dataset,
    config: LlavaConfig,
    folder: Path,
    *,
    warm: int,
    ceiling: float | None,
    profiled: Path | None = None,
) -> dict[str, Any]:
    """Train over all the rows and report on the steps after the warm-up. `profiled` takes one more step at the end."""
    plan, shape = rows.plan, ModelShape.from_config(config)
    trainer = make_trainer(model, phase, rows, config, folder, workers=0)
    device = trainer.args.device
    clock = StepClock(warm, device, profiled)
    trainer.add_callback(clock)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = trainer.train()
    seconds = clock.seconds()
    timed = slice(warm, len(seconds) - (profiled is not None))
    stats = [rows[index]["stats"] for index in range(plan.rows)]
    steps = [stats[i * plan.accumulation : (i + 1) * plan.accumulation] for i in range(plan.steps)][timed]
    total = {key: sum(row[key] for step in steps for row in step) for key in ("tokens", "targets", "samples")}
    flops = sum(counted_flops(shape, phase, row) for step in steps for row in step)
    spent = sum(seconds[timed])
    rates = [
        sum(counted_flops(shape, phase, row) for row in step) / s for step, s in zip(steps, seconds[timed], strict=True)
    ]
    return {
        "loss": result.training_loss,
        "rows_per_step": plan.accumulation,
        "samples_per_step": plan.global_batch_size,
        "row_fill": total["tokens"] / (len(steps) * plan.accumulation * max(row["tokens"] for row in stats)),
        "tokens_per_step": total["tokens"] / len(steps),
        "first_step_s": seconds[0],
        "step_s": statistics.median(seconds[timed]),
        "step_s_range": [min(seconds[timed]), max(seconds[timed])],
        "steps_timed": len(steps),
        "tokens_per_s": total["tokens"] / spent,
        "supervised_tokens_per_s": total["targets"] / spent,
        "samples_per_s": total["samples"] / spent,
        "tflops": flops / spent / 1e12,
        "mfu": statistics.median(rates) / PEAK,
        "of_ceiling": flops / spent / ceiling if ceiling else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "host_waits_per_step": clock.waits,
    }


def estimated_gib(config: LlavaConfig, phase: Phase, rows: torch.utils.data.Dataset) -> float:
    """What the planner says of the largest row."""
    stats = [rows[index]["stats"] for index in range(rows.plan.rows)]
    return (
        sum(
            memory_estimate(
                ModelShape.from_config(config),
                phase.train,
                optimizer_name=phase.optimizer.name,
                precision=phase.precision,
                world_size=1,
                sharding="ddp",
                row_tokens=max(row["tokens"] for row in stats),
                row_targets=max(row["targets"] for row in stats),
                recompute=phase.recompute,
            ).values()
        )
        / 2**30
    )
