"""Two encoders through the whole machinery: the same trainer, plan, folders, evaluation and chat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import ROOT, largest_difference

RECIPE = ROOT / "recipes" / "mini" / "tiny-two-encoders.yaml"


@pytest.fixture(scope="module")
def trained(launcher, tmp_path_factory) -> Path:
    """align, instruct (everything, recomputed) and anneal, by one process."""
    out = tmp_path_factory.mktemp("two") / "run"
    launcher.run(out, recipe=RECIPE)
    return out


@pytest.mark.slow
def test_a_recipe_with_two_encoders_trains_through_three_phases(trained):
    record = json.loads((trained / "run.json").read_text())
    assert list(record["phases"]) == ["align", "instruct", "anneal"]
    assert set(record["base_models"]) == {"clip", "convnext", "language_model"}
    assert [bool(n) for n in record["phases"]["align"]["trainable_parameters"].values()] == [False, True, False]
    config = json.loads((trained / "final" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("multi_encoder_llava", ["MultiEncoderLlava"])
    last = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()][-1]
    assert (last["phase"], last["lr/projector"]) == ("anneal", pytest.approx(1e-4)), "falls to zero after its last step"


@pytest.mark.slow
def test_it_is_evaluated_and_talks(trained, launcher, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "eval.py"),
        "--model",
        str(trained / "final"),
        "--out",
        str(tmp_path / "eval"),
    ]
    command += ["--benchmarks", "phantom", "--limit", "6", "--batch-size", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=launcher.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "eval" / "scores.json").read_text())["benchmarks"]["phantom"]["n"] == 6
    picture = next(launcher.hf_home.rglob("*.png"))
    command = [sys.executable, "-m", "huatuo_vision.chat", "--model", str(trained / "final"), "--image", str(picture)]
    command += ["--max-new-tokens", "4"]
    questions = f"What is shown?\n/image {picture}\nAnd here?\n/clear\nNothing to see?\n"
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=launcher.environment(), input=questions
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= 3


@pytest.mark.slow
def test_two_sharded_processes_learn_what_one_learns(trained, launcher, tmp_path):
    environment = launcher.environment()
    del environment["ACCELERATE_USE_CPU"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/fsdp2.yaml"]
    command += ["--num_processes", "2", "--main_process_port", "0", "-m", "tests.training.fsdp2_on_cpu"]
    done = subprocess.run(
        [*command, "--recipe", str(RECIPE), "--out", str(tmp_path / "fsdp")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "fsdp" / "run.json").read_text())["hardware"]["world_size"] == 2
    assert largest_difference(trained / "final", tmp_path / "fsdp" / "final") < 5e-5
