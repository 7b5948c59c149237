"""Build a training-ready data set from articles or from one's own image and text pairs.

    python -m data.build --config data/pubmedvision.yaml --source DIR --out DIR

Stages run one after another, each in as many tasks as the source was cut into; what is complete is not done again, so
the same command goes on where it was stopped. At its end stands the funnel: rows in, rows out, and why the rest
dropped. The stages and what each leaves behind: data/README.md and data/tables.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
from datatrove.executor.base import PipelineExecutor
from rich.console import Console
from rich.table import Table

from data.config import BuildConfig, load_config
from data.executor import LocalRun, cluster_executor, fingerprint, start
from data.funnel import draw_funnel, funnel, print_funnel, write_funnel
from data.sources.ingest import ingest_pass, ingest_settings, list_units, write_plan
from data.steps import Pass
from data.tables import RunFolder, write_json
from huatuo_vision.cli import run_command
from huatuo_vision.schema import UserError

STEPS = ("ingest", "text-filter", "image-filter", "dedup", "balance", "retrieve", "reformat", "assemble")
BUILD_FILE = "build.json"
FUNNEL_PICTURE = "funnel.png"
_PACKAGES = ("datatrove", "lxml", "pillow", "pydicom", "imagehash", "faiss-cpu", "scikit-learn", "pyarrow")


@dataclass(frozen=True, slots=True)
class Build:
    """One command: what to make, of what, where."""

    config: BuildConfig
    source: str
    run: RunFolder
    limit: int | None

    def passes(self, step: str, tasks: int) -> list[Pass]:
        """What a step consists of. Raises UserError for files that its settings name and that are not right."""
        config, run = self.config, self.run
        # Imported as they are needed: every worker process imports this module, and no stage needs all of them.
        match step:
            case "ingest":
                return [ingest_pass(run, self.source, config.ingest, self.limit, tasks)]
            case "text-filter":
                from data.filters.text import text_filter_pass

                return [text_filter_pass(run, config.text_filter, tasks)]
            case "image-filter":
                from data.filters.image import image_filter_passes

                return image_filter_passes(run, config.image_filter, tasks)
            case "dedup":
                from data.dedup.stage import dedup_passes

                return dedup_passes(run, config.dedup, tasks)
            case "balance":
                from data.balance import balance_passes

                return balance_passes(run, config.balance, tasks, counted=bool(config.ingest.sources))
            case "retrieve":
                from data.retrieve import retrieve_passes

                return retrieve_passes(run, config.retrieve, config.dedup.guard, tasks)
            case "reformat":
                from data.reformat import reformat_pass

                return [reformat_pass(run, config.reformat, tasks, evidence=config.retrieve is not None)]
            case "assemble":
                from data.assemble import assemble_pass

                return [assemble_pass(run, config.assemble, tasks)]
        raise AssertionError(step)

    def plan(self, console: Console) -> int:
        """The number of tasks; what each shall read is written down once and kept. Raises UserError."""
        state = self.run.state("ingest")
        settings = ingest_settings(self.source, self.config.ingest, self.limit)
        if state is None:
            with console.status(f"listing {self.source}"):
                return write_plan(self.run, self.source, self.config.ingest, self.limit)
        if different := sorted(key for key in settings if settings[key] != state["settings"].get(key)):
            # It may stand for days of reading: never thrown away by the way.
            key = different[0]
            raise UserError(
                f"{self.run.path} was read with {key} = {state['settings'].get(key)!r}, and this command says "
                f"{settings[key]!r}; give another --out, or delete that folder to read the source again"
            )
        return state["tasks"]


def build(build: Build, steps: Sequence[str], executor: str, console: Console) -> None:
    """Run the steps. Raises UserError when one can't be completed."""
    run = build.run
    tasks = build.plan(console)
    # Everything that the settings name is looked at before the first row is: a wrong path costs no night.
    planned = {step: build.passes(step, tasks) for step in STEPS}
    _record(build)
    upstream, after = "", None
    with LocalRun(build.config.executor, console) as local:
        for step, work in ((name, work) for name in STEPS for work in planned[name]):
            if step not in steps:
                upstream = _reused(run, work, upstream, steps)
                continue
            known = run.state(work.name)
            upstream = start(run, work, upstream)
            if known is not None and known["fingerprint"] != upstream:
                console.print(f"{work.name}: made again, since its settings or its input changed", style="yellow")
            if executor == "local":
                local.run(run, work)
            else:
                after = _submit(executor, run, work, build.config, after)
            if work.finish is not None and run.is_complete(work.name):
                work.finish()
    _report(run, console)
    if "assemble" in steps and run.is_complete("assemble"):
        from data.card import write_card

        console.print(f"the data set and its card: {write_card(run, build.config)}", soft_wrap=True)
    if after is not None and not all(run.is_complete(work.name) for work in planned[steps[-1]]):
        console.print(f"submitted to {executor}; run the same command again when its jobs have ended, for the funnel")


