"""One phase: from a model folder and prepared data to the next model folder. The only training function there is."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from transformers import AutoConfig, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from huatuo_vision.cli import Stopped
from huatuo_vision.inputs.encode import Encoder
from huatuo_vision.inputs.plan import StepPlan, plan_steps
from huatuo_vision.inputs.rows import PlannedRows
from huatuo_vision.model.attention import choose_attention
from huatuo_vision.model.flops import ModelShape, sample_cost, step_flops
from huatuo_vision.model.folder import load_model, save_model_folder
from huatuo_vision.model.llava import recompute, skip_unread_layers
from huatuo_vision.model.merge import save_adapter
from huatuo_vision.model.trainable import apply_training, fsdp_wrap_classes, parameter_counts, quantization_config
from huatuo_vision.run_record import read_json, write_json
from huatuo_vision.schema import UserError
from huatuo_vision.training.checkpoint import checkpoints, latest_checkpoint, read_manifest, step_of
from huatuo_vision.training.console import ProgressLog
from huatuo_vision.training.stop import StopRequest
from huatuo_vision.training.trainer import PhaseTrainer

if TYPE_CHECKING:
    from huatuo_vision.inputs.prepare import Pool
    from huatuo_vision.inputs.sources import Source
    from huatuo_vision.recipe import PhaseSpec, Recipe

_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class PhaseData:
    """A phase's prepared samples, and the plan of its steps."""

    pool: Pool
    plan: StepPlan
    sources: dict[str, Source]
    encoder: Encoder
    shape: ModelShape


def plan_phase(
    recipe: Recipe,
    name: str,
    pool: Pool,
    sources: dict[str, Source],
    encoder: Encoder,
    shape: ModelShape,
    world_size: int,
) -> PhaseData:
    phase = recipe.phases[name]
    plan = plan_steps(
        pool.tokens,
        pool.images,
        pool.targets,
        sample_cost(shape, phase.train, pool.tokens, pool.targets, pool.images),
        global_batch_size=phase.global_batch_size,
        world_size=world_size,
        epochs=phase.epochs,
        max_row_tokens=phase.max_row_tokens,
        max_row_images=phase.max_row_images,
        seed=recipe.seed,
    )
    return PhaseData(pool, plan, sources, encoder, shape)


def run_phase(
    recipe: Recipe, name: str, start: Path, data: PhaseData, out: Path, stop: StopRequest, console: Console
) -> dict[str, Any]:
    """Train one phase from the model folder `start` and write `out/<name>/model`; resumes from `out/<name>`.

    Returns what the run record says of the phase. Every process calls it. Raises Stopped, after a checkpoint, where
    one of them was asked to stop.
    """
    phase, folder = recipe.phases[name], out / name
    state = PartialState()
    arguments = training_arguments(recipe, name, folder, data.plan)  # before the model: ZeRO-3 shards while loading
    checkpoint = _agree_on_checkpoint(folder, state, arguments, console)
    model = load_start(recipe, name, start, arguments.device)
    counts = parameter_counts(model)

    def row_flops(stats: dict[str, int]) -> float:
        wanted = ("tokens", "squared_lengths", "targets", "images")
        return step_flops(data.shape, phase.train, **{key: stats[key] for key in wanted})

    trainer = PhaseTrainer(
        phase,
        PlannedRows(data.plan, data.pool, data.sources, data.encoder),
        row_flops,
        stop,
        model=model,
        args=arguments,
    )
    progress = ProgressLog(out / "log.jsonl", name, console)
    progress.attach(trainer, resumed_step=step_of(checkpoint) if checkpoint else 0)
    if checkpoint is not None:
        trainer.elapsed_before = read_manifest(checkpoint).elapsed_seconds
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()  # or a terminal would stay without its cursor after an error
    if trainer.state.global_step < trainer.state.max_steps:
        place = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise Stopped(f"stopped: {name} is saved at {place}; the same command goes on from there")
    _export(trainer, start, folder / "model", phase)
    return {
        "fingerprint": recipe.fingerprint(name),
        "train": phase.train.model_dump(mode="json", exclude_none=True),
        "samples": len(data.plan.order),
        "dropped_last_step": data.plan.dropped_per_epoch * phase.epochs,
        "optimizer_steps": data.plan.steps,
        "global_batch_size": phase.global_batch_size,
        "accumulation": data.plan.accumulation,
        "epochs": phase.epochs,
        "supervised_tokens": int(data.plan.step_targets.sum()),
        "trainable_parameters": {part: trainable for part, (trainable, _) in counts.items()},
        "attention": model_attention(trainer.model),
        "final_loss": progress.last_loss,
        "mean_loss_since_start": result.training_loss,
        "train_seconds": round(trainer.elapsed_seconds, 1),
    }


