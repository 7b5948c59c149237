"""`python -m data.phantom`: makes the set, or finds it made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.phantom.write import make_phantom
from huatuo_vision.schema import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.phantom",
        description="Make a demonstration data set of synthetic pictures in PubMedVision's layout (no medical data).",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument("--train", type=int, required=True, metavar="N", help="training records (0: none)")
    parser.add_argument("--test", type=int, required=True, metavar="N", help="held-out questions (0: none)")
    parser.add_argument("--seed", type=int, required=True, metavar="S", help="the same seed gives the same data")
    parser.add_argument("--size", type=int, default=64, help="pictures measure 7/8 to 3/2 of it a side (default: 64)")
    arguments = parser.parse_args(argv)

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("records", total=arguments.train + arguments.test)
            made = make_phantom(
                **vars(arguments),
                advance=lambda n_records: progress.advance(task, n_records),
            )
    except UserError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    if made:
        text = f"{arguments.out}: {arguments.train} training records and {arguments.test} test questions made."
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        # On stdout: of no interest to whoever only needs the data to be there.
        text = f"{arguments.out} already holds this data set; nothing to do."
        Console().print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
