"""train.py from end to end on the tiny recipe."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from huatuo_vision.schema import UserError
from huatuo_vision.training.checkpoint import MANIFEST, latest_checkpoint, read_manifest
from huatuo_vision.training.export import export_checkpoint
from tests.training.conftest import largest_difference, log_lines, weights


def changed_parts(before, after) -> set[str]:
    a, b = weights(before), weights(after)
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_the_run_folder_is_what_the_design_says(finished):
    for name in ("recipe.yaml", "run.json", "log.jsonl", "loss.png", "prepare/report.json"):
        assert (finished / name).is_file(), name
    for folder in ("align/model", "instruct/model", "final"):
        names = {path.name for path in (finished / folder).iterdir()}
        assert {"model.safetensors", "config.json", "processor_config.json", "preprocessor_config.json"} <= names
        assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "recipe.yaml", "run.json"} <= names
        assert not [n for n in names if n.endswith((".bin", ".pt", ".pth"))]
    assert (finished / "final/model.safetensors").samefile(finished / "instruct/model/model.safetensors")
    assert not list(finished.glob("*/checkpoint-*"))


def test_the_model_loads_in_stock_transformers(finished):
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

    model, info = AutoModelForImageTextToText.from_pretrained(finished / "final", output_loading_info=True)
    assert type(model) is LlavaForConditionalGeneration
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(AutoProcessor.from_pretrained(finished / "final")).__name__ == "LlavaProcessor"
    assert "huatuo" not in (finished / "final/config.json").read_text()


def test_each_phase_changes_what_it_trains_and_nothing_else(finished):
    align = changed_parts(finished / "base", finished / "align/model")
    assert align and all(name.startswith("multi_modal_projector.") for name in align)
    instruct = changed_parts(finished / "align/model", finished / "instruct/model")
    everything = set(weights(finished / "base"))
    # Feature layer -2 of two layers: the last layer and the norm behind it are never read and stay as they were.
    unread = {n for n in everything if "vision_model.encoder.layers.1." in n or "post_layernorm" in n}
    assert instruct == everything - unread


def test_the_log_has_every_measure(finished):
    lines = log_lines(finished, ("phase", "step", "loss", "grad_norm", "lr/projector", "data_wait_share"))
    # Every 4 steps, and at the checkpoints.
    steps = (4, 5, 8, 10, 12)
    assert [line[:2] for line in lines] == [(phase, step) for phase in ("align", "instruct") for step in steps]
    assert all(value is not None for line in lines for value in line)
    last = json.loads((finished / "log.jsonl").read_text().splitlines()[-1])
    for key in (
        "lr/vision_encoder",
        "lr/language_model",
        "supervised_tokens_per_second",
        "samples_per_second",
        "peak_memory_gib",
    ):
        assert last[key] > 0, key


def test_the_record_counts_what_was_trained(finished):
    record = json.loads((finished / "run.json").read_text())
    report = json.loads((finished / "prepare/report.json").read_text())
    assert record["data"]["captions"]["kept"] == report["sources"]["captions"]["kept"]
    align = record["phases"]["align"]
    assert align["samples"] == align["optimizer_steps"] * 8 == 96
    assert align["trainable_parameters"]["language_model"] == 0
    assert record["base_models"]["language_model"] == {"config": "random weights"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["image_backend"] == "pil"


def test_the_same_command_again_trains_nothing(launcher, finished):
    before = (finished / "final/model.safetensors").stat().st_mtime_ns
    done = launcher.run(finished)
    assert "align is finished already" in done.stdout
    assert (finished / "final/model.safetensors").stat().st_mtime_ns == before


def test_two_processes_learn_what_one_learns(launcher, finished, tmp_path):
    launcher.run(tmp_path / "two", processes=2)
    assert largest_difference(finished / "final", tmp_path / "two/final") < 2e-5
    one, two = (log_lines(out, ("step", "loss")) for out in (finished, tmp_path / "two"))
    for (step, loss), (other_step, other_loss) in zip(one, two, strict=True):
        assert step == other_step
        assert loss == pytest.approx(other_loss, abs=1e-4)
    record = json.loads((tmp_path / "two/run.json").read_text())
    assert record["hardware"]["world_size"] == 2


def test_accumulation_changes_nothing(launcher, finished, tmp_path):
    small_rows = [f"phases.{phase}.max_row_tokens=512" for phase in ("align", "instruct")]
    launcher.run(tmp_path / "rows", *[a for s in small_rows for a in ("--set", s)])
    record = json.loads((tmp_path / "rows/run.json").read_text())
    whole = json.loads((finished / "run.json").read_text())
    assert record["phases"]["align"]["accumulation"] > whole["phases"]["align"]["accumulation"]
    assert largest_difference(finished / "final", tmp_path / "rows/final") < 2e-5


def test_killed_at_a_random_step_and_started_again_is_the_uninterrupted_run(launcher, finished, tmp_path):
    out = tmp_path / "killed"
    phase = random.choice(["align", "instruct"])
    launcher.run_and_kill(out, lambda: (out / phase / "checkpoint-5").exists())
    assert not (out / "final").exists()
    done = launcher.run(out)
    assert f"resuming {phase} from" in done.stdout or phase == "align"
    assert largest_difference(finished / "final", out / "final") == 0
    assert log_lines(out, ("phase", "step", "loss")) == log_lines(finished, ("phase", "step", "loss"))


def test_finished_phases_of_another_run_are_taken_over(launcher, finished, tmp_path):
    out = tmp_path / "longer"
    done = launcher.run(out, "--set", f"reuse={finished}", "--set", "phases.instruct.epochs=2")
    assert "align is taken over from" in done.stdout and "instruct is taken over" not in done.stdout
    for name in ("base/model.safetensors", "align/model/model.safetensors"):
        assert (out / name).samefile(finished / name)
    align = [line for line in log_lines(finished, ("phase", "step", "loss")) if line[0] == "align"]
    lines = log_lines(out, ("phase", "step", "loss"))
    assert lines[: len(align)] == align and len([line for line in lines if line[0] == "instruct"]) > len(align)
    record, donor = (json.loads((folder / "run.json").read_text())["phases"] for folder in (out, finished))
    assert record["align"] == donor["align"]
    assert record["instruct"]["optimizer_steps"] == 2 * donor["instruct"]["optimizer_steps"]
    # The same command again finds it all there, and the other run is as it was.
    before = (out / "final/model.safetensors").stat().st_mtime_ns
    launcher.run(out, "--set", f"reuse={finished}", "--set", "phases.instruct.epochs=2")
    assert (out / "final/model.safetensors").stat().st_mtime_ns == before


def test_a_run_that_trains_something_else_is_not_taken_over(launcher, finished, tmp_path):
    other = launcher.run(tmp_path / "a", "--set", f"reuse={finished}", "--set", "phases.align.epochs=2", code=2)
    assert "phase align there differs in phases.align.epochs" in " ".join(other.stderr.split())
    none = launcher.run(tmp_path / "b", "--set", f"reuse={tmp_path / 'nowhere'}", code=2)
    assert "phase align there is not finished" in " ".join(none.stderr.split())


def test_resumes_on_another_number_of_processes(launcher, finished, tmp_path):
    out = tmp_path / "moved"
    launcher.run_and_kill(out, lambda: (out / "instruct/checkpoint-5").exists())
    done = launcher.run(out, processes=2)
    assert "resuming instruct from" in done.stdout
    assert largest_difference(finished / "final", out / "final") < 2e-5


def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(launcher, finished, tmp_path):
    out = tmp_path / "damaged"
    often = ("--set", "phases.instruct.save_every=3")
    newest = out / "instruct/checkpoint-6"
    launcher.run_and_kill(out, newest.exists, *often)
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1] + b"x")
    # What other kills leave: a model half exported, and the checkpoint of a phase that had just been finished.
    left = [shutil.copytree(newest, out / name) for name in ("align/checkpoint-12", "instruct/.model.4711.new")]
    done = launcher.run(out, *often)
    said = " ".join(done.stdout.split())
    assert "checkpoint-6 is not used: optimizer.pt does not match its hash; checkpoint-3 is used" in said
    assert not any(folder.exists() for folder in left)
    assert largest_difference(finished / "final", out / "final") == 0


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint_and_the_same_command_goes_on(launcher, finished, tmp_path):
    out = tmp_path / "full"
    launcher.run_and_kill(out, lambda: (out / "instruct/checkpoint-5").exists())
    # The optimizer's state, the largest file, finds no room: its writer fails half way.
    limit = (out / "instruct/checkpoint-5/optimizer.pt").stat().st_size * 3 // 4
    done = launcher.run(out, code=2, largest_file=limit)
    sentence = " ".join(done.stderr.split())
    assert (
        "no room for checkpoint-10 of instruct" in sentence and "goes on from checkpoint-5, which is whole" in sentence
    )
    assert "Traceback" not in done.stderr
    assert [path.name for path in sorted((out / "instruct").glob("*check*"))] == ["checkpoint-5"]
    assert not (out / "instruct/.saving").exists(), "the half of it is taken away, and its room is free again"
    assert "resuming instruct from" in launcher.run(out).stdout
    assert largest_difference(finished / "final", out / "final") == 0


def test_a_step_that_is_not_finite_is_not_applied(launcher, tmp_path, monkeypatch):
    out = tmp_path / "nan"
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = launcher.run(out, "--set", "phases.align.train.projector.lr=1e38", code=2)
    sentence = " ".join(done.stderr.split())
    assert done.stdout.rindex("\x1b[?25h") > done.stdout.rindex("\x1b[?25l"), "the terminal has its cursor back"
    # The first step warms up at zero, the second runs away, the third shows it.
    assert "optimizer step 3 of align is not finite" in sentence
    assert "Alignment_VQA_" in sentence
    assert "Traceback" not in done.stderr
    listing = json.loads((out / "align/non-finite-step-3.json").read_text())
    assert len(listing["samples"]) == 8
    assert not (out / "align/model").exists()


def test_another_recipe_in_the_same_folder_is_refused_and_fresh_starts_over(launcher, finished, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    done = launcher.run(out, "--set", "phases.align.epochs=2", code=2)
    assert "holds phase align of another recipe: phases.align.epochs differ" in " ".join(done.stderr.split())
    done = launcher.run(out, "--set", "phases.align.epochs=2", "--fresh", "--phase", "align")
    assert (tmp_path / "again.old-1/final").exists()
    assert not (out / "final").exists()
    assert (out / "align/model/run.json").exists()


def test_a_second_run_in_the_same_folder_refuses(launcher, tmp_path):
    from filelock import FileLock

    out = tmp_path / "busy"
    with FileLock(tmp_path / ".busy.lock"):
        done = launcher.run(out, code=2)
    assert "another run is writing to" in done.stderr


def test_instruct_needs_align(launcher, tmp_path):
    done = launcher.run(tmp_path / "x", "--phase", "instruct", code=2)
    assert "phase instruct starts from phase align, which is not finished" in " ".join(done.stderr.split())


def test_dry_run_counts_and_trains_nothing(launcher, tmp_path):
    done = launcher.run(tmp_path / "dry", "--dry-run")
    text = " ".join(done.stdout.split())
    for expected in (
        "optimizer steps",
        "captions",
        "trained parameters",
        "GPU-hours",
        "memory per GPU",
        "supervised tokens marked",
    ):
        assert expected in text, expected
    assert "[16 image tokens]" in text
    assert not (tmp_path / "dry").exists()


def test_a_run_goes_on_from_a_llava_checkpoint(launcher, finished, tmp_path):
    out = tmp_path / "further"
    start = finished / "final"
    launcher.run(out, "--set", f"model={{llava: {{path: {start}}}}}", "--phase", "align")
    assert largest_difference(start, out / "base") == 0
    assert all(name.startswith("multi_modal_projector.") for name in changed_parts(start, out / "align/model"))
    assert json.loads((out / "run.json").read_text())["base_models"] == {"llava": {"path": str(start)}}


def test_lora_saves_adapter_and_projector_and_merges(launcher, finished, tmp_path):
    from huatuo_vision.model.merge import merge

    out = tmp_path / "lora"
    train = "phases.instruct.train={projector: {lr: 1e-3}, language_model: {lr: 1e-3, lora: {r: 4, alpha: 8}}}"
    launcher.run(out, "--set", train)
    final = weights(out / "final")
    assert any("lora_A" in name for name in final) and any("multi_modal_projector" in name for name in final)
    assert not (out / "final/model.safetensors").exists()
    merge(out / "final", tmp_path / "merged")
    changed = changed_parts(out / "align/model", tmp_path / "merged")
    assert {n.split(".")[0] for n in changed} == {"multi_modal_projector", "language_model"}
    assert not any("embed_tokens" in n or "lm_head" in n for n in changed)


def test_trackers_write_offline(launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    launcher.run(tmp_path / "tracked", "--phase", "align", "--set", "report_to=[trackio, wandb]")
    assert list((tmp_path / "trackio").glob("*.db"))
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_checkpoint_holds_exactly_what_trains_and_becomes_a_model_folder(launcher, tmp_path, monkeypatch):
    out = tmp_path / "ck"
    launcher.run_and_kill(out, lambda: (out / "align/checkpoint-5").exists())
    checkpoint, refused = latest_checkpoint(out / "align")
    assert not refused
    saved = safetensors.torch.load_file(checkpoint / "trainable.safetensors")
    assert {name.split(".")[1] for name in saved} == {"multi_modal_projector"}
    assert read_manifest(checkpoint).world_size == 1

    export_checkpoint(checkpoint, tmp_path / "exported")
    projector = {module: name for name in weights(tmp_path / "exported") if (module := f"model.{name}") in saved}
    assert projector.keys() == saved.keys()
    assert changed_parts(out / "base", tmp_path / "exported") == set(projector.values())
    exported = weights(tmp_path / "exported")
    assert all(torch.equal(exported[name], saved[module]) for module, name in projector.items())
    with pytest.raises(UserError, match="exists; name another folder"):
        export_checkpoint(checkpoint, tmp_path / "exported")
    shutil.copytree(out / "align", tmp_path / "lone/renamed")
    monkeypatch.chdir(tmp_path / "lone/renamed" / checkpoint.name)
    with pytest.raises(UserError, match="lies in no run's folder; expected RUN/PHASE/checkpoint-"):
        export_checkpoint(Path(), tmp_path / "another")
    (checkpoint / "trainable.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="no whole checkpoint: trainable.safetensors has 3 bytes"):
        export_checkpoint(checkpoint, tmp_path / "another")
    # As one of DeepSpeed's, whose weights lie in files of its own.
    (checkpoint / "trainable.safetensors").unlink()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["files"]["trainable.safetensors"]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="was written by DeepSpeed, which is not installed here; pip install"):
        export_checkpoint(checkpoint, tmp_path / "another")
