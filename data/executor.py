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
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
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


def run_local(run: RunFolder, work: Pass, settings: Executor, console: Console) -> None:
    """Run what is left of a pass. Raises UserError when a task fails or a worker dies; the same command goes on."""
    workers = min(settings.workers or os.cpu_count() or 1, work.tasks)
    executor = LocalExecutor(list(work.steps), work.tasks, workers, run.logging_dir(work.name))
    with _progress_bar(console, run, work) as show:
        executor.run(show)


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's, on a pool that notices when one of its processes is killed: theirs waits for it for ever.

    Its lines on the console are left out; every task's log file stays.
    """

    def __init__(self, pipeline: list[PipelineStep], tasks: int, workers: int, logging_dir: Path):
        super().__init__(pipeline, tasks=tasks, workers=workers, logging_dir=str(logging_dir))

    def run(self, show: Callable[[int], None] = lambda done: None) -> None:
        """`show` is called about every second with the number of complete tasks."""
        ranks = self.get_incomplete_ranks()
        done = self.tasks - len(ranks)
        show(done)
        if not ranks:
            return
        self.save_executor_as_json()
        if self.workers == 1:
            for rank in ranks:
                # A step's counters, and whatever it keeps, belong to one task.
                _run_task(deepcopy(self), rank)
                done += 1
                show(done)
            return
        # Spawned, since forking a process that has threads (the progress bar's, a library's) can hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, initializer=_end_with_parent) as pool:
            running = {pool.submit(_run_task, self, rank): rank for rank in ranks}
            try:
                self._watch(running, done, show)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                _end_workers(pool)
                raise

    def _watch(self, running: dict[Future, int], done: int, show: Callable[[int], None]) -> None:
        while running:
            finished, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in finished:
                rank = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    raise UserError(
                        f"a worker process was killed (task {rank} or one beside it; out of memory?); run the same "
                        "command again and it goes on from there, with fewer executor.workers if memory was short"
                    ) from None
                done += 1
            show(done)


def _run_task(executor: LocalExecutor, rank: int) -> None:
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


def _end_workers(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.terminate()


@contextlib.contextmanager
def _progress_bar(console: Console, run: RunFolder, work: Pass) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rows]}"),
    )
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    folder = run.logging_dir(work.name)
    with progress:
        bar = progress.add_task(work.name, total=work.tasks, rows="")
        known: dict[str, int] = {}

        def show(done: int) -> None:
            rows = sum(_finished_rows(folder, known)) + sum(_rows_so_far(folder))
            progress.update(bar, completed=done, rows=f"tasks, {rows:,} rows" if rows else "tasks")

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
