"""Checkpoints are whole or refused, and what cannot be written costs none that was."""

import resource

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
    return seal(phase, step, {"world_size": 1})


@pytest.fixture
def phase(tmp_path):
    for step in (5, 10):
        saved(tmp_path / "align", step)
    return tmp_path / "align"


def cut(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])


def turn_a_byte(folder):
    path = folder / "trainable.safetensors"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def lose_a_file(folder):
    (folder / "optimizer.pt").unlink()


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


def cut_the_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-40])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "optimizer.pt has 49 bytes instead of 50"),
        (turn_a_byte, "trainable.safetensors does not match its hash"),
        (lose_a_file, "optimizer.pt is missing"),
        (lose_the_manifest, "it has no readable manifest"),
        (cut_the_manifest, "it has no readable manifest"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_found(phase, damage, said):
    assert latest_checkpoint(phase) == (phase / "checkpoint-10", [])
    damage(phase / "checkpoint-10")
    assert latest_checkpoint(phase) == (phase / "checkpoint-5", [f"{phase / 'checkpoint-10'} is not used: {said}"])
    damage(phase / "checkpoint-5") if damage is not cut else lose_a_file(phase / "checkpoint-5")
    found, refused = latest_checkpoint(phase)
    assert found is None and len(refused) == 2


def test_the_step_trained_again_replaces_a_damaged_checkpoint(phase):
    cut(phase / "checkpoint-10")
    saved(phase, 10)
    assert fault_of(phase / "checkpoint-10") is None and not staging_folder(phase).exists()


def test_a_half_written_checkpoint_is_none(phase):
    half = staging_folder(phase) / "checkpoint-15"
    half.mkdir(parents=True)
    (half / "trainable.safetensors").write_bytes(b"half")
    assert latest_checkpoint(phase) == (phase / "checkpoint-10", [])


def test_only_the_newest_are_kept(phase):
    saved(phase, 100)
    remove_old(phase, keep=2)
    assert sorted(path.name for path in phase.iterdir()) == ["checkpoint-10", "checkpoint-100"]


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
