"""Training speed and memory: train.py beside the trainers that a user would take instead.

    python -m benchmarks.training_speed

ours      train.py itself: packed rows, attention per sample, logits where there is a label
padded    transformers' Trainer with a collator that pads the batch, as LLaVA's does
grouped   the same on batches of samples of like length, as LLaVA orders them (see below)
trl       TRL's SFTTrainer with its own collator for vision-language models

All train the same LLaVA (encoder 192 wide, 6 layers, 64 image tokens; language model 256 wide, 6 layers, vocabulary of
8,192) from the same weights with the same samples in every optimizer step, in fp32, the encoder frozen, with AdamW and
clipping at 1.0, pictures decoded in line; the losses of all steps must be equal to 1e-4. The sides take turns. Each is
a process of its own that logs every step; whenever a line appears, its CPU time is read from outside
(/proc/PID/stat), and its peak memory (VmHWM) all along, less that of a process that only imports the same modules.

Batches of like length: a mega-batch of 50 batches is sorted by length, as transformers' `group_by_length` does. The
samples of some of these batches, mixed at random, are what the other sides see. (LLaVA's own sampler sorts what one
optimizer step holds over all ranks; on one process that removes no padding.) Ours trains the grouped batches once, to
compare the losses.

Rows of your own: --rows FILE, a JSON list of objects with `id`, `images` (names beside the file) and `messages`
(role, content; <image> where a picture stands).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.samples import KINDS, make_samples
from huatuo_vision.cli import run_command

REPOSITORY = Path(__file__).resolve().parents[1]
REQUIREMENTS = REPOSITORY / "benchmarks" / "requirements-peers.txt"
SIDES = ("ours", "padded", "grouped", "trl")
BATCH = 8
MEGA_BATCH = 50  # batches that are sorted by length together
LEARNING_RATE = 2e-4
TOLERANCE = 1e-4  # of every step's loss
# (kind, side) -> how many times its tokens per CPU second ours must reach, and should.
BARS = {
    ("single", "padded"): (1.5, 1.65),
    ("single", "grouped"): (1.1, 1.3),
    ("single", "trl"): (2.5, 2.7),
    ("mixture", "padded"): (2.0, 2.2),
    ("mixture", "trl"): (3.0, 3.5),
}
MEMORY_BAR = 0.65  # of TRL's peak above its imports, single-image rows

MODEL = {
    "vision_encoder": {
        "config": {
            "model_type": "clip_vision_model",
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": 112,
            "patch_size": 14,
        }
    },
    "language_model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "vocab_size": 8192,
        },
        "tokenizer": {"vocab_size": 8192},
    },
    "chat_template": "huatuo",
}


@dataclass(frozen=True)
class Workload:
    """One set of samples, and the batches that every side trains."""

    kind: str
    model: Path
    images: Path  # the folder that image names are relative to
    rows: list[dict[str, Any]]
    random: list[list[int]]  # rows of each optimizer step
    grouped: list[list[int]]
    tokens: np.ndarray  # (rows,) image features included
    targets: np.ndarray  # (rows,) supervised tokens

    def padding(self, batches: list[list[int]]) -> float:
        """Share of a padded batch's places that hold no token."""
        places = sum(len(batch) * self.tokens[batch].max() for batch in batches)
        return 1 - sum(self.tokens[batch].sum() for batch in batches) / places


