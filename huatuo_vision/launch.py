"""The processes a command was launched as: what the launcher asked for, and a check that it came about."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True)
class LaunchedWorld:
    """Read from the environment that torchrun and accelerate set; needs no torch."""

    processes: int
    rank: int
    fsdp: bool
    deepspeed: bool


def launched_world() -> LaunchedWorld:
    return LaunchedWorld(
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        rank=int(os.environ.get("RANK", "0")),
        fsdp=_flag("ACCELERATE_USE_FSDP"),
        deepspeed=_flag("ACCELERATE_USE_DEEPSPEED"),
    )


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def start_processes(timeout: timedelta | None = None) -> PartialState:
    """Join the processes of this launch.

    `accelerate launch` can silently start several that each believe they are alone, or leave out the sharding that
    was asked for; raises UserError then. timeout: of a wait for the other processes; None is the backend's own.
    """
    import torch
    from accelerate import PartialState

    asked = launched_world()
    _end_with_launcher()
    on_cpu = not torch.cuda.is_available()
    if asked.deepspeed:  # its calls of torch.distributed are deprecated in torch 2.13, which would say so in every step
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # For DeepSpeed on the CPU accelerate names no backend, and would count one process. Told to use the CPU, it leaves
    # DeepSpeed out.
    deepspeed_on_cpu = asked.deepspeed and on_cpu and not _flag("ACCELERATE_USE_CPU")
    where = {"backend": "gloo"} if deepspeed_on_cpu else {"cpu": on_cpu}
    state = PartialState(**where, **({"timeout": timeout} if timeout else {}))
    if state.num_processes != asked.processes:
        raise UserError(
            f"{asked.processes} processes were launched but this one is in a world of {state.num_processes}, so each "
            "would work alone; on the CPU start with "
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked.processes}"
        )
    if asked.fsdp and state.device.type == "cpu":
        raise UserError(
            "FSDP was asked for, but accelerate shards on accelerators only; use recipes/accelerate/ddp.yaml on the CPU"
        )
    if asked.deepspeed and state.distributed_type.value != "DEEPSPEED":
        raise UserError(
            f"DeepSpeed was asked for, but accelerate started {state.distributed_type.value}; check the launch config, "
            "and set no ACCELERATE_USE_CPU"
        )
    return state


def _end_with_launcher() -> None:
    """SIGTERM to this process when torchrun or accelerate is killed: each process has a session of its own, and would
    train on as an orphan, with the run folder locked."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM))
