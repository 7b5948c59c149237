"""A run: a folder in which a recipe's phases are trained one after the other, and continued after any stop.

<out>/recipe.yaml, run.json, log.jsonl, loss.png
<out>/base/               the composed model that the first phase starts from
<out>/prepare/            what became of every sample
<out>/<phase>/            checkpoint-N while it trains, model/ when it is finished
<out>/final/              the last phase's model (hard links)
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from filelock import FileLock, Timeout
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from huatuo_vision.inputs.encode import Encoder
from huatuo_vision.inputs.prepare import load_pool, prepare
from huatuo_vision.inputs.sources import Source, ensure_made, open_source
from huatuo_vision.launch import start_processes
from huatuo_vision.model.compose import compose_processor, compose_weights, resolve_revision
from huatuo_vision.model.flops import ModelShape
from huatuo_vision.model.merge import merge
from huatuo_vision.recipe import Recipe, differing_keys, load_recipe, save_recipe
from huatuo_vision.redaction import redact
from huatuo_vision.run_record import environment, now, read_json, read_record, write_json, write_text
from huatuo_vision.schema import UserError
from huatuo_vision.training.log import plot_losses, read_log, rewrite_log
from huatuo_vision.training.phase import discard_checkpoints, plan_phase, record_plan, run_phase
from huatuo_vision.training.stop import StopRequest
from huatuo_vision.training.trackers import prepare_trackers


def cache_folder() -> Path:
    """Conversions and checked shards that runs share; beside the Hub's cache, where HF_HOME points."""
    return Path(constants.HF_HOME) / "huatuo_vision"


def train(
    recipe: Recipe, out: Path, *, phases: Sequence[str], fresh: bool, overrides: Sequence[str], console: Console
) -> Path | None:
    """Train the named phases of a recipe in `out`. Returns `out/final` when the recipe's last phase is finished.

    Raises Stopped where SIGTERM or SIGUSR1 asked for it.
    """
    state = start_processes()
    prepare_trackers(recipe.report_to, console)
    with StopRequest() as stop, _only_run_in(out, state.is_main_process):
        if state.is_main_process:
            _open_folder(recipe, out, fresh, overrides, console)
            if recipe.reuse is not None:
                _take_over(recipe, out, Path(recipe.reuse), console)
            _compose_base(recipe, out, console)
            encoder = Encoder(out / "base")
            report = prepare(recipe, phases, encoder, cache_folder(), out, console)
            _record(out, data=_data_record(recipe, phases, report))
        _wait_for_main_process(state)

        sources = open_sources(recipe, phases)
        encoder = Encoder(out / "base")
        shape = ModelShape.from_config(AutoConfig.from_pretrained(out / "base"))
        for name in phases:
            folder = out / name
            if is_finished(folder):
                if state.is_main_process:
                    discard_checkpoints(folder)  # of a run that was killed right after it had finished the phase
                console.print(f"{name} is finished already: {folder / 'model'}", markup=False)
                continue
            start = _start_folder(recipe, name, out, state)
            pool = load_pool(recipe, name, out, recipe.seed)
            data = plan_phase(recipe, name, pool, sources, encoder, shape, state.num_processes)
            if state.is_main_process:
                record_plan(folder, data)
                save_recipe(recipe, folder / "recipe.yaml")
                shutil.rmtree(folder / "model", ignore_errors=True)  # written, but not recorded as finished
            state.wait_for_everyone()
            with stop.while_training():
                facts = run_phase(recipe, name, start, data, out, stop, console)
                if state.is_main_process:
                    _finish_phase(recipe, name, out, facts, state)
                _wait_for_main_process(state)

        last = list(recipe.phases)[-1]
        if not is_finished(out / last):
            return None
        if state.is_main_process:
            _link_folder(out / last / "model", out / "final")
            plot_losses(out / "log.jsonl", out / "loss.png", recipe.name)
            _print_summary(recipe, out, console)
        state.wait_for_everyone()
        return out / "final"


def open_sources(recipe: Recipe, phases: Sequence[str]) -> dict[str, Source]:
    return {name: open_source(name, recipe.data[name], cache_folder()) for name in sources_of(recipe, phases)}


def recipe_texts(recipe: Recipe) -> Iterator[str]:
    """All text under the recipe's `data`, for a tokenizer trained from it: the same for every phase that uses some."""
    for spec in recipe.data.values():
        ensure_made(spec, cache_folder())
    sources = [open_source(name, spec, cache_folder()) for name, spec in recipe.data.items()]
    return itertools.chain.from_iterable(source.texts() for source in sources)