@dataclass
class Measured:
    """One side's turns."""

    losses: list[float] = field(default_factory=list)  # of the steps, equal in every turn
    tokens_per_cpu_second: list[float] = field(default_factory=list)
    targets_per_cpu_second: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)  # above the imports


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="made-up samples (default: all)")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="samples of your own in place of made-up ones")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="default: all")
    parser.add_argument("--alternations", type=int, default=5, metavar="N", help="turns of each side (default: 5)")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="optimizer steps a turn (default: 16)")
    parser.add_argument("--warm-up", type=int, default=4, metavar="N", help="steps that do not count (default: 4)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch, for every side (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and the weights")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/training_speed"), help="default: %(default)s")
    parser.add_argument("--require", action="store_true", help="exit with 1 where a bar is missed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    sides = [side for side in SIDES if side in args.sides or side == "ours"]
    # Without TRL all sides can share the running environment.
    python = peers_python() if "trl" in sides else Path(sys.executable)
    results = {}
    for kind in ["own"] if args.rows else args.kinds:
        folder = args.out.resolve() / kind
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path = args.rows or make_samples(folder / "samples", kind, MEGA_BATCH * BATCH, args.seed)
        workload = build_workload(kind, path, folder, steps=args.steps, seed=args.seed)
        results[kind] = compare(workload, folder, sides, python, args)
    record = _record(args, results, python)
    (args.out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    missed = report(results, record, args.out)
    return int(bool(missed) and args.require)


def peers_python() -> Path:
    """The interpreter of the peers' environment, made on first use: `.venv-peers/`, in HUATUO_ENVS where set."""
    environment = Path(os.environ.get("HUATUO_ENVS", REPOSITORY)) / ".venv-peers"
    python, complete = environment / "bin" / "python", environment / ".complete"
    wanted = REQUIREMENTS.read_text()
    if not complete.exists() or complete.read_text() != wanted:
        print(f"installing {REQUIREMENTS.relative_to(REPOSITORY)} into {environment}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
        # First and alone, so that no other package chooses its build.
        for packages in ([torch], ["-r", REQUIREMENTS]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        complete.write_text(wanted)
    return python


# ---- what is trained ----


def build_workload(kind: str, path: Path, folder: Path, *, steps: int, seed: int) -> Workload:
    """Compose the model into `folder`/model and choose the batches from the rows in `path`."""
    from huatuo_vision.inputs.encode import Encoder
    from huatuo_vision.inputs.sources import open_source
    from huatuo_vision.model.compose import compose_processor, compose_weights
    from huatuo_vision.recipe import ModelSpec, SourceSpec
    from huatuo_vision.schema import UserError

    source = open_source("rows", SourceSpec(adapter="messages", path=str(path)), folder / "cache")
    spec = ModelSpec.model_validate(MODEL)
    compose_processor(spec, folder / "model", texts=source.texts())
    compose_weights(spec, folder / "model", seed)
    encoder = Encoder(folder / "model")
    encoded = [encoder.encode(source.sample(index)) for index in range(len(source))]
    tokens = np.array([len(e.input_ids) for e in encoded])
    rows = json.loads(path.read_text())
    if steps * BATCH > len(rows):
        raise UserError(f"{path} holds {len(rows)} rows; {steps} steps of {BATCH} need {steps * BATCH}: lower --steps")

    rng = np.random.default_rng(seed)
    by_length = rng.permutation(len(rows))[: len(rows) // BATCH * BATCH]
    by_length = by_length[np.argsort(-tokens[by_length], kind="stable")].reshape(-1, BATCH)
    # Batches at even distances: the samples of `steps` of them are spread over all lengths as those of all are.
    grouped = by_length[np.linspace(0, len(by_length) - 1, steps).round().astype(int)]
    random = rng.permutation(grouped.ravel()).reshape(steps, BATCH)
    return Workload(
        kind=kind,
        model=folder / "model",
        images=path.resolve().parent,
        rows=rows,
        random=random.tolist(),
        grouped=rng.permutation(grouped).tolist(),
        tokens=tokens,
        targets=np.array([e.targets for e in encoded]),
    )


def write_rows(workload: Workload, batches: list[list[int]], path: Path, side: str) -> None:
    """The batches' rows in the order in which a side takes them: ours shuffles by its plan, so its file is laid out
    the other way round."""
    from huatuo_vision.inputs.plan import plan_steps

    rows: list[dict[str, Any]] = [workload.rows[index] for batch in batches for index in batch]
    if side == "ours":
        ones = np.ones(len(rows), dtype=np.int64)
        limits = {"max_row_tokens": len(rows), "max_row_images": len(rows), "world_size": 1, "epochs": 1, "seed": 0}
        plan = plan_steps(ones, ones, ones, ones, global_batch_size=BATCH, **limits)
        shuffled: list[dict[str, Any]] = [{}] * len(rows)
        for place, row in zip(plan.order.tolist(), rows, strict=True):
            shuffled[place] = row
        rows = shuffled
    path.write_text(json.dumps(rows))


def command(side: str, workload: Workload, batches: list[list[int]], folder: Path, python: Path) -> list[str]:
    """How a side is started; makes its files in `folder`."""
    rows = folder / "rows.json"
    write_rows(workload, batches, rows, side)
    if side != "ours":
        peer = "trl" if side == "trl" else "padded"
        settings = ["--model", str(workload.model), "--images", str(workload.images)]
        settings += ["--batch-size", str(BATCH), "--lr", str(LEARNING_RATE), "--log", str(folder / "log.jsonl")]
        script = str(REPOSITORY / "benchmarks" / "peers.py")
        return [str(python), script, peer, "--rows", str(rows), *settings]
    learning = {"lr": LEARNING_RATE}
    recipe = {
        "name": "speed",
        "model": {"llava": {"path": str(workload.model)}, "chat_template": MODEL["chat_template"]},
        "data": {"rows": {"adapter": "messages", "path": str(rows), "image_root": str(workload.images)}},
        "phases": {
            "instruct": {
                "data": [{"source": "rows"}],
                "train": {"vision_encoder": False, "projector": learning, "language_model": learning},
                "global_batch_size": BATCH,
                "max_row_images": 64,
                "schedule": {"name": "constant", "warmup_ratio": 0.0},
                "precision": "fp32",
                "log_every": 1,
            }
        },
        "workers": 0,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    train = [sys.executable, str(REPOSITORY / "train.py"), "--recipe", str(folder / "recipe.yaml")]
    return [*train, "--out", str(folder)]


def imports_command(side: str, python: Path) -> list[str]:
    """A process that imports what a side's training does, and then says its peak memory."""
    if side == "ours":
        models = "transformers.models.clip.modeling_clip, transformers.models.llama.modeling_llama"
        return [sys.executable, "-c", f"import huatuo_vision.training.run, {models}"]
    script = str(REPOSITORY / "benchmarks" / "peers.py")
    return [str(python), script, "trl" if side == "trl" else "padded", "--imports-only"]


# ---- measuring ----


def compare(
    workload: Workload, folder: Path, sides: Sequence[str], python: Path, args: argparse.Namespace
) -> dict[str, Any]:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(REPOSITORY),
    }
    measured = {side: Measured() for side in sides}
    imports = {side: watch(imports_command(side, python), None, environment)[1] for side in sides}
    for turn in range(args.alternations):
        # Each side goes first in every other turn.
        for side in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            batches = workload.grouped if side == "grouped" else workload.random
            losses, seconds, peak = train_once(side, workload, batches, folder / side, python, environment)
            result = measured[side]
            result.losses = result.losses or losses
            loss_differences({side: losses}, {side: result.losses})  # every turn is the same training
            counted = [index for batch in batches[args.warm_up :] for index in batch]
            cpu = seconds[-1] - seconds[args.warm_up - 1]
            result.tokens_per_cpu_second.append(float(workload.tokens[counted].sum() / cpu))
            result.targets_per_cpu_second.append(float(workload.targets[counted].sum() / cpu))
            result.peak_mib.append((peak - imports[side]) / 1024)
            print(
                f"{workload.kind} turn {turn + 1} {side}: {result.tokens_per_cpu_second[-1]:.0f} tokens/CPU s, ", end=""
            )
            print(f"{result.peak_mib[-1]:.0f} MiB", flush=True)
    reference = {side: measured["ours"].losses for side in sides}
    if "grouped" in sides:
        reference["grouped"], _, _ = train_once(
            "ours", workload, workload.grouped, folder / "ours-grouped", python, environment
        )
    losses = {side: result.losses for side, result in measured.items()}
    return {
        "rows": args.steps * BATCH,
        "padding": {"random": workload.padding(workload.random), "grouped": workload.padding(workload.grouped)},
        "imports_mib": {side: peak / 1024 for side, peak in imports.items()},
        "loss_difference": loss_differences(losses, reference),
        "sides": {side: asdict(result) for side, result in measured.items()},
    }


def loss_differences(losses: dict[str, list[float]], reference: dict[str, list[float]]) -> dict[str, float]:
    """The largest of a side's steps. Raises AssertionError where it is above the tolerance."""
    found = {side: float(np.abs(np.subtract(values, reference[side])).max()) for side, values in losses.items()}
    for side, difference in found.items():
        assert difference <= TOLERANCE, f"{side}: a step's loss differs from ours by {difference:.1e}"
    return found


def train_once(
    side: str, workload: Workload, batches: list[list[int]], folder: Path, python: Path, environment: dict[str, str]
) -> tuple[list[float], list[float], int]:
    """Loss and CPU seconds (since the start of the process) of every step, and the peak memory in KiB."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log.jsonl"
    seconds, peak = watch(command(side, workload, batches, folder, python), log, environment)
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert len(losses) == len(seconds) == len(batches), f"{side} logged {len(losses)} of {len(batches)} steps"
    return losses, seconds, peak


def watch(command: list[str], log: Path | None, environment: dict[str, str]) -> tuple[list[float], int]:
    """Run a command; its CPU seconds when each line of the log appeared, and its peak memory in KiB.

    The kernel's own maximum at the end (ru_maxrss) is no use: a child begins with that of the process it comes from.
    """
    seconds: list[float] = []
    peak = 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY)
        stat, status = Path(f"/proc/{process.pid}/stat"), Path(f"/proc/{process.pid}/status")
        while True:
            if log is not None and log.exists():
                lines = log.read_bytes().count(b"\n")
                seconds += [_cpu_seconds(stat)] * (lines - len(seconds))
            peak = max(peak, _peak_kib(status))
            if process.poll() is not None:
                break
            time.sleep(0.004)
        if process.returncode != 0:
            said.seek(0)
            raise SystemExit(f"failed: {' '.join(command)}\n{said.read()[-4000:]}")
    return seconds, peak


def _cpu_seconds(stat: Path) -> float:
    fields = stat.read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system, all threads


def _peak_kib(status: Path) -> int:
    # A process that has ended has no memory, and no such line.
    return next((int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")), 0)


# ---- the report ----


def ratios(result: dict[str, Any], side: str, key: str) -> list[float]:
    """Ours over a side, turn by turn."""
    ours, theirs = result["sides"]["ours"][key], result["sides"][side][key]
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def report(results: dict[str, Any], record: dict[str, Any], out: Path) -> list[str]:
    """Print the tables (in Markdown) and draw the plot; the bars that were missed, in words."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, missed = Console(width=150, highlight=False), []
    for kind, result in results.items():
        padding, turns = result["padding"], len(result["sides"]["ours"]["peak_mib"])
        console.print(
            f"\n{kind}: {result['rows']} rows a turn, {turns} turns, {record['threads']} thread(s); padding is "
            f"{padding['random']:.1%} of random batches of {BATCH}, {padding['grouped']:.1%} of grouped ones\n"
        )
        table = Table(box=box.MARKDOWN)
        columns = (
            "tokens per CPU s",
            "supervised",
            "ours is faster",
            "bar, goal",
            "peak MiB",
            "ours takes",
            "loss off by",
        )
        for column in ("", *columns):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for side, found in result["sides"].items():
            theirs = {key: ratios(result, side, key) for key in ("tokens_per_cpu_second", "peak_mib")}
            speed, memory = (statistics.median(values) for values in theirs.values())
            bar = BARS.get((kind, side))
            if bar and speed < bar[0]:
                missed.append(f"{kind}: {speed:.2f} times as fast as {side}, the bar is {bar[0]}")
            if (kind, side) == ("single", "trl") and memory > MEMORY_BAR:
                missed.append(f"{kind}: {memory:.2f} of TRL's memory, the bar is {MEMORY_BAR}")
            compared = (
                _spread(theirs["tokens_per_cpu_second"], ".2f"),
                f"{bar[0]}, {bar[1]}" if bar else "",
                _spread(found["peak_mib"], ",.0f"),
                f"{memory:.2f}",
                f"{result['loss_difference'][side]:.0e}",
            )
            table.add_row(
                side,
                _spread(found["tokens_per_cpu_second"], ",.0f"),
                f"{statistics.median(found['targets_per_cpu_second']):,.0f}",
                *(compared if side != "ours" else ("", "", compared[2], "", "")),
            )
        console.print(table)
    for sentence in missed:
        console.print(f"[red]missed[/red] {sentence}")
    plot(results, record, out / "training_speed.png")
    console.print(f"figures  {out / 'results.json'}\nplot     {out / 'training_speed.png'}")
    return missed


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def plot(results: dict[str, Any], record: dict[str, Any], target: Path) -> None:
    """A dot a turn, a bar at the median; speed above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = (("tokens_per_cpu_second", "tokens per CPU second"), ("peak_mib", "peak memory above imports, MiB"))
    figure, axes = pyplot.subplots(
        len(rows), len(results), figsize=(1.2 + 4 * len(results), 4.6), squeeze=False, layout="constrained"
    )
    for column, (kind, result) in enumerate(results.items()):
        names = list(result["sides"])
        for axis, (key, label) in zip(axes[:, column], rows, strict=True):
            for place, side in enumerate(reversed(names)):
                values = result["sides"][side][key]
                colour = "tab:blue" if side == "ours" else "0.6"
                axis.barh(place, statistics.median(values), height=0.6, color=colour, alpha=0.6)
                axis.plot(values, [place] * len(values), "o", color="black", markersize=3)
            axis.set_yticks(range(len(names)), reversed(names))
            axis.set_xlim(left=0)
            axis.set_xlabel(label)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_title(
            {"single": "one picture a row", "mixture": "PubMedVision-like mixture"}.get(kind, kind)
        )
    threads = f"{record['threads']} thread" + "s" * (record["threads"] > 1)
    figure.suptitle(f"a small LLaVA on a CPU, {threads}, batches of {BATCH}, equal losses; dots are turns", fontsize=9)
    figure.savefig(target, dpi=140)
    pyplot.close(figure)


def _record(args: argparse.Namespace, results: dict[str, Any], python: Path) -> dict[str, Any]:
    from huatuo_vision.run_record import environment

    script = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    peers = json.loads(subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout)
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "threads": args.threads,
        "seed": args.seed,
        "steps": args.steps,
        "warm_up": args.warm_up,
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        **environment(),
        "peers": {name: peers.get(name) for name in ("torch", "transformers", "accelerate", "trl")},
        "results": results,
    }


if __name__ == "__main__":
    run_command(main)
