"""transformers' Trainer over planned rows. Only what it gets wrong for packed LLaVA rows is overridden:

- rows come in plan order, and the loss is divided by the supervised tokens of the whole optimizer step, which
  the plan knows (no count, no gather);
- every part has its own learning rate;
- a step that is not finite never reaches the optimizer;
- processes that are asked to stop agree on the step after which they do;
- checkpoints are whole or absent, and resuming loads the weights (upstream loads none for LLaVA outside FSDP:
  it compares hub-layout names with module names and ignores the difference).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from huatuo_vision.cli import no_room
from huatuo_vision.inputs.rows import PlannedRows, only_row
from huatuo_vision.model.trainable import parameter_groups
from huatuo_vision.run_record import write_json
from huatuo_vision.schema import UserError
from huatuo_vision.training.checkpoint import checkpoints, remove_old, seal, staging_folder, step_of
from huatuo_vision.training.metrics import Window
from huatuo_vision.training.stop import StopRequest

if TYPE_CHECKING:
    from huatuo_vision.recipe import PhaseSpec

TRAINABLE_WEIGHTS = "trainable.safetensors"


class PhaseTrainer(Trainer):
    def __init__(
        self,
        phase: PhaseSpec,
        rows: PlannedRows,
        row_flops: Callable[[dict[str, int]], float],
        stop: StopRequest,
        **kwargs: Any,
    ):
        super().__init__(train_dataset=rows, data_collator=only_row, callbacks=[_SaveAndStop(self)], **kwargs)
        self.phase, self.rows, self.row_flops, self.stop = phase, rows, row_flops, stop
        self.stopping = False  # agreed on by all processes: the step in progress is the last
        self.folder = Path(self.args.output_dir)
        self.model_accepts_loss_kwargs = True  # the loss below is complete: upstream must not divide it again
        self.window = Window(tuple(rows.pool.sources), self.accelerator)
        self.elapsed_before = 0.0  # seconds of this phase before the checkpoint that was resumed
        self._started = time.monotonic()
        self._saving = False
        self._step_loss = torch.zeros((), device=self.args.device)

    @property
    def elapsed_seconds(self) -> float:
        return self.elapsed_before + time.monotonic() - self._started

    # ---- data and loss ----

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.rows)  # the plan has shuffled already

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        started = time.perf_counter()
        batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.window.add_wait(time.perf_counter() - started)
        return batch

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int:
        return batch_samples[0]["stats"]["step_targets"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        inputs = dict(inputs)
        stats, sources = inputs.pop("stats"), inputs.pop("target_sources")
        losses = model(**inputs)  # (G,) summed
        self.window.add_row(losses, sources, inputs["target_counts"], stats)
        # Gradients are averaged over processes; the sum over them is what the step's loss is.
        loss = losses.sum() * (self.accelerator.num_processes / stats["step_targets"])
        self._step_loss += loss.detach()
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        flops = self.row_flops(inputs["stats"])
        self.window.add_flops(flops)
        return flops

    # ---- the optimizer step ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            spec = self.phase.optimizer
            groups = parameter_groups(model or self.model, self.phase.train, spec.weight_decay)
            if spec.name == "adamw_8bit":
                try:
                    import bitsandbytes
                except ImportError:
                    raise UserError(
                        "optimizer adamw_8bit needs bitsandbytes; pip install bitsandbytes, or name: adamw"
                    ) from None
                self.optimizer = bitsandbytes.optim.AdamW8bit(groups, betas=spec.betas, eps=spec.eps)
            else:
                fused = self.args.device.type in ("cpu", "cuda")
                self.optimizer = torch.optim.AdamW(groups, betas=spec.betas, eps=spec.eps, fused=fused)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | None:
        norm = super()._clip_grad_norm(model)
        self._learning_rates = {f"lr/{g['name'].split('/')[0]}": g["lr"] for g in self.optimizer.param_groups}
        checked = self._step_loss
        if norm is not None:
            # DeepSpeed's is a number: it has stepped within the backward, unless its norm was not finite.
            whole = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
            checked = torch.stack([checked, whole.detach().to(checked)])
        not_finite, self.stopping = self._any_process(~torch.isfinite(checked).all(), self.stop.asked)
        if not_finite:
            self._stop_non_finite(checked)
        self._step_loss = torch.zeros_like(self._step_loss)
        return norm

    def _any_process(self, not_finite: torch.Tensor, asked: bool) -> list[bool]:
        """Whether either holds on any process. The one wait for the device in a step; both ride on it."""
        both = torch.stack([not_finite.float(), torch.full_like(not_finite, asked, dtype=torch.float32)])
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
        return [value > 0 for value in both.tolist()]

    def _stop_non_finite(self, values: torch.Tensor) -> None:
        ids = self.rows.pool.ids(self.rows.plan.step(self.state.global_step))
        step = self.state.global_step + 1  # as the log counts them
        listing = self.folder / f"non-finite-step-{step}.json"
        loss, *norm = values.flatten().tolist()
        if self.args.should_save:
            write_json(
                listing, {"step": step, "loss": loss, "gradient_norm": norm[0] if norm else None, "samples": ids}
            )
        raise UserError(
            f"optimizer step {step} of {self.folder.name} is not finite (loss {loss}"
            + (f", gradient norm {norm[0]}" if norm else "")
            + f") and was not applied; its {len(ids)} samples are {', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''}"
            f" (all in {listing}); look at them, or lower the learning rate and start with --fresh"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.pop("learning_rate", None)
            logs |= self._learning_rates | self.window.close()
        super().log(logs, start_time)

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(staging_folder(self.folder) if self._saving else self.folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            shutil.rmtree(staging_folder(self.folder), ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._seal()
        except (Exception, CheckpointException) as error:  # the latter is torch's own for sharded files, no Exception
            if not no_room(error):
                raise
            raise UserError(self._no_room(error)) from None
        self._saving = False
        self.accelerator.wait_for_everyone()

    def _seal(self) -> None:
        step = self.state.global_step
        seal(
            self.folder,
            step,
            elapsed_seconds=self.elapsed_seconds,
            world_size=self.accelerator.num_processes,
            distributed_type=self.accelerator.distributed_type.value,
        )
        remove_old(self.folder, newest=step, keep=self.phase.keep_checkpoints)

    def _no_room(self, error: BaseException) -> str:
        free = shutil.disk_usage(self.folder).free
        shutil.rmtree(staging_folder(self.folder), ignore_errors=True)
        before = max(checkpoints(self.folder), key=step_of, default=None)
        goes_on = f"from {before.name}, which is whole" if before else "from its beginning"
        said = str(error).strip().splitlines()[-1]
        return (
            f"no room for checkpoint-{self.state.global_step} of {self.folder.name} in {self.folder} ({said}; "
            f"{free / 2**20:,.0f} MiB are free); make room and start the same command again: it goes on {goes_on}"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights that train, under module names. FSDP and DeepSpeed write their own beside the optimizer state."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not self.args.should_save:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(trainable_weights(self.model), Path(output_dir) / TRAINABLE_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_trainable(Path(resume_from_checkpoint), self.model)


def trainable_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trainable(checkpoint: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into the model. Raises UserError where they are others than those that train."""
    saved, current = safetensors.torch.load_file(checkpoint / TRAINABLE_WEIGHTS), trainable_weights(model)
    if saved.keys() != current.keys():
        difference = sorted(saved.keys() ^ current.keys())
        raise UserError(
            f"{checkpoint} holds other trainable weights than this phase has ({difference[0]} and "
            f"{len(difference) - 1} more differ); start with --fresh"
        )
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(saved[name])


class _SaveAndStop(TrainerCallback):
    """Ends training with a checkpoint after the step that the processes agreed on; the last step ends it anyway."""

    def __init__(self, trainer: PhaseTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stopping and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
