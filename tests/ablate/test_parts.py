"""Running parts: order, failures, and that nothing outlives the command. The parts are small scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from huatuo_vision.ablate import parts
from huatuo_vision.ablate.plan import Part, Plan
from huatuo_vision.schema import UserError
from tests.ablate.conftest import ROOT, plan_of

QUIET = Console(quiet=True)


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs scripts as parts: name -> (text, after)."""
    monkeypatch.setattr(parts, "launcher", lambda loaded, part: [sys.executable])
    monkeypatch.setattr(parts, "script", lambda name: str(folder / name))

    def start(scripts: dict[str, tuple[str, tuple[str, ...]]], jobs: int = 2, finished: tuple[str, ...] = ()) -> Plan:
        made = []
        for name, (text, after) in scripts.items():
            (folder / f"{name}.py").write_text(f"from pathlib import Path\nhere = Path({str(folder)!r})\n{text}")
            made.append(Part(name, "train", (f"{name}.py",), after, name in finished))
        plan = replace(plan_of(folder), parts=tuple(made))
        parts.run_parts(plan, jobs, QUIET)
        return plan

    return start


def touch(name: str) -> str:
    return f"(here / {name!r}).touch()\n"


def test_a_part_runs_after_those_that_it_needs(run, folder: Path):
    needs = "assert (here / 'first').exists()\n"
    slow = f"import time; time.sleep(0.5)\n{touch('first')}"
    run({"first": (slow, ()), "second": (needs + touch("second"), ("first",)), "third": (touch("third"), ())})
    assert all((folder / name).exists() for name in ("first", "second", "third"))


def test_finished_parts_are_not_run(run, folder: Path):
    run({"first": (touch("first"), ()), "second": (touch("second"), ("first",))}, finished=("first",))
    assert not (folder / "first").exists() and (folder / "second").exists()


def test_a_failure_stops_with_the_parts_own_sentence_and_says_how_to_go_on(run, folder: Path):
    said = (
        "import sys; print('noise'); print('error: image x.png is torn; copy it again', file=sys.stderr); sys.exit(2)"
    )
    with pytest.raises(UserError) as caught:
        run({"bad": (said, ()), "after": (touch("after"), ("bad",)), "other": (touch("other"), ("after",))})
    text = str(caught.value)
    assert text.startswith("bad ended with exit code 2: image x.png is torn; copy it again\n")
    assert "bad.log" in text and "the same command again" in text
    assert not (folder / "after").exists() and not (folder / "other").exists()


def test_a_failure_lets_the_running_parts_finish(run, folder: Path):
    slow = f"import time; time.sleep(1)\n{touch('slow')}"
    with pytest.raises(UserError, match="bad ended with exit code 1: \nTraceback"):
        run({"bad": ("raise ValueError('x')", ()), "slow": (slow, ()), "later": (touch("later"), ())})
    assert (folder / "slow").exists() and not (folder / "later").exists()


def test_two_commands_in_one_folder_refuse(run, folder: Path):
    (folder / "runs").mkdir()
    with FileLock(folder / "runs" / ".ablate.lock"), pytest.raises(UserError, match="another ablation is running in"):
        run({"one": (touch("one"), ())})
    assert not (folder / "one").exists()


def test_environment_and_output_of_a_part(run, folder: Path):
    plan = run({"one": ("import os, sys; print('out'); print('err', file=sys.stderr)", ())})
    log = (plan.out / "logs" / "one.log").read_text()
    assert log.splitlines()[0].endswith("one.py")  # the command, to be typed again
    assert "out" in log and "err" in log


ORPHANS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from huatuo_vision.ablate.parts import _Processes

child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
with ThreadPoolExecutor(1) as pool, _Processes() as processes:
    pool.submit(processes.run, [sys.executable, "-c", child], None, {}).result()
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_no_part_outlives_a_killed_command(sent):
    """Also the launcher's child, which no signal of the launcher's reaches."""
    command = subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(started := descendants(command.pid)) < 3:  # the part, its child, the waiting shell
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    command.send_signal(sent)
    command.wait()
    while any(is_running(pid) for pid in started):
        assert time.monotonic() < deadline, "a part still runs"
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    own = [int(child) for child in children.read_text().split()] if children.exists() else []
    # A thread starts the part, so that children are listed by thread.
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        own += [int(child) for child in task.read_text().split()]
    own = sorted(set(own))
    return own + [grandchild for child in own for grandchild in descendants(child)]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")
