"""SIGKILL at random moments of a small training run and its evaluation, the same command again, and what comes of it.

    python -m benchmarks.kills --runs 20 --seed 0

The tiny phantom recipe is trained and evaluated once without a break. Each further run is killed, launcher and all, at
a random moment of one of its stages (preparation, training, saving, between phases, evaluation; they take turns, and
the moment is drawn from the time that the stage took in the unbroken run), and the same command is given again.
Whatever the kill hit, all weights must equal the unbroken run's bit by bit, and all answers word by word. Exits with 1
where they do not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = REPOSITORY / "recipes" / "mini" / "tiny.yaml"
POLL_SECONDS = 0.002
PHASES = ("align", "instruct")


@dataclass(frozen=True)
class Stage:
    """begins, ends: of a run folder, whether the stage has; the files are those of DESIGN's run folder."""

    name: str
    command: str
    begins: Callable[[Path], bool]
    ends: Callable[[Path], bool]


def _trains(phase: str) -> Stage:
    return Stage(
        f"training {phase}",
        "train",
        lambda out: (out / phase / "data.json").exists(),
        lambda out: (out / phase / "model").exists(),
    )


def _saves(phase: str) -> Stage:
    def is_saving(out: Path) -> bool:
        return (out / phase / ".saving").exists()

    return Stage(f"saving in {phase}", "train", is_saving, lambda out: not is_saving(out))


STAGES = (
    Stage(
        "preparation",
        "train",
        lambda out: (out / "recipe.yaml").exists(),
        lambda out: (out / "align" / "data.json").exists(),
    ),
    _trains("align"),
    _saves("align"),
    Stage(
        "between phases",
        "train",
        lambda out: (out / "align" / "checkpoint-12").exists(),
        lambda out: (out / "instruct" / "data.json").exists(),
    ),
    _trains("instruct"),
    _saves("instruct"),
    Stage(
        "after the last step",
        "train",
        lambda out: (out / "instruct" / "checkpoint-12").exists(),
        lambda out: (out / "loss.png").exists(),
    ),
    Stage(
        "evaluation",
        "eval",
        lambda out: any((out / "eval").glob("responses*")),
        lambda out: (out / "eval" / "scores.json").exists(),
    ),
)


@dataclass(frozen=True)
class Commands:
    """As a user gives them; both go on where an earlier one stopped."""

    processes: int
    questions: int

    def __call__(self, name: str, out: Path) -> list[str]:
        launch = [sys.executable]
        if self.processes > 1:
            config = REPOSITORY / "recipes" / "accelerate" / "cpu.yaml"
            launch += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
            launch += ["--num_processes", str(self.processes)]
        if name == "train":
            return [*launch, str(REPOSITORY / "train.py"), "--recipe", str(RECIPE), "--out", str(out)]
        asked = ["--benchmarks", "phantom", "--limit", str(self.questions), "--batch-size", "4"]
        return [*launch, str(REPOSITORY / "eval.py"), "--model", str(out / "final"), *asked, "--out", str(out / "eval")]


def start(command: Sequence[str], cache: Path) -> subprocess.Popen:
    variables = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | variables | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
        start_new_session=True,
    )


def finish(command: Sequence[str], cache: Path) -> str:
    process = start(command, cache)
    said, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"failed with {process.returncode}: {' '.join(command)}\n{said[-3000:]}")
    return said


def unbroken(commands: Commands, out: Path, cache: Path) -> dict[str, float]:
    """Train and evaluate without a break; how long each stage took (a stage that comes again: the first time)."""
    began: dict[str, float] = {}
    took: dict[str, float] = {}
    for name in ("train", "eval"):
        process = start(commands(name, out), cache)
        while process.poll() is None:
            now = time.monotonic()
            for stage in STAGES:
                if stage.command != name or stage.name in took:
                    continue
                if stage.name not in began and stage.begins(out):
                    began[stage.name] = now
                elif stage.name in began and stage.ends(out):
                    took[stage.name] = now - began[stage.name]
            time.sleep(POLL_SECONDS)
        if process.returncode != 0:
            raise SystemExit(f"the unbroken run failed: {process.stdout.read()[-3000:]}")
    missed = [stage.name for stage in STAGES if stage.name not in began]
    if missed:
        raise SystemExit(f"the unbroken run passed {', '.join(missed)} unseen; start again")
    return {stage.name: took.get(stage.name, POLL_SECONDS) for stage in STAGES}


