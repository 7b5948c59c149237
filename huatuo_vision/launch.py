"""What the launcher asked for, read from the environment that torchrun and accelerate set."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchedWorld:
    processes: int
    rank: int
    fsdp: bool
    deepspeed: bool


def launched_world() -> LaunchedWorld:
    def flag(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("1", "true", "yes")

    return LaunchedWorld(
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        rank=int(os.environ.get("RANK", "0")),
        fsdp=flag("ACCELERATE_USE_FSDP"),
        deepspeed=flag("ACCELERATE_USE_DEEPSPEED"),
    )
