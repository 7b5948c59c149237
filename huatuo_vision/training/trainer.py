"""transformers' Trainer over planned rows. Only what it gets wrong for packed LLaVA rows is overridden:

- rows come in plan order, and the loss is divided by the supervised tokens of the whole optimizer step, which
  the plan knows (no count, no gather);
- every part has its own learning rate;
- a step that is not finite never reaches the optimizer;
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
from transformers import Trainer

from huatuo_vision.inputs.rows import PlannedRows, only_row
from huatuo_vision.model.trainable import parameter_groups
from huatuo_vision.run_record import write_json
from huatuo_vision.schema import UserError
from huatuo_vision.training.checkpoint import remove_old, seal, staging_folder
from huatuo_vision.training.metrics import Window

if TYPE_CHECKING:
    from huatuo_vision.recipe import PhaseSpec

TRAINABLE_WEIGHTS = "trainable.safetensors"


class PhaseTrainer(Trainer):
    def __init__(
        self, phase: PhaseSpec, rows: PlannedRows, row_flops: Callable[[dict[str, int]], float], **kwargs: Any
    ):
        super().__init__(train_dataset=rows, data_collator=only_row, **kwargs)
        self.phase, self.rows, self.row_flops = phase, rows, row_flops
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
        # The one wait for the device in a step. DeepSpeed keeps its norm until after the step.
        checked = self._step_loss if norm is None else torch.stack([self._step_loss, norm.detach().to(self._step_loss)])
        if not torch.isfinite(checked).all():
            self._stop_non_finite(checked)
        self._step_loss = torch.zeros_like(self._step_loss)
        return norm

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
        super()._save_checkpoint(model, trial)
        self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            facts = {
                "elapsed_seconds": self.elapsed_seconds,
                "world_size": self.accelerator.num_processes,
                "distributed_type": self.accelerator.distributed_type.value,
            }
            seal(self.folder, self.state.global_step, facts)
            remove_old(self.folder, self.phase.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights that train, under module names. FSDP and DeepSpeed write their own beside the optimizer state."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not self.args.should_save:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(self._trainable_weights(), Path(output_dir) / TRAINABLE_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = safetensors.torch.load_file(Path(resume_from_checkpoint) / TRAINABLE_WEIGHTS)
        current = self._trainable_weights()
        if saved.keys() != current.keys():
            difference = sorted(saved.keys() ^ current.keys())
            raise UserError(
                f"{resume_from_checkpoint} holds other trainable weights than this phase has ({difference[0]} and "
                f"{len(difference) - 1} more differ); start with --fresh"
            )
        with torch.no_grad():
            for name, parameter in current.items():
                parameter.copy_(saved[name])

    def _trainable_weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