def kill_in(stage: Stage, after: float, command: Sequence[str], out: Path, cache: Path) -> bool:
    """SIGKILL the command and all that it started, `after` seconds into the stage; False where it ended before."""
    process = start(command, cache)
    while not stage.begins(out):
        if process.poll() is not None:
            return False
        time.sleep(POLL_SECONDS / 4)
    time.sleep(after)
    if process.poll() is not None:
        return False
    first = psutil.Process(process.pid)
    for each in [first, *first.children(recursive=True)]:  # torchrun gives each process a session of its own
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate()
    return True


def found(out: Path) -> str:
    """What a kill left behind, in words."""
    answers = sorted((out / "eval").glob("responses*"))
    if answers:
        return f"{sum(len(path.read_bytes().splitlines()) for path in answers)} answers"
    begun = [phase for phase in PHASES if (out / phase / "data.json").exists()]
    if not begun:
        return "base model made" if (out / "base" / "base.json").exists() else "no base model yet"
    phase = begun[-1]
    if (out / phase / "model" / "run.json").exists():
        return f"{phase} finished"
    if (out / phase / "model").exists():
        return f"{phase} exported, not recorded"
    steps = sorted(int(folder.name.removeprefix("checkpoint-")) for folder in (out / phase).glob("checkpoint-*"))
    saved = f"checkpoint {steps[-1]}" if steps else "no checkpoint"
    half = next((out / phase / ".saving").glob("checkpoint-*"), None)
    if half is None:
        return f"{phase}, {saved}"
    return f"{phase}, {saved}, {half.name.replace('-', ' ')} half written ({len(list(half.iterdir()))} files)"


def weights(out: Path) -> dict[str, str]:
    files = sorted(out.glob("*/model*/*.safetensors"))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def answers(out: Path) -> list[str]:
    """Each answer without the time that it took."""
    lines = [json.loads(line) for line in (out / "eval" / "responses.jsonl").read_text().splitlines()]
    return sorted(f"{line['id']}: {line['response']}" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="runs to kill (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (default: 0)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of each run (default: 1)")
    parser.add_argument("--questions", type=int, default=60, metavar="N", help="to evaluate (default: 60)")
    args = parser.parse_args()
    commands, moments = Commands(args.processes, args.questions), random.Random(args.seed)
    table = Table(title=f"{args.runs} runs, SIGKILL, the same command again; seed {args.seed}", title_justify="left")
    for column in ("run", "killed in", "after", "left behind", "weights", "answers"):
        table.add_column(column, justify="right" if column in ("run", "after") else "left")
    console, lost = Console(), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        took = unbroken(commands, folder / "unbroken", folder / "cache")
        wanted, expected = weights(folder / "unbroken"), answers(folder / "unbroken")
        for number in range(args.runs):
            if number % len(STAGES) == 0:
                order = moments.sample(STAGES, len(STAGES))
            stage = order[number % len(STAGES)]
            out, cache = folder / f"run-{number}", folder / "cache"
            if stage.name == "preparation":
                cache = folder / "fresh-cache"  # or everything would be prepared already
            if stage.command == "eval":
                shutil.copytree(folder / "unbroken", out, ignore=shutil.ignore_patterns("eval"))
            command = commands(stage.command, out)
            after = moments.uniform(0, took[stage.name])
            killed = kill_in(stage, after, command, out, cache)
            left = found(out) if killed else "ended before the kill"
            finish(command, cache)
            same = weights(out) == wanted
            told = answers(out) == expected if stage.command == "eval" else None
            lost += not (killed and same and told is not False)
            shown = {None: "", True: "equal", False: "[red]differ[/red]"}
            row = (str(number + 1), stage.name, f"{after * 1000:,.0f} ms", left, shown[same], shown[told])
            table.add_row(*row)
            console.print("  ".join(row), highlight=False)
            shutil.rmtree(out)
            shutil.rmtree(folder / "fresh-cache", ignore_errors=True)
    console.print(table)
    console.print(f"{args.runs - lost} of {args.runs} runs were killed and ended as the unbroken one")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
