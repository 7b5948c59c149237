"""The shipped DeepSpeed configurations, launched with two processes on the CPU (gloo), learn what one process learns.

Without DeepSpeed these tests are skipped. To run them, in an environment with requirements.txt:

    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8
    python -m pytest tests/training/test_deepspeed.py
"""

import json
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from huatuo_vision.cli import START_AGAIN
from huatuo_vision.training.export import export_checkpoint
from tests.training.conftest import TINY, Launcher, largest_difference, log_lines
from tests.training.test_stop import logged, signalled

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

# ZeRO-3 keeps a parameter of up to 100,000 weights whole; rows of one or two sources have one or two losses.
_WIDE = {
    "model.vision_encoder.config.hidden_size": 320,
    "model.vision_encoder.config.intermediate_size": 640,
    "model.language_model.config.hidden_size": 320,
    "model.language_model.config.intermediate_size": 640,
    "phases.align.data": "[{source: captions}, {source: questions}]",
    "phases.instruct.data": "[{source: captions}, {source: questions}]",
    "phases.align.max_row_tokens": 512,  # so that a step accumulates
    "phases.instruct.keep_checkpoints": 9,
}
WIDE = [word for key, value in _WIDE.items() for word in ("--set", f"{key}={value}")]
LORA = "{projector: {lr: 1.0e-3}, language_model: {lr: 1.0e-3, lora: {r: 4, alpha: 8}}}"


@dataclass(frozen=True)
class ZeroLauncher(Launcher):
    stage: int

    def command(self, out: Path, *arguments: str, processes: int = 2, recipe: Path = TINY) -> list[str]:
        launch = ["-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/zero{self.stage}.yaml"]
        launch += ["--num_processes", str(processes), "--main_process_port", "0"]
        return [sys.executable, *launch, "train.py", "--recipe", str(recipe), "--out", str(out), *arguments]

    def environment(self) -> dict[str, str]:
        return {key: value for key, value in super().environment().items() if key != "ACCELERATE_USE_CPU"}


@pytest.fixture(params=[2, 3], ids=["zero2", "zero3"])
def zero(request, hf_home) -> ZeroLauncher:
    return ZeroLauncher(hf_home, request.param)


@pytest.fixture(scope="module")
def one(launcher, tmp_path_factory) -> Path:
    """The wide recipe, trained by one process without DeepSpeed; beside it, its model of the second phase's step 5."""
    out = tmp_path_factory.mktemp("one") / "wide"
    launcher.run_and_kill(out, lambda: (out / "instruct/checkpoint-5/manifest.json").exists(), *WIDE)
    export_checkpoint(out / "instruct/checkpoint-5", out.with_name("step-5"))
    launcher.run(out, *WIDE)
    return out


def test_two_processes_learn_what_one_learns_also_stopped_and_resumed(launcher, zero, one, tmp_path):
    out = tmp_path / "zero"
    code, said = signalled(zero, out, signal.SIGUSR1, lambda: logged(out, "instruct", 5), *WIDE)
    assert code != 0 and f"exitcode : {START_AGAIN}" in said
    step = int(re.search(r"stopped: instruct is saved at step (\d+) of 24", said)[1])
    checkpoint = out / f"instruct/checkpoint-{step}"
    assert list(checkpoint.glob("global_step*/*optim_states.pt")), "DeepSpeed wrote no checkpoint"
    export_checkpoint(out / "instruct/checkpoint-5", tmp_path / "step-5")
    assert largest_difference(one.with_name("step-5"), tmp_path / "step-5") < 2e-5
    assert largest_difference(one / "final", tmp_path / "step-5") > 1e-3
    # On other processes it does not go on.
    fewer = zero.run(out, *WIDE, processes=1, code=1).stderr
    assert "was written by 2 processes under DEEPSPEED; this is 1 under DEEPSPEED" in " ".join(fewer.split())
    without = launcher.run(out, *WIDE, code=2).stderr
    assert "was written by 2 processes under DEEPSPEED; this is 1 under NO" in " ".join(without.split())

    done = zero.run(out, *WIDE)
    assert f"resuming instruct from {checkpoint}" in " ".join(done.stdout.split())
    record = json.loads((out / "run.json").read_text())
    assert record["hardware"]["distributed_type"] == "DEEPSPEED" and record["hardware"]["world_size"] == 2
    assert record["phases"]["align"]["accumulation"] > 1
    for model in ("align/model", "final"):
        assert largest_difference(one / model, out / model) < 2e-5
    keys = ("phase", "step", "loss", "grad_norm", "lr/projector")
    expected, found = ({line[:2]: line[2:] for line in log_lines(run, keys)} for run in (one, out))
    whole = [(phase, n) for phase, n in expected if phase == "align" or n > step + 4]  # means since the line before
    assert len(whole) > 12
    for place in whole:
        assert found[place] == pytest.approx(expected[place], abs=1e-4), place


def test_an_adapter_trains_as_in_one_process(launcher, zero, one, tmp_path):
    adapter = [*WIDE, "--set", f"phases.instruct.train={LORA}"]
    launcher.run(tmp_path / "one", *adapter, "--set", f"reuse={one}")
    zero.run(tmp_path / "zero", *adapter, "--set", f"reuse={one}")
    assert largest_difference(tmp_path / "one/final", tmp_path / "zero/final") < 2e-5


def test_a_step_that_is_not_finite_is_not_applied(zero, tmp_path):
    said = zero.run(tmp_path / "nan", "--set", "phases.align.train.projector.lr=1e38", code=1).stderr
    assert "optimizer step 3 of align is not finite" in " ".join(said.split())
    assert not list((tmp_path / "nan/align").glob("checkpoint-*"))


def test_told_to_use_the_cpu_accelerate_leaves_deepspeed_out_which_is_refused(zero, tmp_path, monkeypatch):
    told = Launcher.environment(zero)
    monkeypatch.setattr(ZeroLauncher, "environment", lambda _: told)
    said = zero.run(tmp_path / "x", code=1).stderr
    assert "DeepSpeed was asked for, but accelerate started MULTI_CPU" in " ".join(said.split())
