"""Running the open parts of a plan: here, several at a time, or as Slurm scripts that wait for each other."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from huatuo_vision.ablate.plan import Part, Plan, launcher, script
from huatuo_vision.schema import UserError

# What a failed part said last is its message.
TAIL_LINES = 12


@dataclass(frozen=True, slots=True)
class _Ended:
    part: Part
    code: int
    seconds: float


def run_parts(plan: Plan, jobs: int, console: Console) -> None:
    """Run every open part, each after those that it needs, `jobs` at a time.

    Raises UserError when a part fails: those that run are let finish, no other is started.
    """
    logs = plan.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    waiting, finished = list(plan.open), {part.name for part in plan.parts if part.finished}
    running: dict[Future[_Ended], Part] = {}
    failed: list[_Ended] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        _only_one_in(plan.out.parent),
        ThreadPoolExecutor(jobs) as pool,
        _Processes() as processes,  # ended before the pool waits for its threads
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(plan.loaded.spec.name, total=len(plan.parts), completed=len(finished))
        while waiting or running:
            ready = [part for part in waiting if finished.issuperset(part.after)]
            for part in ready[: jobs - len(running)]:
                if not failed:
                    waiting.remove(part)
                    running[pool.submit(_run, part, plan, logs, processes)] = part
            if not running:
                break
            progress.update(task, description="\n".join(part.name for part in running.values()))
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                running.pop(done)
                ended = done.result()
                if ended.code != 0:
                    failed.append(ended)
                    continue
                finished.add(ended.part.name)
                progress.advance(task)
                minutes, seconds = divmod(round(ended.seconds), 60)
                console.print(
                    f"{len(finished):>3} of {len(plan.parts)}  {ended.part.name}  {minutes}:{seconds:02d}",
                    highlight=False,
                )
    if failed:
        raise UserError(_explain(failed, logs))


@contextmanager
def _only_one_in(folder: Path) -> Iterator[None]:
    """Two commands would train and evaluate the same runs at once; the second refuses."""
    lock = FileLock(folder / ".ablate.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another ablation is running in {folder}; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def _run(part: Part, plan: Plan, logs: Path, processes: _Processes) -> _Ended:
    command = [*launcher(plan.loaded, part), script(part.command[0]), *part.command[1:]]
    started = time.monotonic()
    with (logs / f"{part.name}.log").open("w", encoding="utf-8") as log:
        log.write(f"{shlex.join(command)}\n")
        log.flush()
        code = processes.run(command, log, plan.loaded.spec.launch.environment)
    return _Ended(part, code, time.monotonic() - started)


class _Processes:
    """The parts' processes; none outlives this one, however it ends.

    A part is a launcher with children of its own, so it is a process group. Beside each waits a shell for the end of
    a pipe that only this process holds: where this process is killed, the pipe closes and the shell ends the group.
    """

    def __init__(self) -> None:
        self.running: set[int] = set()

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for group in list(self.running):
            _end_group(group)

    def run(self, command: Sequence[str], log: object, environment: dict[str, str]) -> int:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )
        self.running.add(process.pid)
        watch = subprocess.Popen(
            ["sh", "-c", f"cat > /dev/null; kill -9 -{process.pid}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait()
        finally:
            _end_group(process.pid)
            watch.kill()
            watch.wait()
            watch.stdin.close()
            self.running.discard(process.pid)


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGTERM)
    except ProcessLookupError:
        return


def _explain(failed: Sequence[_Ended], logs: Path) -> str:
    first = failed[0]
    log = logs / f"{first.part.name}.log"
    others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return (
        f"{first.part.name}{others} ended with exit code {first.code}: {_message(log)}\n"
        f"Its whole output is in {log}. Mend that, then give the same command again: it goes on where it stopped."
    )


def _message(log: Path) -> str:
    """A part's own sentence, or the end of what it printed."""
    printed = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]  # the first is the command
    lines = [line for line in printed if line.strip()]
    said = [line for line in lines if line.startswith("error: ")]
    return said[-1].removeprefix("error: ") if said else "\n" + "\n".join(lines[-TAIL_LINES:])


# -- Slurm ---------------------------------------------------------------------------------------------------------


def write_slurm(plan: Plan, folder: Path, command: Sequence[str], console: Console) -> None:
    """A script for each open part, one for the table (`command` again), and submit.sh, which sends them all off."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--slurm {folder}: no folder can be made there ({error.strerror})") from None
    scripts = {part.name: slurm_script(plan, part) for part in plan.open}
    report = _script(plan, "report", plan.loaded.spec.slurm.report, ["python", "-m", "huatuo_vision.ablate", *command])
    for name, text in {**scripts, "report": report}.items():
        (folder / f"{name}.sbatch").write_text(text, encoding="utf-8")
    submit = folder / "submit.sh"
    submit.write_text(_submit(plan), encoding="utf-8")
    submit.chmod(0o755)
    console.print(f"{len(scripts) + 1} scripts in {folder}; send them off with: {submit}", highlight=False)


def slurm_script(plan: Plan, part: Part) -> str:
    options = plan.loaded.spec.slurm.train if part.kind == "train" else plan.loaded.spec.slurm.evaluate
    launch = ["accelerate", "launch", *launcher(plan.loaded, part)[3:]]
    return _script(plan, part.name, options, [*launch, script(part.command[0]), *part.command[1:]])


def _script(plan: Plan, name: str, options: Sequence[str], command: Sequence[str]) -> str:
    log = plan.out.absolute() / "logs" / f"{name}.%j.log"
    variables = plan.loaded.spec.launch.environment.items()
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --output={log}",
        "#SBATCH --requeue",  # the same command again goes on where it was
        *(f"#SBATCH {option}" for option in options),
        "set -euo pipefail",
        f"cd {shlex.quote(os.getcwd())}",
        *plan.loaded.spec.slurm.setup,
        *(f"export {key}={shlex.quote(value)}" for key, value in variables),
        shlex.join(command),
    ]
    return "\n".join(lines) + "\n"


def _submit(plan: Plan) -> str:
    """Each part waits for the success of those that it needs; the table for all."""
    lines = [
        "#!/bin/bash",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        f"mkdir -p {shlex.quote(str(plan.out.absolute() / 'logs'))}",
    ]
    open_parts = {part.name: f"job{number}" for number, part in enumerate(plan.open)}
    for part in plan.open:
        needs = [open_parts[name] for name in part.after if name in open_parts]
        lines.append(f"{open_parts[part.name]}=$(sbatch --parsable{_dependency(needs)} {part.name}.sbatch)")
    lines.append(f"sbatch{_dependency(list(open_parts.values()))} report.sbatch")
    return "\n".join(lines) + "\n"


def _dependency(jobs: Sequence[str]) -> str:
    return " --dependency=afterok:" + ":".join(f"${job}" for job in jobs) if jobs else ""