def model_attention(model: torch.nn.Module) -> str:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.config.text_config._attn_implementation


def training_arguments(recipe: Recipe, name: str, folder: Path, plan: StepPlan) -> TrainingArguments:
    phase = recipe.phases[name]
    on_cuda = torch.cuda.is_available()
    deepspeed_on_cpu = not on_cuda and PartialState().distributed_type.value == "DEEPSPEED"
    if deepspeed_on_cpu and phase.precision == "bf16":
        raise UserError(f"DeepSpeed trains on the CPU in fp32 only; set phases.{name}.precision=fp32")
    return TrainingArguments(
        output_dir=str(folder),
        run_name=_run_name(recipe, name),
        project=recipe.name,
        report_to=list(recipe.report_to),
        per_device_train_batch_size=1,  # one row; the samples in it are the plan's business
        gradient_accumulation_steps=plan.accumulation,
        num_train_epochs=1,  # all epochs are one plan
        lr_scheduler_type=_SCHEDULERS[phase.schedule.name],
        warmup_steps=math.ceil(phase.schedule.warmup_ratio * plan.steps),
        max_grad_norm=phase.optimizer.max_grad_norm,
        bf16=phase.precision == "bf16",
        logging_steps=phase.log_every,
        logging_nan_inf_filter=False,  # it waits for the device at every row and hides what must stop the run
        save_strategy="steps",
        save_steps=phase.save_every,
        remove_unused_columns=False,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=on_cuda,
        # A blocking copy of the next rows would wait for all that the device still has to do.
        accelerator_config={"non_blocking": on_cuda},
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,  # the plan knows the step's supervised tokens
        disable_tqdm=True,
        seed=recipe.seed,
        use_cpu=not on_cuda and not deepspeed_on_cpu,
        ddp_backend="gloo" if deepspeed_on_cpu else None,  # as start_processes
    )


def _run_name(recipe: Recipe, phase: str) -> str:
    return f"{recipe.name}-{phase}"


