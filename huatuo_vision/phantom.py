"""The demonstration's synthetic pictures, made by the command `python -m data.phantom` and kept in a cache folder.

For training (adapter phantom) and evaluation (benchmark phantom) alike; the package never imports `data`.
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
    generator = sorted((REPOSITORY / "data" / "phantom").glob("*.py"))
    if not generator:
        raise UserError(f"the phantom data needs data/phantom, which is not in {REPOSITORY}; run from a checkout")
    version = hashlib.sha256(b"".join(file.read_bytes() for file in generator)).hexdigest()[:8]
    return cache_dir / f"phantom-{train}-{test}-{seed}-{version}"


def make_phantom(cache_dir: Path, *, train: int, test: int, seed: int) -> Path:
    """The folder of these arguments' set, made unless it is there. For one process of a run; runs may meet."""
    folder = phantom_folder(cache_dir, train=train, test=test, seed=seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    arguments = {"--out": folder, "--train": train, "--test": test, "--seed": seed}
    command = [sys.executable, "-m", "data.phantom", *(str(part) for pair in arguments.items() for part in pair)]
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        # The command checks a folder that is there, and has nothing to say of one that is whole.
        stdout = subprocess.DEVNULL if folder.exists() else None
        code = subprocess.run(command, cwd=REPOSITORY, check=False, stdout=stdout).returncode
    if code != 0:
        raise UserError(f"making the phantom data ended with exit code {code}; its message stands above")
    return folder