def is_finished(phase_folder: Path) -> bool:
    return read_record(phase_folder / "model") is not None


def sources_of(recipe: Recipe, phases: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(entry.source for name in phases for entry in recipe.phases[name].data))


class _only_run_in:
    """Two runs in one folder would overwrite each other's checkpoints; the second refuses."""

    def __init__(self, out: Path, is_main_process: bool):
        self.out, self.is_main_process = out, is_main_process

    def __enter__(self) -> None:
        if self.is_main_process:
            out = self.out.resolve()  # one lock, whatever the folder is called
            if out.is_file():
                raise UserError(f"--out {self.out} is a file; name a folder")
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
                self.lock = FileLock(out.parent / f".{out.name}.lock", timeout=0)
                self.lock.acquire()
            except Timeout:
                raise UserError(f"another run is writing to {self.out}; wait for it, or choose another --out") from None
            except OSError as error:
                raise UserError(f"--out {self.out} cannot be written ({error.strerror}); choose another") from None

    def __exit__(self, *_: Any) -> None:
        if self.is_main_process:
            self.lock.release()


def _open_folder(recipe: Recipe, out: Path, fresh: bool, overrides: Sequence[str], console: Console) -> None:
    if fresh and out.exists():
        aside = next(p for n in itertools.count(1) if not (p := out.with_name(f"{out.name}.old-{n}")).exists())
        os.replace(out, aside)
        console.print(f"the earlier run was moved to {aside}; delete it when you no longer need it", markup=False)
    for name in recipe.phases:
        begun = out / name / "recipe.yaml"
        if not begun.exists():
            continue
        changed = differing_keys(load_recipe(begun), recipe, through_phase=name)
        if changed:
            raise UserError(
                f"{out} holds phase {name} of another recipe: {', '.join(changed)} differ; take the old values back, "
                "choose another --out, or start over with --fresh"
            )
    out.mkdir(parents=True, exist_ok=True)
    # Model folders that a kill left in the making: their names hold the process, so nobody would replace them.
    for half_written in (*out.glob(".*base.*.new"), *out.glob("*/.*.new")):
        shutil.rmtree(half_written)
    save_recipe(recipe, out / "recipe.yaml")
    if read_record(out) is None:
        write_json(
            out / "run.json", {"schema": 1, "recipe": recipe.name, "started": now(), "finished": None, "phases": {}}
        )
    _record(out, fingerprint=recipe.fingerprint(), overrides=[redact(o) for o in overrides], **environment())


def _record(out: Path, **facts: Any) -> dict[str, Any]:
    record = read_record(out) | facts
    write_json(out / "run.json", record)
    return record


def _take_over(recipe: Recipe, out: Path, donor: Path, console: Console) -> None:
    """Hard-link into `out` the phases that `donor` has finished and that the recipe would train just so."""
    for name in recipe.phases:
        if is_finished(out / name):
            continue
        record = read_record(donor / name / "model")
        if record is None or record["phases"][name]["fingerprint"] != recipe.fingerprint(name):
            break
        if not (out / "base").exists():
            _link_folder(donor / "base", out / "base")
        for kept in ("recipe.yaml", "data.json"):
            (out / name).mkdir(exist_ok=True)
            write_text(out / name / kept, (donor / name / kept).read_text())
        _copy_log(donor / "log.jsonl", out / "log.jsonl", name)
        _record(out, phases=read_record(out)["phases"] | {name: record["phases"][name]})
        discard_checkpoints(out / name)
        _link_folder(donor / name / "model", out / name / "model")  # last: it marks the phase as finished
        console.print(f"{name} is taken over from {donor}", markup=False)
    first = next(iter(recipe.phases))
    if is_finished(out / first):
        return
    begun = donor / first / "recipe.yaml"
    differing = differing_keys(load_recipe(begun), recipe, through_phase=first) if begun.exists() else []
    reason = f"differs in {', '.join(differing)}" if differing else "is not finished"
    raise UserError(f"reuse {donor}: phase {first} there {reason}, so there is nothing to take over; remove reuse")


def _copy_log(donor: Path, log: Path, phase: str) -> None:
    """The phase's lines of another run's log, in place of any that are there."""
    entries = [entry for entry in read_log(log) if entry["phase"] != phase]
    rewrite_log(log, entries + [entry for entry in read_log(donor) if entry["phase"] == phase])


