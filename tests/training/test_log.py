"""Small files of a run: a kill or a full disk in the middle of writing one costs nothing that was there."""

import json
import resource
from pathlib import Path

import pytest

from huatuo_vision.recipe import load_recipe, save_recipe
from huatuo_vision.run_record import read_record, write_json
from huatuo_vision.schema import UserError
from huatuo_vision.training.console import ProgressLog
from huatuo_vision.training.log import plot_losses, read_log
from huatuo_vision.training.run import _only_run_in
from tests.training.conftest import TINY


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"phase": phase, "step": step, "loss": 1.0} for phase in ("align", "instruct") for step in (4, 8)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"phase": "instr')
    return path


@pytest.fixture
def no_room():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # EFBIG, raised where a full disk's ENOSPC is
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_torn_by_a_kill_is_passed_over(log, tmp_path):
    assert [(entry["phase"], entry["step"]) for entry in read_log(log)][-1] == ("instruct", 8)
    plot_losses(log, tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_a_run_without_its_log_has_no_curve_and_no_error(tmp_path):
    plot_losses(tmp_path / "log.jsonl", tmp_path / "loss.png", "title")
    assert not list(tmp_path.iterdir())


def test_the_log_up_to_a_checkpoint_survives_a_full_disk(log, no_room):
    progress = ProgressLog(log, "instruct", console=None)
    with pytest.raises(OSError, match="File too large"):
        progress._forget_after(4)
    assert len(read_log(log)) == 4


def test_what_is_written_again_at_every_start_survives_a_full_disk(tmp_path, no_room):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: whole\n")
    with pytest.raises(OSError, match="File too large"):
        save_recipe(load_recipe(TINY), path)
    assert path.read_text() == "name: whole\n" and list(tmp_path.iterdir()) == [path]


def test_a_damaged_record_is_named(tmp_path):
    write_json(tmp_path / "run.json", {"phases": {}})
    assert read_record(tmp_path) == {"phases": {}}
    Path.write_bytes(tmp_path / "run.json", b"")
    with pytest.raises(UserError, match=r"run\.json is damaged.*--fresh"):
        read_record(tmp_path)


def test_one_run_in_a_folder_whatever_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    with _only_run_in(tmp_path / "run", is_main_process=True):
        for other in (tmp_path / "run", tmp_path / "link", tmp_path / "x/../run", Path(), Path("../run")):
            with pytest.raises(UserError, match="another run is writing"), _only_run_in(other, is_main_process=True):
                pass
    with _only_run_in(tmp_path / "link", is_main_process=True):
        pass


def test_a_run_folder_that_cannot_be_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    for out, said in ((tmp_path / "file", "is a file"), (tmp_path / "file/run", "cannot be written")):
        with pytest.raises(UserError, match=said), _only_run_in(out, is_main_process=True):
            pass
