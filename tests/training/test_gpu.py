"""The tiny recipe on a CUDA device, through the real commands: make test-gpu. Skips where there is none."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.conftest import ROOT, Launcher, largest_difference, log_lines, weights
from tests.training.test_variants import both_phases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@dataclasses.dataclass(frozen=True)
class GpuLauncher(Launcher):
    def environment(self) -> dict[str, str]:
        kept = super().environment()
        return {k: v for k, v in kept.items() if k not in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES")}


@pytest.fixture(scope="module")
def gpu(hf_home) -> GpuLauncher:
    return GpuLauncher(hf_home)


@pytest.fixture(scope="module")
def bf16(gpu, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "bf16"
    gpu.run(out, *both_phases("precision=bf16"))
    return out


def last_loss(out: Path) -> float:
    return log_lines(out, ("loss",))[-1][0]


def test_in_fp32_a_gpu_learns_what_the_cpu_learns(gpu, finished, tmp_path):
    gpu.run(tmp_path / "run")
    assert "CPU" not in json.loads((tmp_path / "run/run.json").read_text())["hardware"]["device"]
    assert largest_difference(finished / "final", tmp_path / "run/final") < 2e-3
    assert last_loss(tmp_path / "run") == pytest.approx(last_loss(finished), abs=1e-4)


def test_bf16_and_the_varlen_kernel_learn_it_too(finished, bf16):
    assert last_loss(bf16) == pytest.approx(last_loss(finished), abs=0.02)
    assert {w.dtype for w in weights(bf16 / "final").values()} == {torch.bfloat16}


def test_the_varlen_kernel_and_sdpa_per_sample_agree(gpu, bf16, tmp_path):
    gpu.run(tmp_path / "run", *both_phases("precision=bf16"), *both_phases("attention=sdpa"))
    assert last_loss(tmp_path / "run") == pytest.approx(last_loss(bf16), abs=0.005)


def test_a_killed_run_goes_on(gpu, bf16, tmp_path):
    out = tmp_path / "run"
    settings = both_phases("precision=bf16")
    gpu.run_and_kill(out, lambda: any((out / "instruct").glob("checkpoint-*")), *settings)
    gpu.run(out, *settings)
    assert last_loss(out) == pytest.approx(last_loss(bf16), abs=1e-3)


@pytest.mark.parametrize("setting", ["recompute=all", "compile=true", "optimizer.name=adamw_8bit"])
def test_memory_and_speed_settings(gpu, bf16, tmp_path, setting):
    if "8bit" in setting:
        pytest.importorskip("bitsandbytes")
    gpu.run(tmp_path / "run", *both_phases("precision=bf16"), *both_phases(setting))
    assert last_loss(tmp_path / "run") == pytest.approx(last_loss(bf16), abs=0.05 if "8bit" in setting else 0.01)


def test_qlora(gpu, tmp_path):
    pytest.importorskip("bitsandbytes")
    lora = "{r: 4, alpha: 8, quantize: nf4}"
    train = f"phases.instruct.train={{projector: {{lr: 1e-3}}, language_model: {{lr: 1e-2, lora: {lora}}}}}"
    gpu.run(tmp_path / "run", *both_phases("precision=bf16"), "--set", train, "--set", "phases.instruct.epochs=3")
    losses = [loss for phase, loss in log_lines(tmp_path / "run", ("phase", "loss")) if phase == "instruct"]
    assert losses[-1] < losses[0] - 0.2


def test_eval_answers_on_the_gpu(gpu, bf16, tmp_path):
    done = subprocess.run(
        [sys.executable, "eval.py", "--model", bf16 / "final", "--benchmarks", "phantom", "--limit", "40"]
        + ["--out", tmp_path / "eval"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=gpu.environment(),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
