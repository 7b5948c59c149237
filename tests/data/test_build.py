"""The command: the whole way, resumed after kills in every stage, and what it says when something is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

import yaml
from rich.console import Console

from data.build import main
from data.config import Executor
from data.executor import LocalExecutor, LocalRun
from data.funnel import funnel
from data.tables import RunFolder
from huatuo_vision.cli import run_command
from huatuo_vision.schema import UserError
from tests.data.test_dedup import textured
from tests.data.test_ingest import article, fig, put

ROOT = Path(__file__).parents[2]
PASSES = ("ingest", "text-filter", "image-filter.vectors", "image-filter", "dedup.captions", "dedup.decide", "dedup")


def textured_jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    textured(seed).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Twelve articles with two figures each; repeats, a missing file and texts without medicine are planted."""
    folder = tmp_path_factory.mktemp("articles")
    for n in range(12):
        text = "Chest radiograph of a patient with pneumonia, pleural effusion and fever of the left lung"
        captions = [f"<caption><p>{text if n != 3 else 'A plain text'} {n * 7919 + k}.</p></caption>" for k in (1, 2)]
        body = "".join(fig(k, f'{captions[k - 1]}<graphic xlink:href="f{k}"/>') for k in (1, 2))
        files = {f"a{n}.xml": article(body), "f1.jpg": textured_jpeg(2 * (n % 10))}
        put(folder / f"a{n}", files | ({"f2.jpg": textured_jpeg(2 * n + 1)} if n != 5 else {}))
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    classifier = {"encoder": "small-v1", "weights": [0.0] * 109, "bias": 3.0, "threshold": 0.5, "labels": {}}
    (folder / "classifier.json").write_text(json.dumps(classifier | {"rows_sha256": "", "validation": {}}))
    return written(folder / "c.yaml", classifier=str(folder / "classifier.json"))


def written(path: Path, *, classifier: str | None = None, **changed: object) -> Path:
    values = {
        "name": "test",
        "ingest": {"shard_size": 3},
        "image_filter": {"min_side": 100, "encoder": {"kind": "small"}, "classifier": classifier},
        "dedup": {"encoder": {"kind": "hashing"}, "min_cosine": 0.999},
        "executor": {"workers": 1},
    }
    path.write_text(yaml.safe_dump(values | changed))
    return path


def command(config: Path, source: Path | str, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "data.build",
        "--config",
        str(config),
        "--source",
        str(source),
        "--out",
        str(out),
        *more,
    ]


def run(*arguments: object, expect: int = 0) -> str:
    """The command in this process, and what it says; its libraries are then imported once for all tests."""
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(said),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", [str(argument) for argument in command(*arguments)[2:]])
        run_command(main)
    assert ended.value.code == expect, said.getvalue()
    return " ".join(said.getvalue().split())


def result(folder: Path) -> list[bytes]:
    """What every stage left, to the byte of each column."""
    run = RunFolder(folder)
    rows = []
    for stage in ("ingest", "text-filter", "image-filter", "dedup"):
        for rank in range(run.tasks(stage)):
            rows += [repr(pair).encode() for pair in run.pairs(stage, rank)]
        rows += [repr(dropped).encode() for dropped in run.dropped(stage)]
    return rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source, config) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(config, source, out)
    return out


def test_the_funnel_adds_up_and_names_what_was_planted(undisturbed):
    rows = {row.stage: row.counts for row in funnel(RunFolder(undisturbed))}
    assert rows["ingest"].dropped == {"missing_image": 1} and rows["ingest"].rows_in == 24
    assert rows["text-filter"].dropped == {"few_terms": 2}
    assert rows["dedup"].dropped == {"same_image": 2}
    written = json.loads((undisturbed / "funnel.json").read_text())["stages"]
    for before, after in zip(written, written[1:], strict=False):
        assert before["rows_out"] == after["rows_in"]
    assert all(stage["rows_in"] == stage["rows_out"] + sum(stage["dropped"].values()) for stage in written)
    assert (undisturbed / "funnel.png").stat().st_size > 5000


def test_the_same_command_again_does_nothing_and_a_changed_setting_only_what_follows(
    undisturbed, source, config, tmp_path
):
    def times() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in undisturbed.glob("pairs/*/*.parquet")}

    before = times()
    run(config, source, undisturbed)
    assert times() == before
    values = yaml.safe_load(config.read_text())
    values["dedup"]["min_cosine"] = 0.9
    said = run(written(tmp_path / "c.yaml", **values), source, undisturbed)
    changed = {Path(path).parent.name for path, at in times().items() if at != before[path]}
    assert changed == {"dedup", "balance", "reformat"} and "dedup: made again" in said
    run(config, source, undisturbed)


# One of them runs each time, all of them in make test-slow.
@pytest.mark.parametrize(
    "name", [name if name == "dedup" else pytest.param(name, marks=pytest.mark.slow) for name in PASSES]
)
def test_a_kill_in_any_stage_loses_and_doubles_nothing(tmp_path, source, config, undisturbed, name):
    """Killed as soon as the pass has begun; also while a task of it is half done, as far as that can be caught."""
    process = subprocess.Popen(command(config, source, tmp_path / "run"), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "logs").glob(f"{name}-*/logs/*")) and process.poll() is None:
        assert time.monotonic() < deadline, f"{name} did not begin"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = run(config, source, tmp_path / "run")
    assert result(tmp_path / "run") == result(undisturbed), said
    assert not list((tmp_path / "run" / "pairs").rglob("*.json"))


