"""Checkpoints that are whole or absent: written under another name, listed with hashes, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from huatuo_vision.run_record import write_json

MANIFEST = "manifest.json"
_STAGING = ".saving"


@dataclass(frozen=True)
class FileFacts:
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    step: int
    elapsed_seconds: float  # that the phase trained before it
    world_size: int
    distributed_type: str
    files: dict[str, FileFacts]


def staging_folder(phase_folder: Path) -> Path:
    """Where the checkpoint in the making lives; whatever lies here after a kill is rubbish."""
    return phase_folder / _STAGING


def seal(phase_folder: Path, step: int, *, elapsed_seconds: float, world_size: int, distributed_type: str) -> Path:
    """Publish the checkpoint in the staging folder: hash every file, write the manifest, rename."""
    written = staging_folder(phase_folder) / f"checkpoint-{step}"
    files = sorted(path for path in written.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_sha256_and_sync, files))
    manifest = Manifest(
        step=step,
        elapsed_seconds=elapsed_seconds,
        world_size=world_size,
        distributed_type=distributed_type,
        files={
            str(path.relative_to(written)): FileFacts(size=path.stat().st_size, sha256=digest)
            for path, digest in zip(files, hashes, strict=True)
        },
    )
    write_json(written / MANIFEST, asdict(manifest))
    published = phase_folder / f"checkpoint-{step}"
    shutil.rmtree(published, ignore_errors=True)  # an earlier one of this step that failed its check
    # After a power cut a name may be there without what it names, unless the disk was waited for; and the older
    # checkpoints are removed next.
    for folder in (*(path for path in written.rglob("*") if path.is_dir()), written):
        _sync_folder(folder)
    os.replace(written, published)
    _sync_folder(phase_folder)
    shutil.rmtree(staging_folder(phase_folder))
    return published


def checkpoints(phase_folder: Path) -> list[Path]:
    """The folders under a checkpoint's own name; `checkpoint-5.bak` is somebody's copy."""
    found = (path for path in phase_folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal())
    return [path for path in found if path.is_dir()]


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


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises OSError, or ValueError for what is no manifest."""
    values = json.loads((checkpoint / MANIFEST).read_bytes())
    _check_types(values, step=int, elapsed_seconds=(int, float), world_size=int, distributed_type=str, files=dict)
    if not values["files"]:
        raise ValueError("no files")
    for facts in values["files"].values():
        _check_types(facts, size=int, sha256=str)
    return Manifest(**values | {"files": {name: FileFacts(**facts) for name, facts in values["files"].items()}})


def _check_types(values: object, **types: type | tuple[type, ...]) -> None:
    if not isinstance(values, dict) or values.keys() != types.keys():
        raise ValueError(f"expected {', '.join(types)}")
    for key, kind in types.items():
        if not isinstance(values[key], kind):
            raise ValueError(f"{key} is {values[key]!r}")


def remove_old(phase_folder: Path, newest: int, keep: int) -> None:
    """Keep the `keep` newest checkpoints up to step `newest`, the one just saved. Later ones were refused, or training
    would have gone on from there: they must not count as kept."""
    by_step = sorted(checkpoints(phase_folder), key=step_of)
    earlier = [folder for folder in by_step if step_of(folder) <= newest]
    for folder in set(by_step) - set(earlier[-keep:]):
        shutil.rmtree(folder)


def fault_of(folder: Path) -> str | None:
    """What does not match the manifest, in words; None for a whole checkpoint."""
    try:
        manifest = read_manifest(folder)
        if folder.name != f"checkpoint-{manifest.step}":
            return f"{MANIFEST} is of step {manifest.step}"
        for name, expected in manifest.files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected.size:
                return f"{name} has {path.stat().st_size} bytes instead of {expected.size}"
        with ThreadPoolExecutor() as pool:
            digests = pool.map(_sha256, (folder / name for name in manifest.files))
            for (name, expected), digest in zip(manifest.files.items(), digests, strict=True):
                if digest != expected.sha256:
                    return f"{name} does not match its hash"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{MANIFEST} is damaged ({error})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_and_sync(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
