"""The script of kills, with few of them."""

import random
import subprocess
import sys

import pytest

from tests.training.conftest import ROOT


@pytest.mark.slow
def test_killed_runs_end_as_the_unbroken_one():
    command = [sys.executable, "-m", "benchmarks.kills", "--runs", "3", "--seed", str(random.randrange(10**6))]
    done = subprocess.run([*command, "--questions", "24"], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 runs were killed and ended as the unbroken one" in done.stdout
