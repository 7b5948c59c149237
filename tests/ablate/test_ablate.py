"""The command from end to end: the real train.py and eval.py on tiny rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from huatuo_vision.ablate.__main__ import main
from huatuo_vision.cli import run_command
from tests.ablate.conftest import ROOT, write_set
from tests.training.conftest import largest_difference

LAUNCH = {
    "config": str(ROOT / "recipes" / "accelerate" / "single.yaml"),
    "environment": {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    "jobs": 2,
}
SMALL = {"seeds": [0], "batch_size": 128, "launch": LAUNCH}


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "huatuo_vision.ablate", str(folder / "set.yaml"), *arguments]


def start(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        command(folder, "--out", str(folder / "runs"), *arguments),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "140", "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command in this process: its exit code and what it said."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(
            sys, "argv", ["ablate", str(folder / "set.yaml"), "--out", str(folder / "runs"), *arguments]
        )
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    return call


def test_mistakes_are_one_sentence(folder: Path, here):
    write_set(folder, base="tyni")
    code, text = here("--plan")
    assert code == 2 and "error: set" in text and "base 'tyni' is no row" in text
    write_set(folder)
    assert here("--set", "seed=3") == (2, "error: --set seed=...: the seeds stand in the set file, under seeds\n")
    assert here("--jobs", "0") == (2, "error: --jobs 0: expected 1 or more\n")


def test_a_plan_starts_nothing_and_slurm_only_writes(folder: Path, here):
    write_set(folder)
    code, text = here("--plan")
    assert code == 0 and "8 phases to train, 2 taken over" in " ".join(text.split())
    assert not (folder / "runs").exists()
    code, text = here("--slurm", str(folder / "jobs"))
    assert code == 0 and "15 scripts in" in text
    assert (folder / "jobs" / "submit.sh").stat().st_mode & 0o100
    assert not (folder / "runs").exists()


def test_help_answers_at_once():
    """Without what reads a recipe or computes an interval."""
    command = "import sys; sys.argv = ['ablate', '--help']; import runpy\n"
    command += "try: runpy.run_module('huatuo_vision.ablate', run_name='__main__')\n"
    command += "except SystemExit: print(sorted({'scipy', 'pydantic', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--slurm DIR" in done.stdout and done.stdout.endswith("[]\n")


@pytest.mark.slow
def test_killed_and_started_again_it_trains_each_phase_once_and_the_table_says_what_the_runs_say(
    folder: Path, hf_home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HOME", str(hf_home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_set(folder, **SMALL)
    runs = folder / "runs"
    process = subprocess.Popen(
        command(folder, "--out", str(runs)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (runs / "tiny-seed0/instruct/checkpoint-5").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # the parts end with it
    align = (runs / "tiny-seed0/align/model/model.safetensors").stat().st_mtime_ns

    text = start(folder)
    assert (runs / "tiny-seed0/align/model/model.safetensors").stat().st_mtime_ns == align
    shared = [runs / f"{name}-seed0/align/model" for name in ("tiny", "tiny-longer")]
    assert (shared[0] / "model.safetensors").samefile(shared[1] / "model.safetensors")
    assert largest_difference(*shared) == 0
    assert not (runs / "tiny-no-alignment-seed0/align").exists()

    out = runs / "tiny-set"
    results = json.loads((out / "results.json").read_text())
    for label, name in (("tiny", "tiny"), ("no alignment", "tiny-no-alignment"), ("longer", "tiny-longer")):
        scores = json.loads(next((runs / f"{name}-seed0/eval").glob("sighted-*/scores.json")).read_text())
        accuracy = scores["benchmarks"]["phantom"]["accuracy"]
        assert results["benchmarks"]["phantom"]["rows"][label]["accuracy"] == pytest.approx(accuracy)
        assert f"{100 * accuracy:.1f} %" in text
    steps = {run["row"]: run["phases"] for run in results["runs"]}
    assert steps["longer"]["align"]["taken_over"] and not steps["tiny"]["align"]["taken_over"]
    assert steps["longer"]["instruct"]["optimizer_steps"] == 2 * steps["tiny"]["instruct"]["optimizer_steps"]

    logs = {path.name: path.stat().st_mtime_ns for path in (out / "logs").iterdir()}
    assert "0 phases to train" in start(folder)
    assert {path.name: path.stat().st_mtime_ns for path in (out / "logs").iterdir()} == logs


@pytest.mark.slow
def test_a_part_that_fails_says_its_own_sentence(folder: Path, hf_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(hf_home))
    write_set(folder, **SMALL)
    text = start(folder, "--set", "phases.instruct.global_batch_size=100000", code=2)
    assert "ended with exit code" in text and "global_batch_size" in text
    assert "the same command again" in text
    assert "Traceback" not in text.split("ended with exit code")[1].split("Its whole output")[0]
