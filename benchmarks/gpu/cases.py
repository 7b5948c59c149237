"""What is run, in this order: the checks, the bare steps, the loader, the padded peer, and compilation last."""

from __future__ import annotations

import dataclasses
import gc
import platform
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from packaging.version import Version

from benchmarks.gpu import correctness, models, samples, steps
from benchmarks.gpu.loading import waiting
from benchmarks.gpu.models import LORA, PHASE_1, PHASE_2, Optimizer, Phase
from benchmarks.gpu.padded import against_padded
from huatuo_vision.model.attention import choose_attention
from huatuo_vision.model.flops import ModelShape
from huatuo_vision.run_record import environment

WARM, TIMED = 3, 8
LARGE_GIB = 120  # an H200; below it an H100 or A100 of 80 GB


@dataclass
class Bench:
    device: torch.device
    toy: bool
    out: Path
    scratch: Path
    ceiling: float | None = None  # FLOP/s of a large matrix product, measured first

    @property
    def memory_gib(self) -> float:
        return torch.cuda.get_device_properties(0).total_memory / 2**30 if self.device.type == "cuda" else LARGE_GIB


@dataclass(frozen=True)
class Case:
    name: str
    seconds: int  # that it takes at most, as far as is known
    run: Callable[[Bench], dict[str, Any]]