def _data_record(recipe: Recipe, phases: Sequence[str], report: Any) -> dict[str, Any]:
    record = {}
    for name, source in open_sources(recipe, phases).items():
        checked = report.sources[name]
        record[name] = source.record(cache_folder()) | {"kept": checked["kept"], "dropped": checked["dropped"]}
    return record


def _compose_base(recipe: Recipe, out: Path, console: Console) -> None:
    base = out / "base"
    if not (base / "base.json").exists():
        console.print(f"writing the base model ({', '.join(recipe.model.pretrained)})")
        shutil.rmtree(base, ignore_errors=True)
        compose_processor(recipe.model, base, recipe_texts(recipe) if recipe.model.trains_tokenizer else None)
        compose_weights(recipe.model, base, recipe.seed)
        write_json(base / "base.json", {name: _origin(spec) for name, spec in recipe.model.pretrained.items()})
    _record(out, base_models=read_json(base / "base.json"))


def _origin(spec: Any) -> dict[str, Any]:
    if spec.id is not None:
        return {"id": spec.id, "revision": resolve_revision(spec)}
    return {"path": spec.path} if spec.path is not None else {"config": "random weights"}


def _start_folder(recipe: Recipe, name: str, out: Path, state: PartialState) -> Path:
    if state.is_main_process:
        start_of(recipe, name, out)  # may merge an adapter
    _wait_for_main_process(state)
    return start_of(recipe, name, out)


def start_of(recipe: Recipe, name: str, out: Path) -> Path:
    """The model folder that a phase starts from. Raises UserError where the phase before is not finished."""
    names = list(recipe.phases)
    position = names.index(name)
    if position == 0:
        return out / "base"
    previous = out / names[position - 1]
    if not is_finished(previous):
        raise UserError(f"phase {name} starts from phase {previous.name}, which is not finished; run it first")
    return plain_checkpoint(previous / "model")  # an adapter can't be trained on top of another


def plain_checkpoint(model: Path) -> Path:
    """The folder itself, or where it is an adapter, the merged checkpoint beside it, made on first use."""
    if not (model / "adapter_config.json").exists():
        return model
    merged = model.with_name("merged")
    if not merged.exists():
        merge(model, merged)
    return merged


def _finish_phase(recipe: Recipe, name: str, out: Path, facts: dict[str, Any], state: PartialState) -> None:
    hardware = {
        "device": _device_name(state),
        "world_size": state.num_processes,
        "distributed_type": state.distributed_type.value,
    }
    phases = read_record(out)["phases"] | {name: facts}
    record = _record(out, phases=phases, hardware=hardware, finished=now(), phase=name)
    model = out / name / "model"
    save_recipe(recipe, model / "recipe.yaml")
    write_json(model / "run.json", record)  # last: it marks the phase as finished
    discard_checkpoints(out / name)


def _device_name(state: PartialState) -> str:
    import platform

    import torch

    return torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else f"CPU ({platform.machine()})"


def _link_folder(folder: Path, target: Path) -> None:
    """The same files under another name, without the disk space of a copy; what is there is replaced."""
    fresh = target.with_name(f".{target.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folder, fresh, copy_function=_link_or_copy)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _wait_for_main_process(state: PartialState) -> None:
    """Preparation can take hours; the device's process group would call that a hang after minutes."""
    if state.num_processes == 1:
        return
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    dist.barrier(group=patient)


def _print_summary(recipe: Recipe, out: Path, console: Console) -> None:
    record = read_record(out)
    table = Table(title=f"{recipe.name}", title_justify="left")
    for column, justify in (
        ("phase", "left"),
        ("samples", "right"),
        ("steps", "right"),
        ("trained parameters", "left"),
    ):
        table.add_column(column, justify=justify)
    table.add_column("loss", justify="right")
    table.add_column("time", justify="right")
    for name, facts in record["phases"].items():
        parts = "\n".join(f"{part} {count:,}" for part, count in facts["trainable_parameters"].items() if count)
        minutes, seconds = divmod(round(facts["train_seconds"]), 60)
        loss = f"{facts['final_loss']:.4f}" if facts["final_loss"] is not None else ""
        table.add_row(
            name, f"{facts['samples']:,}", f"{facts['optimizer_steps']:,}", parts, loss, f"{minutes}:{seconds:02d}"
        )
    console.print(table)
    console.print(
        f"model        {out / 'final'}\nloss curves  {out / 'loss.png'}\nrun record   {out / 'run.json'}",
        highlight=False,
        markup=False,
    )
