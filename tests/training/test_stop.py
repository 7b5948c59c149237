"""A scheduler's signals: the run saves, exits with a code that asks for a restart, and goes on as if never stopped."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from huatuo_vision.cli import START_AGAIN
from huatuo_vision.training.checkpoint import latest_checkpoint
from tests.fake_hub import FakeHub
from tests.training.conftest import ROOT, largest_difference


def signalled(
    launcher, out: Path, number: signal.Signals, when, *arguments: str, environment: dict | None = None, **options
) -> tuple[int, str]:
    """Start a run and signal one of its processes as soon as `when()`; the exit code and what was said."""
    process = subprocess.Popen(
        launcher.command(out, *arguments, **options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment or launcher.environment(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(training_processes(process)[-1], number)
    said, _ = process.communicate(timeout=60)
    return process.returncode, " ".join(said.split())


def training_processes(launched: subprocess.Popen) -> list[int]:
    """The process itself, or what a launcher started."""
    started = psutil.Process(launched.pid).children()
    return sorted(p.pid for p in started if "train.py" in " ".join(p.cmdline())) or [launched.pid]


def logged(out: Path, phase: str, step: int) -> bool:
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return any(f'"phase": "{phase}", "step": {step},' in line for line in lines)


def aligned(finished: Path, out: Path) -> Path:
    """A run whose first phase is finished and whose second has not begun."""
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("final", "instruct", "log.jsonl"))
    return out


def said_step(said: str) -> int:
    return int(re.search(r"stopped: instruct is saved at step (\d+) of 12", said)[1])


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_ends_as_the_unbroken_run(launcher, finished, tmp_path, number):
    out = aligned(finished, tmp_path / "stopped")
    code, said = signalled(launcher, out, number, lambda: logged(out, "instruct", 4))
    assert code == START_AGAIN and "Traceback" not in said
    checkpoint = out / f"instruct/checkpoint-{said_step(said)}"
    assert (checkpoint / "manifest.json").exists()
    done = launcher.run(out)
    assert f"resuming instruct from {checkpoint}" in " ".join(done.stdout.split())
    assert largest_difference(finished / "final", out / "final") == 0


@pytest.mark.slow
def test_processes_agree_on_the_step_when_one_of_them_is_signalled(launcher, finished, tmp_path):
    out = aligned(finished, tmp_path / "two")
    code, said = signalled(launcher, out, signal.SIGUSR1, lambda: logged(out, "instruct", 4), processes=2)
    assert code != 0 and said.count(f"instruct is saved at step {said_step(said)} of 12") == 2
    assert f"exitcode : {START_AGAIN}" in said, "the launcher reports the processes' code"
    launcher.run(out, processes=2)
    unbroken = aligned(finished, tmp_path / "unbroken")
    launcher.run(unbroken, processes=2)
    assert largest_difference(unbroken / "final", out / "final") == 0


@pytest.mark.slow
def test_one_rank_that_dies_takes_the_run_down_within_a_minute_with_the_reason(launcher, finished, tmp_path):
    out = aligned(finished, tmp_path / "dead")
    killed = time.monotonic()
    code, said = signalled(launcher, out, signal.SIGKILL, lambda: logged(out, "instruct", 4), processes=2)
    assert code != 0 and time.monotonic() - killed < 60 + 60
    assert "Signal 9 (SIGKILL)" in said and "rank : 1" in said


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end(launcher, finished, tmp_path):
    out = aligned(finished, tmp_path / "orphans")
    launched = subprocess.Popen(
        launcher.command(out, "--set", "phases.instruct.epochs=20", processes=2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=launcher.environment(),
    )
    while not logged(out, "instruct", 4):
        assert launched.poll() is None
        time.sleep(0.01)
    processes = [psutil.Process(pid) for pid in training_processes(launched)]
    launched.kill()
    launched.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert len(processes) == 2 and not alive
    checkpoint, refused = latest_checkpoint(out / "instruct")
    assert checkpoint is not None and not refused and not (out / "instruct/model").exists()


def test_before_training_a_signal_stops_at_once(launcher, tmp_path):
    out = tmp_path / "early"
    code, said = signalled(launcher, out, signal.SIGTERM, lambda: (out / "recipe.yaml").exists())
    assert code == START_AGAIN and "stopped by SIGTERM" in said and "Traceback" not in said
    assert not (out / "align/model").exists()


@pytest.mark.slow
def test_a_signal_during_a_push_asks_for_a_restart_that_pushes(launcher, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "pushed")
    to_hub = [f"hub.{key}" for key in ("repo_id=org/tiny", "push=final", "license=apache-2.0")]
    arguments = [word for setting in to_hub for word in ("--set", setting)]
    with FakeHub() as hub:
        environment = launcher.environment() | hub.environment(tmp_path)
        environment |= {"HF_HOME": str(launcher.hf_home), "HF_HUB_OFFLINE": "0"}
        hub.stall_next(20, path="/commit/")
        pushing = lambda: hub.failures[0].times == 0  # noqa: E731
        code, said = signalled(launcher, out, signal.SIGUSR1, pushing, *arguments, environment=environment)
        assert code == START_AGAIN and "stopped by SIGUSR1; the same command goes on" in said
        assert "model.safetensors" not in hub.files("org/tiny")
        again = subprocess.run(launcher.command(out, *arguments), env=environment, cwd=ROOT, check=False)
        assert again.returncode == 0 and "model.safetensors" in hub.files("org/tiny")
