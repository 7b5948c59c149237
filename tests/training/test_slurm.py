"""The Slurm script, with stand-ins for Slurm's commands: when its time is up, it saves and queues itself again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.conftest import ROOT, TINY
from tests.training.test_stop import aligned, logged

LONGER = "phases.instruct.epochs=24"  # so that it still trains when the stand-ins have started
# Every process of the step, launchers and data loaders too, as Slurm does.
SIGNAL_ALL = """
import signal, sys
import psutil

step = psutil.Process(int(sys.argv[1]))
for process in [step, *step.children(recursive=True)]:
    process.send_signal(signal.SIGUSR1)
"""
STAND_INS = {
    "srun": 'shift; echo $$ > "$SLURM_STATE/step"; export SLURM_NODEID=0; exec "$@"',
    "scancel": f'{sys.executable} "$SLURM_STATE/signal_all.py" "$(cat "$SLURM_STATE/step")"',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> "$SLURM_STATE/requeued"; else echo localhost; fi',
}


@pytest.fixture
def submit(launcher, tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "signal_all.py").write_text(SIGNAL_ALL)
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_STATE": str(tmp_path)}
    ours = {"PROCESSES_PER_NODE": "2", "CONFIG": "recipes/accelerate/cpu.yaml", "PATH": path}

    def start(out: Path) -> subprocess.Popen:
        return subprocess.Popen(
            ["recipes/accelerate/slurm.sh", "--recipe", str(TINY), "--out", str(out), "--set", LONGER],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=launcher.environment() | slurm | ours,
        )

    return start


@pytest.mark.slow
def test_the_script_saves_and_queues_itself_again_until_the_run_is_finished(submit, finished, tmp_path):
    out, requeued = aligned(finished, tmp_path / "run"), tmp_path / "requeued"
    job = submit(out)
    deadline = time.monotonic() + 120
    while not logged(out, "instruct", 4):
        assert job.poll() is None and time.monotonic() < deadline, job.stdout.read()[-3000:]
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode != 0 and said.count("stopped: instruct is saved at step") == 2, said[-3000:]
    assert requeued.read_text().split() == ["42"]

    again = submit(out)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and "resuming instruct from" in said, said[-3000:]
    assert requeued.read_text().split() == ["42"]
    assert (out / "final/model.safetensors").exists()
