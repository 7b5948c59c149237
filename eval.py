"""Score a model: generate answers, grade them, report. Or grade answers that are there, or compare two results.

    accelerate launch eval.py --model runs/phantom/final --benchmarks phantom --out results/phantom
    python eval.py --responses answers.jsonl --protocol default --out results/theirs
    python eval.py --compare results/a results/b
    python eval.py --self-test

Killed at any time and started again with the same command, it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from huatuo_vision.cli import run_command
from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from huatuo_vision.evaluation.protocols import Protocol
    from huatuo_vision.evaluation.run import Extras, Question


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--model", metavar="DIR_OR_ID", help="a model folder, a Hub id, or an endpoint's model name")
    task.add_argument("--responses", type=Path, metavar="FILE", help="grade these answers; loads no model")
    task.add_argument("--compare", type=Path, nargs=2, metavar="DIR", help="set two results side by side")
    task.add_argument(
        "--self-test",
        action="store_true",
        help="prove every rule that reads replies, on the rows of --benchmarks or on rows made for it",
    )

    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for answers, scores and report")
    parser.add_argument(
        "--protocol",
        default="default",
        metavar="NAME",
        help="default, huatuo-2024, mmmu-official, llava-med, open or explain",
    )

    asking = parser.add_argument_group("asking a model (--model)")
    asking.add_argument(
        "--benchmarks",
        nargs="+",
        metavar="NAME[=PATH]",
        help="PATH: local data instead of the Hub's; `--benchmarks help` lists them",
    )
    asking.add_argument("--blind", action="store_true", help="ask without the images, all else equal")
    asking.add_argument("--limit", type=positive, metavar="N", help="the first N rows of each benchmark only")
    asking.add_argument(
        "--no-controls",
        action="store_true",
        help="leave out the controls of clinical cases: text only, and options only",
    )
    asking.add_argument("--rotate-options", action="store_true", help="ask with the options in every cyclic order too")
    asking.add_argument(
        "--scoring",
        choices=("generate", "likelihood"),
        default="generate",
        help="likelihood: of each option, no text is generated",
    )
    asking.add_argument("--batch-size", type=positive, default=32, metavar="N", help="rows at once (default: 32)")
    asking.add_argument(
        "--backend",
        choices=("transformers", "openai"),
        default="transformers",
        help="openai: any OpenAI-compatible endpoint",
    )
    asking.add_argument(
        "--base-url",
        default=os.environ.get("OPENAI_BASE_URL"),
        metavar="URL",
        help="of the endpoint (default: OPENAI_BASE_URL)",
    )

    judging = parser.add_argument_group("second opinions (never change a score)")
    judging.add_argument("--judge", metavar="MODEL", help="name of a judge model")
    judging.add_argument(
        "--judge-url",
        default=os.environ.get("OPENAI_BASE_URL"),
        metavar="URL",
        help="its endpoint (default: OPENAI_BASE_URL)",
    )
    judging.add_argument(
        "--judge-cache",
        type=Path,
        metavar="FILE",
        help="keep what it says there, for the evaluations of several models (default: in --out)",
    )
    judging.add_argument(
        "--judge-repeats", type=positive, default=1, metavar="N", help="mark each explanation so often (default: 1)"
    )
    judging.add_argument("--human-sheet", type=Path, metavar="CSV", help="people's marks, to set beside the judge's")
    judging.add_argument("--concepts", type=Path, metavar="FILE", help="terms to count in explanations, one a line")
    judging.add_argument(
        "--reasoning",
        metavar="CSV|judge",
        help="say of each question whether it asks for knowledge or inference: by a sheet, or by the judge",
    )

    comparing = parser.add_argument_group("requirements on a comparison (--compare), for scripts")
    comparing.add_argument(
        "--require-accuracy",
        type=float,
        default=0.0,
        metavar="A",
        help="exit with 1 where the first is below it (0 to 1)",
    )
    comparing.add_argument(
        "--require-gain",
        type=float,
        default=-1.0,
        metavar="G",
        help="exit with 1 where the difference is below it (0 to 1)",
    )
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}; expected 1 or more")
    return number


def main() -> int:
    args = parse_arguments()
    console = Console()

    # After the arguments, so that --help and a mistyped flag answer at once.
    from huatuo_vision.evaluation import compare, report, run
    from huatuo_vision.evaluation.benchmarks import chosen_benchmarks

    if args.self_test:
        return 0 if run.prove_rules(chosen_benchmarks(args.benchmarks or []), console) else 1

    if args.compare:
        comparison = run.compare_folders(*args.compare, args.out, console)
        missed = compare.shortfall(comparison, args.require_accuracy, args.require_gain)
        if missed:
            console.print(missed, style="bold red", highlight=False, soft_wrap=True)
        return 1 if missed else 0

    protocol = run.protocol_named(args.protocol)
    if args.benchmarks == ["help"]:
        run.show_benchmarks(console)
        return 0
    if args.out is None:
        raise UserError("--out is missing; give the folder for answers, scores and report")
    if args.judge and not args.judge_url:
        raise UserError("--judge needs --judge-url, or OPENAI_BASE_URL in the environment")
    extras = second_opinions(args)

    rows = []
    if args.responses:
        if args.benchmarks or args.blind or args.limit or args.rotate_options:
            raise UserError("--responses grades answers that are there; leave out the flags that say how to ask")
        run.take_responses(args.responses, args.out, protocol)
    elif (rows := run.answer(question(args, protocol))) is None:
        return 0  # another process scores

    scores = run.score(args.out, protocol, rows, extras)
    if args.model:
        run.add_to_card(args.model, scores)
    report.show(scores, args.out, console)
    return 0


def second_opinions(args: argparse.Namespace) -> Extras:
    """What else to say of the answers, checked before the first is asked for. Raises UserError."""
    from huatuo_vision.evaluation import run

    for option, needed in (("--reasoning judge", args.reasoning == "judge"), ("--human-sheet", args.human_sheet)):
        if needed and not args.judge:
            raise UserError(f"{option} needs --judge: the name of the judge model")
    for option, path in (("--human-sheet", args.human_sheet), ("--concepts", args.concepts)):
        if path is not None and not path.is_file():
            raise UserError(f"{option} {path} does not exist; give the path of a file")
    return run.Extras(
        judge=args.judge,
        judge_url=args.judge_url,
        judge_cache=args.judge_cache,
        judge_repeats=args.judge_repeats,
        human_sheet=args.human_sheet,
        concepts=args.concepts,
        reasoning=args.reasoning,
    )


def question(args: argparse.Namespace, protocol: Protocol) -> Question:
    """The checked command line of an evaluation. Raises UserError for what does not fit together."""
    from huatuo_vision.evaluation import run
    from huatuo_vision.evaluation.benchmarks import chosen_benchmarks

    if not args.benchmarks:
        raise UserError("--benchmarks is missing; `eval.py --model M --benchmarks help` lists them")
    if args.backend == "openai" and not args.base_url:
        raise UserError("--backend openai needs --base-url, or OPENAI_BASE_URL in the environment")
    if args.backend == "openai" and args.scoring == "likelihood":
        raise UserError("--scoring likelihood needs --backend transformers; endpoints do not tell the likelihoods")
    return run.Question(
        model=args.model,
        benchmarks=chosen_benchmarks(args.benchmarks),
        protocol=protocol,
        out=args.out,
        blind=args.blind,
        limit=args.limit,
        backend=args.backend,
        base_url=args.base_url,
        batch_size=args.batch_size,
        rotate_options=args.rotate_options,
        scoring=args.scoring,
        controls=not args.no_controls,
    )


if __name__ == "__main__":
    run_command(main)
