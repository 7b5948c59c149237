"""Checkpoints that are whole or absent: written under another name, listed with hashes, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huatuo_vision.run_record import write_json

MANIFEST = "manifest.json"
_STAGING = ".saving"


def staging_folder(phase_folder: Path) -> Path:
    """Where the checkpoint in the making lives; whatever lies here after a kill is rubbish."""
    return phase_folder / _STAGING


def seal(phase_folder: Path, step: int, facts: dict[str, Any]) -> Path:
    """Publish the checkpoint in the staging folder: hash every file, write the manifest, rename."""
    written = staging_folder(phase_folder) / f"checkpoint-{step}"
    files = sorted(path for path in written.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_sha256_and_sync, files))
    listing = {
        str(path.relative_to(written)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    write_json(written / MANIFEST, {"step": step, **facts, "files": listing})
    published = phase_folder / f"checkpoint-{step}"
    shutil.rmtree(published, ignore_errors=True)  # an earlier one of this step that failed its check
    os.replace(written, published)
    shutil.rmtree(staging_folder(phase_folder))
    return published


def checkpoints(phase_folder: Path) -> list[Path]:
    return list(phase_folder.glob("checkpoint-*"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def latest_checkpoint(phase_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files match their manifest, and a sentence for each newer one that does not."""
    refused = []
    for folder in sorted(checkpoints(phase_folder), key=step_of, reverse=True):
        fault = fault_of(folder)
        if fault is None:
            return folder, refused
        refused.append(f"{folder} is not used: {fault}")
    return None, refused


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text())


def remove_old(phase_folder: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints."""
    by_step = sorted(checkpoints(phase_folder), key=step_of)
    for folder in by_step[: max(0, len(by_step) - keep)]:
        shutil.rmtree(folder)


def fault_of(folder: Path) -> str | None:
    """What does not match the manifest, in words; None for a whole checkpoint."""
    try:
        listing = read_manifest(folder)["files"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return "it has no readable manifest"
    for name, expected in listing.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(listing, pool.map(_sha256, (folder / name for name in listing)), strict=True):
            if digest != listing[name]["sha256"]:
                return f"{name} does not match its hash"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_and_sync(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
