"""Checkpoints are whole or refused, and what cannot be written costs none that was."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from huatuo_vision.cli import no_room
from huatuo_vision.training.checkpoint import fault_of, latest_checkpoint, remove_old, seal, staging_folder


def saved(phase, step):
    folder = staging_folder(phase) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainable.safetensors").write_bytes(bytes(range(256)) * step)
    (folder / "optimizer.pt").write_bytes(b"state" * step)
    return seal(phase, step, elapsed_seconds=1.5, world_size=1, distributed_type="NO")


@pytest.fixture
def phase(tmp_path):
    for step in (5, 10):
        saved(tmp_path / "align", step)
    return tmp_path / "align"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def turn_a_byte(path):
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def put_a_folder_there(path):
    path.unlink()
    path.mkdir()


def take_the_one_before(path):
    shutil.copyfile(path.parent.with_name("checkpoint-5") / path.name, path)


def rewrite(text):
    return lambda path: path.write_text(text)


DAMAGES = [
    ("optimizer.pt", cut, "optimizer.pt has 49 bytes instead of 50"),
    ("optimizer.pt", empty, "optimizer.pt has 0 bytes instead of 50"),
    ("optimizer.pt", take_the_one_before, "optimizer.pt has 25 bytes instead of 50"),
    ("optimizer.pt", put_a_folder_there, "optimizer.pt is missing"),
    ("trainable.safetensors", turn_a_byte, "trainable.safetensors does not match its hash"),
    ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
    ("manifest.json", Path.unlink, "manifest.json is missing"),
    ("manifest.json", lambda path: path.write_text(path.read_text()[:-40]), "manifest.json is damaged ("),
    ("manifest.json", empty, "manifest.json is damaged ("),
    ("manifest.json", turn_a_byte, "manifest.json is damaged ("),
    ("manifest.json", put_a_folder_there, "manifest.json cannot be read (Is a directory)"),
    ("manifest.json", take_the_one_before, "manifest.json is of step 5"),
    ("manifest.json", rewrite("[]"), "manifest.json is damaged (expected step, "),
    ("manifest.json", rewrite('{"step": 10, "files": {"a": 1}}'), "manifest.json is damaged (expected step, "),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_found(phase, name, damage, said):
    assert latest_checkpoint(phase) == (phase / "checkpoint-10", [])
    damage(phase / "checkpoint-10" / name)
    found, refused = latest_checkpoint(phase)
    assert found == phase / "checkpoint-5" and len(refused) == 1
    assert refused[0].startswith(f"{phase / 'checkpoint-10'} is not used: {said}")
    Path.unlink(phase / "checkpoint-5" / "optimizer.pt")
    found, refused = latest_checkpoint(phase)
    assert found is None and len(refused) == 2


def test_a_manifest_without_files_vouches_for_nothing(phase):
    path = phase / "checkpoint-10" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))
    assert latest_checkpoint(phase)[0] == phase / "checkpoint-5"


def test_a_copy_under_another_name_is_none_of_the_runs_checkpoints(phase):
    shutil.copytree(phase / "checkpoint-5", phase / "checkpoint-5.bak")
    shutil.copytree(phase / "checkpoint-5", phase / "checkpoint-15")
    (phase / "checkpoint-99").write_text("a note")
    found, refused = latest_checkpoint(phase)
    assert found == phase / "checkpoint-10"
    assert refused == [f"{phase / 'checkpoint-15'} is not used: manifest.json is of step 5"]
    remove_old(phase, newest=10, keep=1)
    assert sorted(path.name for path in phase.iterdir()) == ["checkpoint-10", "checkpoint-5.bak", "checkpoint-99"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"renamed to {Path(b).name}"), replace(a, b)))
    saved(tmp_path / "align", 5)
    before = done[: done.index("renamed to checkpoint-5")]
    assert {"trainable.safetensors", "optimizer.pt", f".manifest.json.{os.getpid()}", "checkpoint-5"} <= set(before)
    assert done[-1] == "align"


def test_the_step_trained_again_replaces_a_damaged_checkpoint(phase):
    cut(phase / "checkpoint-10" / "optimizer.pt")
    saved(phase, 10)
    assert fault_of(phase / "checkpoint-10") is None and not staging_folder(phase).exists()


def test_a_half_written_checkpoint_is_none(phase):
    half = staging_folder(phase) / "checkpoint-15"
    half.mkdir(parents=True)
    (half / "trainable.safetensors").write_bytes(b"half")
    assert latest_checkpoint(phase) == (phase / "checkpoint-10", [])


def test_only_the_newest_are_kept(phase):
    saved(phase, 100)
    remove_old(phase, newest=100, keep=2)
    assert sorted(path.name for path in phase.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_a_damaged_later_checkpoint_does_not_count_as_kept(phase):
    cut(phase / "checkpoint-10" / "optimizer.pt")
    saved(phase, 7)  # trained on from step 5
    remove_old(phase, newest=7, keep=1)
    assert [path.name for path in phase.iterdir()] == ["checkpoint-7"]


WRITERS = {
    "json": lambda path: path.write_text("x" * 1_000_000),
    "torch": lambda path: torch.save({"x": torch.zeros(250_000)}, path),
    "safetensors": lambda path: safetensors.torch.save_file({"x": torch.zeros(250_000)}, path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_each_writer_says_where_there_is_no_room_is_understood(write, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # EFBIG, raised where a full disk's ENOSPC is
    try:
        with pytest.raises(Exception) as caught:
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert no_room(caught.value), repr(caught.value)
    assert not no_room(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not no_room(FileNotFoundError(2, "No such file"))
