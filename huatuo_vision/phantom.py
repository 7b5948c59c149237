"""The demonstration's synthetic pictures, made by the command `python -m data.phantom` and kept in a cache folder.

For training (adapter phantom) and evaluation (benchmark phantom) alike; the package never imports `data`. Questions
about follow-up (benchmark phantom-follow-up) are made by `python -m data.phantom_cases` in the same way.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from huatuo_vision.schema import UserError

REPOSITORY = Path(__file__).resolve().parents[1]


def phantom_folder(cache_dir: Path, *, train: int, test: int, seed: int) -> Path:
    """Where the set of these arguments lies. Each version of the generator has folders of its own."""
    return cache_dir / f"phantom-{train}-{test}-{seed}-{_version()}"


def _version(*more: str) -> str:
    """8 hex digits over the code that makes the pictures."""
    generator = sorted((REPOSITORY / "data" / "phantom").glob("*.py"))
    if not generator:
        raise UserError(f"the phantom data needs data/phantom, which is not in {REPOSITORY}; run from a checkout")
    files = [*generator, *(REPOSITORY / "data" / name for name in more)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def make_phantom(cache_dir: Path, *, train: int, test: int, seed: int) -> Path:
    """The folder of these arguments' set, made unless it is there. For one process of a run; runs may meet."""
    folder = phantom_folder(cache_dir, train=train, test=test, seed=seed)
    return _make(folder, "data.phantom", train=train, test=test, seed=seed)


def make_follow_up(cache_dir: Path, *, test: int, seed: int) -> Path:
    """The folder of that many questions about follow-up, made unless it is there."""
    folder = cache_dir / f"phantom-follow-up-{test}-{seed}-{_version('phantom_cases.py')}"
    return _make(folder, "data.phantom_cases", cases=0, pictures=0, test=test, seed=seed) / "test"


def _make(folder: Path, module: str, **arguments: int) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    options = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", module, "--out", str(folder), *options]
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        # The command checks a folder that is there, and has nothing to say of one that is whole.
        stdout = subprocess.DEVNULL if folder.exists() else None
        code = subprocess.run(command, cwd=REPOSITORY, check=False, stdout=stdout).returncode
    if code != 0:
        raise UserError(f"making the phantom data ended with exit code {code}; its message stands above")
    return folder
