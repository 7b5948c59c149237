"""Score a model: generate answers, grade them, report.

    accelerate launch eval.py --model runs/phantom/final --benchmarks phantom --out results/phantom

Killed at any time and started again with the same command, it goes on where it was.
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

from huatuo_vision.cli import run_command
from huatuo_vision.evaluation.benchmarks import BENCHMARKS
from huatuo_vision.launch import start_processes


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}; expected 1 or more")
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a model folder or a Hub id")
    names = ", ".join(BENCHMARKS)
    parser.add_argument("--benchmarks", required=True, nargs="+", choices=BENCHMARKS, metavar="NAME", help=names)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for answers, scores and report")
    parser.add_argument("--blind", action="store_true", help="ask without the images, all else equal")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N rows of each benchmark only")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="rows at once (default: 32)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()

    # After the arguments, so that --help and a mistyped flag answer at once.
    from huatuo_vision.evaluation import generate, report, responses, scorers
    from huatuo_vision.evaluation.protocols import DEFAULT as protocol

    # At the last barrier the slowest process may be hours behind; a backend's own limit is minutes.
    world = start_processes(timeout=timedelta(days=7))
    with world.main_process_first():
        folder = generate.find_model(args.model)
        benchmarks = [BENCHMARKS[name]() for name in dict.fromkeys(args.benchmarks)]
    rows = [row for benchmark in benchmarks for row in benchmark.rows[: args.limit]]
    header = responses.Header(
        model=args.model,
        weights=generate.weights_fingerprint(folder),
        precision=str(generate.precision_on(world.device)).removeprefix("torch."),
        protocols={benchmark.name: protocol.hash_on(benchmark) for benchmark in benchmarks},
        blind=args.blind,
        limit=args.limit,
    )

    if world.is_main_process:
        responses.claim_folder(args.out, header)
        responses.drop_torn_lines(args.out)
        generate.check_images(rows)
    world.wait_for_everyone()
    finished = responses.finished(args.out)
    open_rows = [row for row in rows if (row.benchmark, row.id) not in finished]
    world.wait_for_everyone()  # nobody writes an answer before all have read which are finished

    if open_rows:
        generate.answer(open_rows, folder, protocol, world, args.out, blind=args.blind, batch_size=args.batch_size)
    world.wait_for_everyone()
    if world.is_main_process:
        answers = responses.merge(args.out, [(row.benchmark, row.id) for row in rows])
        verdicts = [scorers.judge(answer) for answer in answers]
        scores = report.summarise(header, protocol, benchmarks, answers, verdicts)
        report.write_reports(args.out, scores, verdicts)
        report.show(scores, args.out)
    world.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
