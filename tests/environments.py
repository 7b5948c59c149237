"""Virtual environments with other versions of transformers, made once.

They stand in `HUATUO_ENVS`, or else in the repository's ignored `.venv-NAME/` folders, and borrow every package
that they do not replace from the running environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch


def python_with(name: str, packages: Sequence[str]) -> Path:
    """The interpreter of an environment in which these packages take precedence."""
    environment = Path(os.environ.get("HUATUO_ENVS", Path(__file__).parents[1])) / f".venv-{name}"
    python, complete = environment / "bin/python", environment / ".complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *packages], check=True)
        # Its own packages come first on sys.path, so only what it lacks is taken from here.
        purelib = sysconfig.get_path("purelib", vars={"base": str(environment)})
        (Path(purelib) / "running_environment.pth").write_text(str(Path(torch.__file__).parents[1]))
        complete.touch()
    return python
