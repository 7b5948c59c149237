"""Experiment trackers that a recipe names. Without credentials they write to disk instead of stopping the run."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Sequence

from rich.console import Console

from huatuo_vision.schema import UserError


def prepare_trackers(names: Sequence[str], console: Console) -> None:
    """Raises UserError where a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to names {name}, which is not installed; pip install {name}, or remove it")
    if "wandb" in names and "WANDB_MODE" not in os.environ and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
        console.print("wandb has no API key here, so the run is logged offline; send it later with wandb sync")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
