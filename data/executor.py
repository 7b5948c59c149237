"""Running a pass over its tasks: in local processes by default, on Slurm or Ray by datatrove's own executors.

A task that is complete has a marker file and is not run again. The markers stand in a folder that is named after the
settings, the input and the number of tasks, so that none can be taken for another's.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data.config import Executor
from data.steps import Pass
from data.tables import RunFolder, write_json
from huatuo_vision.schema import UserError

# Says so to who looks for the reason of another outcome; goes up when a stage's result changes for the same settings.
BUILDER_VERSION = 1

# datatrove speaks to stderr whenever it is imported; its tasks still write their own log files.
logger.remove()


def fingerprint(settings: object, upstream: str, tasks: int) -> str:
    """16 hex digits over what decides a pass's result: its settings, the result it starts from, and the tasks."""
    values = json.dumps([BUILDER_VERSION, settings, upstream, tasks], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(values.encode()).hexdigest()[:16]


def start(run: RunFolder, work: Pass, upstream: str) -> str:
    """Make the run folder ready for a pass and return its fingerprint.

    What the pass left with other settings is removed first; what it left with the same ones is kept, and it goes on.
    """
    mark = fingerprint(work.settings, upstream, work.tasks)
    state = run.state(work.name)
    if state is None or state["fingerprint"] != mark:
        # Markers first: files without markers are never read, markers without files would be trusted.
        for folder in (run.path / "logs").glob(f"{work.name}-*"):
            shutil.rmtree(folder)
        for folder in work.folders:
            shutil.rmtree(run.path / folder, ignore_errors=True)
        value = {"fingerprint": mark, "tasks": work.tasks, "settings": work.settings, "upstream": upstream}
        write_json(run.path / "logs" / f"{work.name}.json", value)
    return mark


class LocalRun:
    """Runs passes in this machine's processes, the same ones from pass to pass. A context manager.

    datatrove's own pool waits for ever for a process that was killed; this one notices.
    """

    def __init__(self, settings: Executor, console: Console):
        self._workers, self._console = settings.workers or os.cpu_count() or 1, console
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> LocalRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=kind is None, cancel_futures=True)
            for process in processes if kind is not None else ():
                process.terminate()

    def run(self, run: RunFolder, work: Pass) -> None:
        """What is left of a pass. Raises UserError when a task fails or a worker dies; the same command goes on."""
        executor = LocalExecutor(list(work.steps), tasks=work.tasks, logging_dir=str(run.logging_dir(work.name)))
        ranks = executor.get_incomplete_ranks()
        if not ranks:
            return
        executor.save_executor_as_json()
        with _progress_bar(self._console, run, work, done=work.tasks - len(ranks)) as show:
            if self._workers == 1 or work.tasks == 1:
                for rank in ranks:
                    # A step's counters, and whatever it keeps, belong to one task.
                    run_task(deepcopy(executor), rank)
                    show(1)
            else:
                self._run_in_pool(executor, ranks, show)

    def _run_in_pool(self, executor: LocalExecutor, ranks: list[int], show: Callable[[int], None]) -> None:
        if self._pool is None:
            # Spawned, since forking a process that has threads (the progress bar's, a library's) can hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, initializer=_end_with_parent)
        try:
            # A worker can die while tasks are still being handed out, so submitting stands inside as well.
            running = {self._pool.submit(run_task, executor, rank) for rank in ranks}
            while running:
                finished, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                show(len(finished))
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); run the same command again and it goes on from "
                "there, with fewer executor.workers if memory was short"
            ) from None


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's executor as what a task runs in; LocalRun hands out the tasks."""

    def run(self) -> None:
        raise NotImplementedError("LocalRun runs its tasks")


def run_task(executor: LocalExecutor, rank: int) -> None:
    """One task, its messages in its log file only. Raises UserError that names the file."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            executor._run_for_rank(rank, local_rank=1)
        except UserError:
            raise
        except Exception as error:
            log = executor.logging_dir.resolve_paths(f"logs/task_{rank:05d}.log")
            text = " ".join(str(error).split())[:300] or "no message"
            raise UserError(
                f"task {rank} failed with {type(error).__name__}: {text}; its log is {log}; run the same command again "
                "to go on from there"
            ) from error
        finally:
            logger.remove()


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing, or asking a paid endpoint, beside its successor."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _progress_bar(console: Console, run: RunFolder, work: Pass, done: int) -> Iterator[Callable[[int], None]]:
    """Yields what is called about every second with the number of tasks that were completed since."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rows]}"),
    )
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    folder = run.logging_dir(work.name)
    with progress:
        bar = progress.add_task(work.name, total=work.tasks, completed=done, rows="tasks")
        known: dict[str, int] = {}

        def show(more: int) -> None:
            rows = sum(_finished_rows(folder, known)) + sum(_rows_so_far(folder))
            progress.update(bar, advance=more, rows=f"tasks, {rows:,} rows" if rows else "tasks")

        yield show


def _finished_rows(folder: Path, known: dict[str, int]) -> Iterator[int]:
    for path in (folder / "counts").glob("*.json"):
        if path.name not in known:
            known[path.name] = json.loads(path.read_text(encoding="utf-8"))["rows_in"]
    return iter(known.values())


def _rows_so_far(folder: Path) -> Iterator[int]:
    for path in (folder / "progress").glob("*"):
        # Written and removed by the workers meanwhile.
        with contextlib.suppress(OSError, ValueError):
            yield int(path.read_text())


def cluster_executor(
    kind: str, run: RunFolder, work: Pass, settings: Executor, after: PipelineExecutor | None
) -> PipelineExecutor:
    """datatrove's executor for Slurm or Ray. Raises UserError for arguments that it refuses."""
    arguments: dict[str, Any] = {"pipeline": list(work.steps), "tasks": work.tasks}
    arguments["logging_dir"] = str(run.logging_dir(work.name))
    try:
        if kind == "slurm":
            from datatrove.executor.slurm import SlurmPipelineExecutor

            return SlurmPipelineExecutor(**arguments, job_name=work.name, depends=after, **settings.slurm)
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(**arguments, **settings.ray)
    except (TypeError, ImportError) as error:
        raise UserError(f"executor.{kind}: {' '.join(str(error).split())}") from None
