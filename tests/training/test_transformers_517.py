"""The oldest supported transformers trains the same weights, and passes the tests of what differs between versions."""

import os
import subprocess

import pytest

from tests.environments import python_with
from tests.training.conftest import ROOT, Launcher, largest_difference

# 5.17 asks for huggingface_hub < 2.
PACKAGES = ("transformers==5.17.0", "huggingface_hub==1.33.0")
SENSITIVE = (
    "tests/model/test_packing.py",
    "tests/model/test_lora.py",
    "tests/model/test_folder.py",
    "tests/model/test_multi_encoder.py",
    "tests/inputs/test_encode.py",
)


@pytest.fixture(scope="session")
def old_python():
    python = python_with("5.17", PACKAGES)
    printed = subprocess.run(
        [python, "-c", "import transformers; print(transformers.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.strip() == "5.17.0"
    return python


@pytest.mark.slow
def test_both_phases_learn_the_same(launcher: Launcher, finished, old_python, tmp_path):
    out = tmp_path / "old"
    command = [str(old_python), *launcher.command(out)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=launcher.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"transformers": "5.17.0"' in (out / "run.json").read_text()
    assert largest_difference(finished / "final", out / "final") < 1e-5


@pytest.mark.slow
def test_the_sensitive_tests_pass(old_python):
    done = subprocess.run(
        [old_python, "-m", "pytest", "-m", "not slow", *SENSITIVE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
