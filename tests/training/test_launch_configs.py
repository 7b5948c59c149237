"""The launch configurations: all are what accelerate takes, and those that a CPU can launch start what they say."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin

from huatuo_vision.launch import start_processes
from tests.training.conftest import ROOT

CONFIGS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_it(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.num_machines == 1 and config.num_processes in (1, 2, 8)
    values = yaml.safe_load(path.read_text())
    if (deepspeed := values.get("deepspeed_config")) is not None:
        plugin = DeepSpeedPlugin(zero_stage=deepspeed["zero_stage"])
        assert plugin.deepspeed_config["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero"))
        assert deepspeed["zero3_init_flag"] == (path.stem == "zero3")
    assert config.mixed_precision == "no", "the recipe's precision decides"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes", "expected"),
    [("single", None, [1, "NO"]), ("cpu", None, [2, "MULTI_CPU"]), ("ddp", 2, [2, "MULTI_CPU"])],
)
def test_it_starts_what_it_says(name, processes, expected):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/{name}.yaml"]
    command += ["--num_processes", str(processes), "--main_process_port", "0"] if processes else []
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.training.test_launch_configs"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line) for line in done.stdout.split("\n") if line] == [expected] * expected[0]


if __name__ == "__main__":
    state = start_processes()
    sys.stdout.write(json.dumps([state.num_processes, state.distributed_type.value]) + "\n")
