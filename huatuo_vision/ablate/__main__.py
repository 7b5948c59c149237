"""Train, evaluate and compare the rows of an ablation: `python -m huatuo_vision.ablate recipes/ablations/SET.yaml`.

Started again with the same command, it goes on where it was; what is finished is never run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from huatuo_vision.cli import run_command
from huatuo_vision.schema import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m huatuo_vision.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", type=Path, metavar="SET.yaml", help="the set file: rows, seeds, benchmarks, launch")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablations"), metavar="DIR", help="run folders (default: runs/ablations)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a recipe key in every row; repeatable",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="parts at the same time, in place of the set's launch.jobs"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="say what is finished and what would run; run nothing")
    instead.add_argument("--slurm", type=Path, metavar="DIR", help="write a Slurm script for each part; run nothing")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    console = Console()
    if any(override.startswith("seed=") for override in args.overrides):
        raise UserError("--set seed=...: the seeds stand in the set file, under seeds")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: expected 1 or more")

    # Imported here, so that --help and a mistyped flag answer at once.
    from huatuo_vision.ablate import parts, report, results
    from huatuo_vision.ablate.plan import make_plan, show_plan
    from huatuo_vision.ablate.set_file import load_set

    loaded = load_set(args.set)
    plan = make_plan(loaded, args.out, args.overrides)
    show_plan(plan, console)
    if args.plan:
        return
    if args.slurm is not None:
        again = [str(args.set), "--out", str(args.out)]
        again += [word for override in args.overrides for word in ("--set", override)]
        parts.write_slurm(plan, args.slurm, again, console)
        return
    parts.run_parts(plan, args.jobs or loaded.spec.launch.jobs, console)
    summary = results.summarise(plan)
    report.write_reports(plan.out, summary)
    report.show(summary, plan.out, console)


if __name__ == "__main__":
    run_command(main)
