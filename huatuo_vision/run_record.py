"""The run record, `run.json`: everything a card or a reviewer may say about a run, written down as it happens."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huatuo_vision.schema import UserError

_REPOSITORY = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "huggingface_hub", "tokenizers", "pillow")
_OPTIONAL_PACKAGES = ("bitsandbytes", "flash-attn", "deepspeed")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """Versions and code revision of this process."""
    versions = {"python": platform.python_version()}
    for package in (*_PACKAGES, *_OPTIONAL_PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package in _PACKAGES:
                versions[package] = "not installed"
    commit = _git("rev-parse", "HEAD")
    return {
        "versions": versions,
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain")) if commit else None,
        # The PIL backend is pinned everywhere: another backend's resize moves the logits by 1e-2.
        "image_backend": "pil",
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_REPOSITORY), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / "run.json"
    return read_json(path) if path.exists() else None


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises UserError where the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged (no JSON); put a whole copy back, or start over with --fresh") from None


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write and rename, so that whoever reads, now or after a kill or a power cut, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
