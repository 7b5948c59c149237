"""A process that runs the stage reformat on every rank, to be killed: python -m tests.data.reformat_worker RUN URL."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from data.config import Executor, Reformat
from data.executor import LocalRun, start
from data.reformat import reformat_pass
from data.tables import RunFolder
from huatuo_vision.cli import run_command


def main() -> None:
    run, url = RunFolder(Path(sys.argv[1])), sys.argv[2]
    settings = Reformat(method="mllm_reformatted", model="m", base_url=url, concurrency=4, max_retries=1)
    work = reformat_pass(run, settings, run.tasks("balance"))
    start(run, work, "")
    with LocalRun(Executor(workers=1), Console(stderr=True)) as local:
        local.run(run, work)


if __name__ == "__main__":
    run_command(main)
