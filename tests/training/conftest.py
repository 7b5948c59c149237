"""Whole runs of the tiny recipe, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "recipes" / "mini" / "tiny.yaml"


@pytest.fixture(scope="session")
def hf_home(tmp_path_factory) -> Path:
    """One cache for all runs of this test process: the phantom pictures are made once."""
    return tmp_path_factory.mktemp("hf_home")


@dataclass(frozen=True)
class Launcher:
    """Starts train.py in processes of its own."""

    hf_home: Path

    def command(self, out: Path, *arguments: str, processes: int = 1, recipe: Path = TINY) -> list[str]:
        start = [sys.executable]
        if processes > 1:
            launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
            start += [*launch, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            start += ["--main_process_port", "0"]
        return [*start, str(ROOT / "train.py"), "--recipe", str(recipe), "--out", str(out), *arguments]

    def environment(self) -> dict[str, str]:
        added = {"HF_HOME": str(self.hf_home), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return os.environ | added | offline | {"CUDA_VISIBLE_DEVICES": ""}

    def run(
        self, out: Path, *arguments: str, code: int = 0, largest_file: int | None = None, **options
    ) -> subprocess.CompletedProcess:
        command = self.command(out, *arguments, **options)
        if largest_file is not None:
            command = ["bash", "-c", f'ulimit -f {largest_file // 1024}; exec "$@"', "-", *command]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=self.environment(),
            timeout=400,
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def run_and_kill(self, out: Path, when: Callable[[], bool], *arguments: str, **options) -> None:
        """SIGKILL the whole run, launcher and all, as soon as `when()`."""
        process = subprocess.Popen(
            self.command(out, *arguments, **options),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=self.environment(),
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while not when():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        kill_all(process)


def kill_all(launched: subprocess.Popen) -> None:
    """SIGKILL a launcher and all that it started; torchrun gives each process a session of its own."""
    first = psutil.Process(launched.pid)
    for process in [first, *first.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    launched.wait()


@pytest.fixture(scope="session")
def launcher(hf_home) -> Launcher:
    return Launcher(hf_home)


@pytest.fixture(scope="session")
def finished(launcher, tmp_path_factory) -> Path:
    """The tiny recipe, trained without a break by one process."""
    out = tmp_path_factory.mktemp("finished") / "tiny"
    launcher.run(out)
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in safetensors.torch.load_file(file).items()}


def largest_difference(a: Path, b: Path) -> float:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def log_lines(out: Path, keys: Sequence[str]) -> list[tuple]:
    import json

    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [tuple(entry.get(key) for key in keys) for entry in entries]
