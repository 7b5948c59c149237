"""What a person sees while a phase trains, and the log file that machines read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from huatuo_vision.launch import launched_world
from huatuo_vision.training.log import read_log, rewrite_log

_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("grad_norm", "grad norm {:.3f}"),
    ("supervised_tokens_per_second", "{:,.0f} supervised tokens/s"),
    ("images_per_second", "{:,.1f} images/s"),
    ("mfu", "MFU {:.1%}"),
    ("data_wait_share", "waiting for data {:.0%}"),
    ("peak_memory_gib", "{:.1f} GiB"),
)


def main_console() -> Console:
    """A console that only the main process speaks through, with the libraries' own chatter turned down."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers.trainer").setLevel(logging.WARNING)
    return Console(quiet=launched_world().rank != 0)


class ProgressLog(TrainerCallback):
    """One JSON line in `log.jsonl` and one console line per log event, and a progress bar; main process only."""

    def __init__(self, path: Path, phase: str, console: Console):
        self.path, self.phase, self.console = path, phase, console
        self.last_loss: float | None = None
        self._progress: Progress | None = None

    def attach(self, trainer: Any, resumed_step: int) -> None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)
        if trainer.args.should_save:
            self._forget_after(resumed_step)

    def _forget_after(self, step: int) -> None:
        """Drop this phase's lines past the checkpoint that is resumed, so that every step is logged once."""
        kept = [entry for entry in read_log(self.path) if entry["phase"] != self.phase or entry["step"] <= step]
        rewrite_log(self.path, kept)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._progress = Progress(
            TextColumn(f"[bold]{self.phase}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task(self.phase, total=state.max_steps, completed=state.global_step)
        self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)
        # A checkpoint closes the averages, so that a resumed run logs what an unbroken one does.
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:
            return
        self.last_loss = logs["loss"]
        if not state.is_world_process_zero:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"phase": self.phase, "step": state.global_step, **logs}) + "\n")
        shown = "  ".join(template.format(logs[key]) for key, template in _SHOWN if key in logs)
        self.console.print(
            f"{self.phase} step {state.global_step}/{state.max_steps}  {shown}", highlight=False, soft_wrap=True
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
