"""What a recipe can turn on, through the real command: it runs, and what must not change the result does not."""

import json

import pytest
import torch

from tests.training.conftest import largest_difference, log_lines, weights

pytestmark = pytest.mark.slow


def both_phases(setting: str) -> list[str]:
    return [part for phase in ("align", "instruct") for part in ("--set", f"phases.{phase}.{setting}")]


@pytest.mark.parametrize(
    ("setting", "tolerance"), [("recompute=2", 1e-6), ("recompute=all", 1e-6), ("compile=true", 2e-5)]
)
def test_memory_and_speed_settings_change_nothing(launcher, finished, tmp_path, setting, tolerance):
    launcher.run(tmp_path / "run", *both_phases(setting))
    assert largest_difference(finished / "final", tmp_path / "run/final") < tolerance


def test_workers_change_nothing(launcher, finished, tmp_path):
    launcher.run(tmp_path / "run", "--set", "workers=2")
    assert largest_difference(finished / "final", tmp_path / "run/final") == 0


def test_bf16_keeps_fp32_masters_while_it_trains_and_saves_bf16(launcher, finished, tmp_path):
    out = tmp_path / "run"
    launcher.run(out, *both_phases("precision=bf16"))
    assert {w.dtype for w in weights(out / "final").values()} == {torch.bfloat16}
    full, half = (log_lines(folder, ("loss",))[-1][0] for folder in (finished, out))
    assert half == pytest.approx(full, abs=0.02)


def test_eight_bit_adamw_trains(launcher, finished, tmp_path):
    out = tmp_path / "run"
    launcher.run(out, *both_phases("optimizer.name=adamw_8bit"))
    full, eight = (log_lines(folder, ("loss",))[-1][0] for folder in (finished, out))
    assert eight == pytest.approx(full, abs=0.05)


def test_qlora_trains_and_merges_into_a_plain_checkpoint(launcher, tmp_path):
    from transformers import AutoModelForImageTextToText

    from huatuo_vision.model.merge import merge

    out = tmp_path / "run"
    lora = "{r: 4, alpha: 8, quantize: nf4}"
    train = f"phases.instruct.train={{projector: {{lr: 1e-3}}, language_model: {{lr: 1e-2, lora: {lora}}}}}"
    launcher.run(out, "--set", train, "--set", "phases.instruct.epochs=3")
    losses = [loss for phase, loss in log_lines(out, ("phase", "loss")) if phase == "instruct"]
    assert losses[-1] < losses[0] - 0.2
    trained = json.loads((out / "run.json").read_text())["phases"]["instruct"]["trainable_parameters"]
    assert 0 < trained["language_model"] < 20_000 and trained["vision_encoder"] == 0
    merge(out / "final", tmp_path / "merged")
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_lora_phase_after_a_lora_phase_starts_from_the_merged_model(launcher, tmp_path):
    out = tmp_path / "run"
    train = "{projector: {lr: 1e-3}, language_model: {lr: 1e-3, lora: {r: 4, alpha: 8}}}"
    launcher.run(out, *both_phases(f"train={train}"))
    assert (out / "align/merged/model.safetensors").is_file()
    assert json.loads((out / "final/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        (out / "align/merged").resolve()
    )
