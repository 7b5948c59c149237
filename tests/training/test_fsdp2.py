"""The shipped FSDP2 configuration shards over two processes, learns the same, resumes, and writes the model whole."""

import json
import subprocess
import sys
import time

import pytest

from huatuo_vision.training.export import export_checkpoint
from tests.training.conftest import ROOT, TINY, kill_all, largest_difference
from tests.training.test_variants import both_phases


def start(launcher, out, *settings: str) -> subprocess.Popen:
    environment = launcher.environment()
    del environment["ACCELERATE_USE_CPU"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/fsdp2.yaml"]
    command += ["--num_processes", "2", "--main_process_port", "0", "-m", "tests.training.fsdp2_on_cpu"]
    return subprocess.Popen(
        [*command, "--recipe", str(TINY), "--out", str(out), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


@pytest.mark.slow
def test_two_sharded_processes_learn_what_one_learns_also_resumed(launcher, finished, tmp_path):
    out = tmp_path / "fsdp"
    process = start(launcher, out)
    deadline = time.monotonic() + 300
    while not (out / "instruct/checkpoint-5/manifest.json").exists():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_all(process)
    files = json.loads((out / "instruct/checkpoint-5/manifest.json").read_text())["files"]
    assert any(name.startswith("pytorch_model_fsdp_0/") for name in files), "FSDP wrote no sharded weights"
    one = tmp_path / "one"
    launcher.run_and_kill(one, lambda: (one / "instruct/checkpoint-5/manifest.json").exists())
    for run in (out, one):
        export_checkpoint(run / "instruct/checkpoint-5", tmp_path / f"{run.name}-5")
    assert largest_difference(tmp_path / "fsdp-5", tmp_path / "one-5") < 2e-5
    assert largest_difference(tmp_path / "fsdp-5", out / "align/model") > 1e-4

    process = start(launcher, out)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert "resuming instruct from" in output
    assert json.loads((out / "run.json").read_text())["hardware"]["world_size"] == 2
    assert largest_difference(finished / "final", out / "final") < 2e-5


@pytest.mark.slow
def test_compiled_layers_shard_too(launcher, finished, tmp_path):
    process = start(launcher, tmp_path / "fsdp", *both_phases("compile=true"), *both_phases("recompute=2"))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    assert largest_difference(finished / "final", tmp_path / "fsdp/final") < 5e-5
