"""How long train.py takes until it has something to say: python -m benchmarks.startup

Every command is started anew, in turn; wall and CPU seconds of the whole process. The dry run of the tiny recipe
makes and checks its data once before it is measured: what is measured is every further start.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = "recipes/mini/tiny.yaml"
MISTAKE = "phases.align.epoch=2"  # no such key: a user's mistake, which exits with 2
COMMANDS = {
    "import torch and transformers' Trainer, for comparison": ["-c", "from transformers import Trainer"],
    "train.py --help": ["train.py", "--help"],
    "train.py with a mistake in the recipe": ["train.py", "--recipe", TINY, "--set", MISTAKE],
    f"train.py --recipe {TINY} --dry-run": ["train.py", "--recipe", TINY, "--dry-run"],
    "train.py --recipe recipes/qwen3-8b-pubmedvision.yaml --dry-run, without data": [
        "train.py",
        "--recipe",
        "recipes/qwen3-8b-pubmedvision.yaml",
        "--dry-run",
    ],
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alternations", type=int, default=3, metavar="N", help="turns of each command (default: 3)")
    arguments = parser.parse_args(argv)

    from rich.console import Console
    from rich.table import Table

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as cache:
        for command in COMMANDS.values():  # data are made, and files are read from the disk, before the clock runs
            start(command, cache)
        for _ in range(arguments.alternations):
            for name, command in COMMANDS.items():
                found[name].append(start(command, cache))
    table = Table(title=f"{arguments.alternations} turns, one thread: median (min to max)", title_justify="left")
    for column in ("command", "wall s", "CPU s"):
        table.add_column(column, justify="left" if column == "command" else "right", no_wrap=column != "command")
    for name, turns in found.items():
        columns = zip(*turns, strict=True)
        table.add_row(name, *(f"{statistics.median(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in columns))
    Console(width=120).print(table)


def start(command: list[str], cache: str) -> tuple[float, float]:
    """Wall and CPU seconds of a python command that must end well, or the one mistake with its code."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": cache,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    before, began = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    wall, after = time.perf_counter() - began, os.times()
    if done.returncode != (2 if MISTAKE in command else 0):
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
