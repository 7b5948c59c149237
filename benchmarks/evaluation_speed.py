"""Rows per second of eval.py's generation beside a loop that asks one row at a time, as official scripts do.

    python -m benchmarks.evaluation_speed

The model has the shape of the phantom recipe's and random weights; every answer is made exactly 32 tokens long. Both
sides ask the same loaded model the same questions about the same pictures, greedily, and must give equal answers, row
by row. Decoding pictures, tokenising and writing answers count. The sides take turns, so that whatever else the
machine does meets both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
NEW_TOKENS = 32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--rows", type=int, default=128, metavar="N", help="questions of the phantom set (default: 128)"
    )
    parser.add_argument("--alternations", type=int, default=3, metavar="N", help="turns of each side (default: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows at once (default: 32)")
    parser.add_argument(
        "--require-ratio", type=float, default=0.0, metavar="R", help="exit with 1 where the median ratio is below it"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    # Read when torch is imported.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import torch

    from huatuo_vision.evaluation import generate
    from huatuo_vision.evaluation.benchmarks import BENCHMARKS
    from huatuo_vision.evaluation.protocols import PROTOCOLS
    from huatuo_vision.evaluation.responses import read_responses
    from huatuo_vision.evaluation.rows import Row
    from huatuo_vision.inputs.images import load_image
    from huatuo_vision.model.compose import compose_processor, compose_weights
    from huatuo_vision.recipe import load_recipe

    torch.set_num_threads(args.threads)
    protocol = PROTOCOLS["default"]
    rows = BENCHMARKS["phantom"].load(None).rows[: args.rows]

    def ours(asked: generate.Asked, rows: Sequence[Row], folder: Path) -> dict[str, str]:
        path = folder / f"responses.{time.monotonic_ns()}.jsonl"
        share = generate.share_of(rows, protocol, _Alone, blind=False)
        generate.answer_rows(asked, share, path, batch_size=args.batch_size, hidden=True)
        return {answer["id"]: answer["response"] for answer in read_responses(path)}

    @torch.inference_mode()
    def one_by_one(asked: generate.Asked, rows: Sequence[Row], folder: Path) -> dict[str, str]:
        return {row.id: _ask_one(asked, row) for row in rows}

    def _ask_one(asked: generate.Asked, row: Row) -> str:
        inputs = asked.processor(
            images=[load_image(ref, row.id).image for ref in row.images],
            text=generate.render_prompt(asked.processor, protocol, row, blind=False),
            add_special_tokens=False,
            return_tensors="pt",
        )
        tokens = asked.model.generate(**inputs)
        return asked.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = load_recipe(REPOSITORY / "recipes" / "phantom.yaml").model
        compose_processor(spec, folder / "model", texts=(protocol.render(row) for row in rows))
        compose_weights(spec, folder / "model", seed=0)
        asked = generate.load(folder / "model", protocol, torch.device("cpu"), blind=False)
        config = asked.model.generation_config
        config.min_new_tokens = config.max_new_tokens = NEW_TOKENS
        ratio = report({"eval.py": ours, "one by one": one_by_one}, asked, rows, folder, args)
    return int(ratio < args.require_ratio)


class _Alone:
    """The world of a single process, without starting one."""

    process_index, num_processes = 0, 1


def report(
    sides: dict[str, Callable[..., dict[str, str]]],
    asked: object,
    rows: Sequence[object],
    folder: Path,
    args: argparse.Namespace,
) -> float:
    """Measure both sides and show the table; the median ratio. Raises AssertionError where an answer differs."""
    from rich.console import Console
    from rich.table import Table

    speeds: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, dict[str, str]] = {}
    for side in sides.values():
        side(asked, rows[:8], folder)  # what is done once in a process is done before the clock runs
    for turn in range(args.alternations):
        # Each side goes first in every other turn.
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            begin = time.perf_counter()
            found = sides[name](asked, rows, folder)
            speeds[name].append(len(rows) / (time.perf_counter() - begin))
            assert answers.setdefault(name, found) == found, f"{name} gave other answers in turn {turn + 1}"
    ours, loop = (answers[name] for name in sides)
    different = [row for row in loop if ours[row] != loop[row]]
    assert not different, f"{len(different)} of {len(rows)} rows got different answers, first {different[0]}"

    table = Table(title=f"{len(rows)} rows, {NEW_TOKENS} new tokens each, {args.threads} threads")
    for column in ("rows per second", *(f"turn {turn + 1}" for turn in range(args.alternations)), "median"):
        table.add_column(column, justify="right" if column != "rows per second" else "left")
    for name, found in speeds.items():
        table.add_row(name, *(f"{speed:.1f}" for speed in found), f"{statistics.median(found):.1f}")
    ratios = [ours / loop for ours, loop in zip(*speeds.values(), strict=True)]
    table.add_row("ratio", *(f"{ratio:.2f}" for ratio in ratios), f"{statistics.median(ratios):.2f}", style="bold")
    console = Console()
    console.print(table)
    ratio = statistics.median(ratios)
    required = f", required {args.require_ratio:g}" if args.require_ratio else ""
    said = f"all {len(rows)} answers are equal; eval.py is {ratio:.1f} times as fast{required} ({_range(ratios)})"
    console.print(said, highlight=False)
    return ratio


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