def attempt(case: Case, bench: Bench, log: TextIO) -> dict[str, Any]:
    """The case's result, or the reason why there is none: one case that fails stops no other."""
    try:
        found = case.run(bench)
        return {"status": "failed: not equal" if found.get("passed") is False else "ok"} | found
    except torch.OutOfMemoryError as error:
        log.write(f"{case.name}\n{traceback.format_exc()}\n")
        return {"status": "does not fit", "reason": " ".join(str(error).split())[:160]}
    except Exception as error:  # noqa: BLE001 - an unattended run goes on to the next case
        log.write(f"{case.name}\n{traceback.format_exc()}\n")
        return {"status": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        log.flush()
        torch.compiler.reset()  # what was compiled for one model counts against the limit of the next
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def all_cases(bench: Bench) -> list[Case]:
    large = bench.memory_gib >= LARGE_GIB
    state, masters = "bf16 weights and AdamW states", "full, fp32 masters"
    eight, three, small = "Llama-3-8B", "Qwen2.5-3B", "Qwen2.5-1.5B"
    cases = [
        Case("versions, card and matmul ceiling", 10, environment_and_ceiling),
        Case("attention: packed against per sample", 10, lambda b: correctness.attention(b.device, b.toy)),
        Case("model: packed against per sample", 15, lambda b: correctness.packed_model(b.device, b.toy)),
        timed(eight, "phase 1", PHASE_1, 8192, 1, profiled=True),
        timed(eight, "LoRA", LORA, 8192, 1),
    ]
    if large:
        cases.append(timed(eight, f"phase 2, {state}", PHASE_2, 8192, 2, bf16_state=True, profiled=True))
    else:
        cases.append(timed(eight, f"phase 2, {state}", PHASE_2, 4096, 4, bf16_state=True, recompute="all"))
    cases += [
        timed(three, masters, PHASE_2, 8192 if large else 4096, 2 if large else 4, profiled=True),
        timed(eight, "phase 1", PHASE_1, 4096, 2),
        timed(eight, "phase 1", PHASE_1, 8192, 1, recompute="all"),
        timed(eight, "LoRA", LORA, 4096, 2),
        timed(eight, "LoRA", LORA, 8192, 1, recompute="all"),
        timed(eight, f"phase 2, {state}", PHASE_2, 4096, 4, bf16_state=True)
        if large
        else timed(eight, f"phase 2, {state}", PHASE_2, 8192, 2, bf16_state=True, recompute="all"),
        timed(three, masters, PHASE_2, 8192, 2, recompute="all"),
        timed(small, masters, PHASE_2, 8192, 2),
        loaded(eight, workers=4),
        loaded(small, workers=8),
        Case(
            "ours against a padded batch, Llama-3-8B, phase 1",
            40,
            lambda b: against_padded(eight, b.device, b.toy, 128 if b.toy else 4096, 1 if b.toy else 3),
        ),
        timed(three, masters, PHASE_2, 8192 if large else 4096, 2 if large else 4, compiled=True, profiled=True),
        timed(small, masters, PHASE_2, 8192, 2, compiled=True),
        timed(eight, "phase 1", PHASE_1, 8192, 1, compiled=True, profiled=True),
        timed(eight, f"phase 2, {state}", PHASE_2, 8192, 2, bf16_state=True, compiled=True)
        if large
        else timed(eight, f"phase 2, {state}", PHASE_2, 8192, 2, bf16_state=True, recompute="all", compiled=True),
        against(small, masters, PHASE_2, turns=2, seconds=60),
    ]
    if large:
        cases.append(
            timed(eight, "phase 2, fp32 masters, 8-bit AdamW", PHASE_2, 4096, 4, compiled=True, optimizer="adamw_8bit")
        )
    return [
        *cases,
        against(eight, "phase 1", PHASE_1, turns=1, seconds=45),
        timed(eight, "LoRA", LORA, 8192, 1, compiled=True),
    ]


def environment_and_ceiling(bench: Bench) -> dict[str, Any]:
    found = environment() | {"platform": platform.platform(), "attention": None}
    found["attention"] = choose_attention("auto", device=bench.device, precision="bf16")
    if bench.device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(0)
    found |= {"card": properties.name, "memory_gib": bench.memory_gib, "cuda": torch.version.cuda}
    a, b = (torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        a @ b
    end.record()
    torch.cuda.synchronize()
    bench.ceiling = 20 * 2 * 8192**3 / (begin.elapsed_time(end) / 1e3)
    return found | {"matmul_tflops": bench.ceiling / 1e12}


def timed(
    language: str,
    what: str,
    train: models.Train,
    row_tokens: int,
    rows_per_step: int,
    *,
    recompute: str = "none",
    compiled: bool = False,
    bf16_state: bool = False,
    optimizer: str = "adamw",
    profiled: bool = False,
) -> Case:
    phase = Phase(train, recompute=recompute, compile=compiled, optimizer=Optimizer(name=optimizer))
    name = f"{language}, {what}, {rows_per_step} x {row_tokens // 1024}k"
    name += ", recomputed" * (recompute == "all") + ", compiled" * compiled

    def run(bench: Bench) -> dict[str, Any]:
        if optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
            return {"status": "not run: bitsandbytes is not installed"}
        config = models.llava_config(language, bench.toy)
        pool = samples.drawn_pool(config.image_seq_length, bench.toy)
        warm, count = (2, 2) if bench.toy else (WARM, TIMED)
        plan = samples.plan_rows(
            pool,
            ModelShape.from_config(config),
            train,
            row_tokens=128 if bench.toy else row_tokens,
            rows_per_step=rows_per_step,
            steps=warm + count + profiled,
        )
        # Compiling takes a minute on a CPU too, and shows nothing there.
        ready = dataclasses.replace(phase, compile=compiled and not bench.toy)
        model = models.ready_model(config, ready, bench.device, bf16_state=bf16_state)
        rows = samples.DrawnRows(plan, pool, config, bench.device)
        trained, total = models.weights_in_billions(model)
        return {
            "trained_b": trained,
            "weights_b": total,
            "estimated_gib": None if bf16_state else steps.estimated_gib(config, phase, rows),
        } | steps.time_steps(
            model,
            ready,
            rows,
            config,
            bench.scratch / "trainer",
            warm=warm,
            ceiling=bench.ceiling,
            profiled=bench.out / f"profile {name}.txt".replace(" ", "-").replace(",", "") if profiled else None,
        )

    return Case(name, 50 if compiled else 30, run)


def loaded(language: str, workers: int) -> Case:
    def run(bench: Bench) -> dict[str, Any]:
        tokens, windows = (128, 1) if bench.toy else (8192, 3)
        return waiting(
            language, bench.device, bench.toy, bench.scratch, tokens, 0 if bench.toy else workers, windows=windows
        )

    return Case(f"waiting for data, {language}, phase 1, {workers} workers", 35, run)


def against(language: str, what: str, train: models.Train, turns: int, seconds: int) -> Case:
    def run(bench: Bench) -> dict[str, Any]:
        try:
            import trl  # noqa: F401, I001 - what is missing is named in this order
            import datasets  # noqa: F401
        except ImportError as error:
            return {"status": f"not run: {error.name} is not installed"}
        if Version(transformers.__version__) < Version("5.18"):
            return {"status": "not run: TRL's assistant-only loss with pictures needs transformers 5.18"}
        from benchmarks.gpu.trl_peer import against_trl

        tokens, times = (128, 1) if bench.toy else (8192, turns)
        return against_trl(language, train, bench.device, bench.toy, bench.scratch, tokens, times)

    return Case(f"ours against TRL, {language}, {what}", seconds, run)
