"""Push a finished data set to the Hub: python -m data.publish --out RUN --repo ORG/NAME [--public]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data.tables import RunFolder
from huatuo_vision.cli import run_command
from huatuo_vision.hub import HUB_ERRORS, explain, push_dataset
from huatuo_vision.schema import UserError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data.publish", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run folder of data.build")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME")
    parser.add_argument("--revision", default="main", help="branch to push to; made if it does not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set that the revision holds")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=True, help="the default")
    visibility.add_argument("--public", action="store_false", dest="private")
    arguments = parser.parse_args()
    run = RunFolder(arguments.out)
    run.tasks("assemble")
    try:
        url = push_dataset(
            run.out,
            arguments.repo,
            revision=arguments.revision,
            private=arguments.private,
            overwrite=arguments.overwrite,
        )
    except HUB_ERRORS as error:
        sys.stderr.write(f"error: {explain(error, arguments.repo)}\n")
        return 2 if isinstance(error, UserError) else 1
    sys.stdout.write(f"{url}\n")
    return 0


if __name__ == "__main__":
    run_command(main)