def _agree_on_checkpoint(
    folder: Path, state: PartialState, arguments: TrainingArguments, console: Console
) -> Path | None:
    """The checkpoint to resume from, checked by the main process and the same on every process."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, []]
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        found = list(latest_checkpoint(folder))
        instead = f"{found[0].name} is used" if found[0] else "no other is left, so the phase begins anew"
        for sentence in found[1]:
            console.print(f"[yellow]{escape(sentence)}; {instead}[/yellow]", highlight=False)
    if state.num_processes > 1:
        broadcast_object_list(found)
    checkpoint = found[0]
    if checkpoint is None:
        return None
    manifest = read_manifest(checkpoint)
    world = (manifest.distributed_type, manifest.world_size)
    if "DEEPSPEED" in (world[0], state.distributed_type.value) and world != (
        state.distributed_type.value,
        state.num_processes,
    ):
        raise UserError(
            f"{checkpoint} was written by {world[1]} processes under {world[0]}; this is {state.num_processes} under "
            f"{state.distributed_type.value}; under DeepSpeed a run resumes on the same number of processes only"
        )
    console.print(f"resuming {folder.name} from {checkpoint}", markup=False)
    return checkpoint


def load_start(recipe: Recipe, name: str, start: Path, device: torch.device) -> torch.nn.Module:
    """The model that a phase trains, with the weights of the model folder `start`."""
    phase = recipe.phases[name]
    dtype = torch.bfloat16 if phase.precision == "bf16" else torch.float32
    _check_window(AutoConfig.from_pretrained(start), phase)
    choose_attention(phase.attention, device=device, precision=phase.precision)  # refused before minutes of loading
    model = load_model(start, dtype=dtype, packed=True, quantization_config=quantization_config(phase.train, dtype))
    torch.manual_seed(recipe.seed)  # an adapter's first weights are the same whatever this process did before
    return prepare_model(model, phase, device)


def prepare_model(model: torch.nn.Module, phase: PhaseSpec, device: torch.device) -> torch.nn.Module:
    """A loaded model ready to train as the phase says: attention, what trains, recomputation, compilation."""
    attention = choose_attention(phase.attention, device=device, precision=phase.precision)
    model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
    model.config.text_config.use_cache = False
    skip_unread_layers(model)
    model = apply_training(model, phase.train)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if phase.recompute != "none":
        recompute(
            base, every=1 if phase.recompute == "all" else phase.recompute, vision=bool(phase.train.vision_encoder)
        )
    if phase.compile:
        for layer in base.model.language_model.layers:
            layer.compile(dynamic=True)
    base._no_split_modules = fsdp_wrap_classes(base, phase.train)  # what accelerate's FSDP wraps
    return model


def _check_window(config: Any, phase: PhaseSpec) -> None:
    text = config.text_config
    window = text.to_dict().get("sliding_window") if text.to_dict().get("use_sliding_window", True) else None
    if window is not None and window < phase.max_sample_tokens:
        raise UserError(
            f"the language model attends to the last {window} tokens only, and max_sample_tokens is "
            f"{phase.max_sample_tokens}; lower max_sample_tokens to {window}"
        )


def _export(trainer: PhaseTrainer, start: Path, target: Path, phase: PhaseSpec) -> None:
    """The trained model's folder; its weights gathered from all processes, written by the main one."""
    # Under ZeRO-3 every model made until then is spread over all processes: the main one would wait for the others.
    unset_hf_deepspeed_config()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole, on the main process
    if trainer.args.should_save:
        save_trained(model, weights, start, target, phase)
    trainer.accelerator.wait_for_everyone()


def save_trained(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], start: Path, target: Path, phase: PhaseSpec
) -> None:
    """A trained model as a folder that stock transformers loads: an adapter where it has one, else all weights."""
    if isinstance(model, PeftModel):
        save_adapter(model, target, start, state_dict=weights)
    else:
        dtype = torch.bfloat16 if phase.precision == "bf16" else torch.float32
        save_model_folder(target, {name: w.to(dtype) for name, w in weights.items()}, model.config, start)


def discard_checkpoints(folder: Path) -> None:
    """A finished phase is its model folder; the optimizer states, several times its size, are not needed again."""
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)


def record_plan(folder: Path, data: PhaseData) -> None:
    """Write down which data the phase began with. Raises UserError where a resumed phase finds other data."""
    import hashlib

    digest = hashlib.sha256()
    for array in (data.pool.source, data.pool.row, data.pool.tokens, data.pool.targets, data.pool.images):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update("".join(data.pool.contents).encode())
    facts = {"samples": len(data.pool), "sha256": digest.hexdigest()}
    path = folder / "data.json"
    if path.exists():
        before = read_json(path)
        if before != facts:
            raise UserError(
                f"the data of phase {folder.name} changed since it began ({before['samples']:,} samples with digest "
                f"{before['sha256'][:8]} then, {facts['samples']:,} with {facts['sha256'][:8]} now); put the old data "
                "back, or start over with --fresh"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, facts)