def test_a_half_written_file_is_never_read(tmp_path, source, config):
    run(config, source, tmp_path / "run", "--limit", "3", "--step", "ingest")
    folder = RunFolder(tmp_path / "run")
    (folder.logging_dir("ingest") / "completions" / "00000").unlink()
    said = run(config, source, tmp_path / "run", "--limit", "3", "--step", "text-filter", expect=2)
    assert "the stage ingest is not complete (1 of 1 tasks are missing)" in said


def test_a_file_that_changed_afterwards_is_noticed(tmp_path, source, config):
    run(config, source, tmp_path / "run", "--limit", "6", "--step", "ingest")
    folder = RunFolder(tmp_path / "run")
    folder.pairs_file("ingest", 0).write_bytes(folder.pairs_file("ingest", 1).read_bytes())
    counts = folder.logging_dir("ingest") / "counts" / "00000.json"
    counts.write_text(counts.read_text().replace('"rows_out": 6', '"rows_out": 7'))
    said = run(config, source, tmp_path / "run", "--limit", "6", "--step", "text-filter", expect=2)
    assert "holds 6 rows; its manifest says 7" in said


def test_a_killed_worker_ends_the_run_within_seconds_and_orphans_end_too(tmp_path, source, config):
    """datatrove's own pool would wait for ever."""
    values = yaml.safe_load(config.read_text()) | {"executor": {"workers": 2}}
    slow = written(tmp_path / "c.yaml", **values)
    environment = os.environ | {"PYTHONPATH": str(_slow_reading(tmp_path))}
    process = subprocess.Popen(
        command(slow, source, tmp_path / "run"), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
    )
    workers = _wait_for(lambda: list((tmp_path / "pids").glob("*")), 200)
    started = time.monotonic()
    os.kill(int(workers[0].name), signal.SIGKILL)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2 and "a worker process was killed" in " ".join(said.split())
    assert time.monotonic() - started < 60  # for ever, without the watch
    _wait_for(lambda: not [pid for pid in _pids(tmp_path) if _alive(pid)], 10)

    process = subprocess.Popen(
        command(slow, source, tmp_path / "run"), cwd=ROOT, stderr=subprocess.DEVNULL, env=environment
    )
    before = set(_pids(tmp_path))
    _wait_for(lambda: set(_pids(tmp_path)) - before, 200)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_for(lambda: not [pid for pid in _pids(tmp_path) if _alive(pid)], 10)


def test_a_worker_that_dies_while_tasks_are_still_handed_out_is_said_in_the_same_words(tmp_path):
    """A pool that is already broken refuses the next task instead of failing its future."""
    executor = LocalExecutor([], tasks=2, logging_dir=str(tmp_path))
    with LocalRun(Executor(workers=2), Console(quiet=True)) as local:
        local._pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
        with contextlib.suppress(BrokenProcessPool):
            local._pool.submit(os._exit, 1).result(60)
        with pytest.raises(UserError, match="a worker process was killed"):
            local._run_in_pool(executor, [0, 1], lambda more: None)


def _slow_reading(folder: Path) -> Path:
    """A site customisation that makes worker processes write down their id and read articles slowly."""
    (folder / "pids").mkdir()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'spawn_main' in ' '.join(sys.orig_argv):\n"
        f"    open({str(folder / 'pids')!r} + f'/{{os.getpid()}}', 'w').close()\n"
        "    def slow(event, arguments):\n"
        "        if event == 'open' and str(arguments[0]).endswith('.xml'):\n"
        "            time.sleep(30)\n"
        "    sys.addaudithook(slow)\n"
    )
    return folder / "site"


def _pids(folder: Path) -> list[int]:
    return [int(path.name) for path in (folder / "pids").glob("*")]


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, source, config):
    said = run(config, source, tmp_path / "run", "--dry-run")
    assert "12 articles or archives in 4 tasks" in said and "to do, 4 tasks" in said
    assert not (tmp_path / "run").exists()


def test_another_source_or_limit_does_not_overwrite_what_was_read(tmp_path, undisturbed, source, config):
    said = run(config, source, undisturbed, "--limit", "2", expect=2)
    assert "limit = None" in said and "give another --out" in said
    put(tmp_path / "other", {"a.xml": article(fig(1))})
    assert "was read with address =" in run(config, tmp_path / "other", undisturbed, expect=2)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"text_filer": {}}, "unknown key 'text_filer'; did you mean 'text_filter'?"),
        ({"text_filter": {"min_term": 1}}, "did you mean 'min_terms'?"),
        ({"text_filter": {"vocabulary": "gone.txt"}}, "gone.txt does not exist"),
        ({"image_filter": {"classifier": "gone.json"}}, "python -m data.filters.classifier"),
        ({"image_filter": {"encoder": {"kind": "clip"}}}, "encoder clip needs an id"),
        ({"ingest": {"storage_options": {"secret": "x"}}}, "looks like a secret"),
        ({"dedup": {"guard": {"benchmarks": {"vqa": None}}}}, "'vqa' is no benchmark"),
    ],
)
def test_a_wrong_configuration_is_one_sentence_before_anything_is_read(tmp_path, source, changed, expected):
    said = run(written(tmp_path / "c.yaml", **changed), source, tmp_path / "run", expect=2)
    assert expected in said and said.startswith("error: ")
    assert not (tmp_path / "run" / "pairs").exists()


def test_two_commands_in_one_folder_are_refused(tmp_path, source, config):
    import filelock

    (tmp_path / "run").mkdir()
    with filelock.FileLock(tmp_path / "run" / ".lock"):
        assert "another command is at work in it" in run(config, source, tmp_path / "run", expect=2)


def test_no_log_holds_a_picture_or_more_than_names(undisturbed):
    for path in (undisturbed / "logs").rglob("*"):
        if path.is_file():
            assert path.stat().st_size < 20_000 and b"\xff\xd8" not in path.read_bytes()