def _reused(run: RunFolder, work: Pass, upstream: str, steps: Sequence[str]) -> str:
    """The fingerprint of a pass that this command does not run. Raises UserError where --step builds on what is old."""
    mark = fingerprint(work.settings, upstream, work.tasks)
    state = run.state(work.name)
    before = STEPS.index(work.name.split(".")[0]) < STEPS.index(steps[0])
    if before and (state is None or state["fingerprint"] != mark):
        raise UserError(
            f"--step {steps[0]} builds on {work.name}, which {'has not run' if state is None else 'ran'}"
            f"{'' if state is None else ' with other settings'}; run --step {work.name.split('.')[0]} first, or leave "
            "out --step"
        )
    if before:
        run.tasks(work.name)
    return mark


def _submit(
    kind: str, run: RunFolder, work: Pass, config: BuildConfig, after: PipelineExecutor | None
) -> PipelineExecutor:
    executor = cluster_executor(kind, run, work, config.executor, after)
    executor.run()
    return executor


def _report(run: RunFolder, console: Console) -> None:
    rows = funnel(run)
    if rows:
        write_funnel(run, rows)
        draw_funnel(rows, run.path / FUNNEL_PICTURE)
        print_funnel(rows, console)


def describe(build: Build, console: Console) -> None:
    """What the command would do; nothing is written."""
    run, settings = build.run, build.config.ingest
    state = run.state("ingest")
    if state is not None:
        tasks = build.plan(console)
        console.print(f"{run.path} holds the plan of an earlier command: {tasks:,} tasks")
    else:
        tasks = units = 0
        for units_of_task in list_units(build.source, settings, build.limit):
            tasks += 1
            units += sum(unit.get("rows", 1) for unit in units_of_task)
        what = "articles or archives" if settings.kind == "articles" else "rows"
        console.print(f"{build.source}: {units:,} {what} in {tasks:,} tasks")
    table = Table("stage", "state", title="nothing is run")
    upstream = ""
    for step in STEPS:
        for work in build.passes(step, tasks):
            upstream = fingerprint(work.settings, upstream, work.tasks)
            table.add_row(work.name, _state(run, work, upstream))
    console.print(table)


def _state(run: RunFolder, work: Pass, mark: str) -> str:
    state = run.state(work.name)
    if state is None:
        return f"to do, {work.tasks:,} tasks"
    if state["fingerprint"] != mark:
        return f"to do again (settings or input changed), {work.tasks:,} tasks"
    done = len(list((run.logging_dir(work.name) / "completions").glob("*")))
    return "complete" if done == work.tasks else f"{done:,} of {work.tasks:,} tasks complete"


def _record(build: Build) -> None:
    """What was asked for, and with what; no secret is in a configuration, and file system options stay out."""
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    config: dict[str, Any] = build.config.model_dump(
        mode="json", exclude={"ingest": {"storage_options"}, "executor": True}
    )
    record = {"schema": 1, "config": config, "source": build.source, "limit": build.limit, "versions": versions}
    write_json(build.run.path / BUILD_FILE, record)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="YAML")
    parser.add_argument(
        "--source", required=True, metavar="DIR", help="a folder, a pairs file, or an address of fsspec's"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the run folder; new, or of the same run"
    )
    parser.add_argument("--step", choices=STEPS, help="only this one; what it builds on must be complete")
    parser.add_argument("--limit", type=int, metavar="N", help="read the first N articles (or rows of pairs) only")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument(
        "--estimate", action="store_true", help="ask about 50 rows that reach reformat, and say what all would cost"
    )
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), default="local")
    arguments = parser.parse_args()
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: expected a number above 0")
    console = Console(stderr=True)
    work = Build(load_config(arguments.config), arguments.source, RunFolder(arguments.out), arguments.limit)
    if arguments.dry_run:
        describe(work, console)
        return
    if arguments.estimate:
        from data.reformat import estimate_run

        estimate_run(work.run, work.config.reformat, console, evidence=work.config.retrieve is not None)
        return
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(arguments.out / ".lock", timeout=0):
            build(work, [arguments.step] if arguments.step else STEPS, arguments.executor, console)
    except filelock.Timeout:
        raise UserError(f"--out {arguments.out}: another command is at work in it; wait for its end") from None
    except OSError as error:
        raise UserError(f"reading {arguments.source} or writing {arguments.out} failed: {error}") from None


if __name__ == "__main__":
    run_command(main)
