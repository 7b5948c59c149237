"""The benchmarks at toy size: all sides train the same, and what they say is what was measured. No time is asserted."""

import json
import statistics
import sys

import numpy as np
import pytest
import yaml
from transformers import LlavaConfig

from benchmarks import step_profile, training_speed
from benchmarks.planning_speed import measure
from benchmarks.samples import make_samples
from benchmarks.training_speed import BATCH, build_workload, ratios
from huatuo_vision.model.flops import ModelShape, step_flops
from huatuo_vision.recipe import TrainSpec
from tests.test_architecture import ROOT


@pytest.fixture
def tiny_model(monkeypatch):
    """The benchmark's model, two layers deep and 32 wide."""
    tiny = json.loads(json.dumps(training_speed.MODEL))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny["vision_encoder"]["config"] |= size | {"image_size": 56}
    tiny["language_model"]["config"] |= size | {"num_key_value_heads": 2, "vocab_size": 1024}
    tiny["language_model"]["tokenizer"] = {"vocab_size": 1024}
    monkeypatch.setattr(training_speed, "MODEL", tiny)
    monkeypatch.setattr(training_speed, "MEGA_BATCH", 4)
    # Half of the time would go into two more processes that import everything.
    monkeypatch.setattr(training_speed, "imports_command", lambda *_: [sys.executable, "-c", "pass"])


def run(out, *sides):
    size = ["--kinds", "mixture", "--steps", "3", "--warm-up", "1", "--alternations", "1", "--out", str(out)]
    training_speed.main(["--sides", *sides, *size])
    return json.loads((out / "results.json").read_text())["results"]["mixture"]


@pytest.mark.slow
def test_train_py_and_the_padded_trainer_learn_the_same(tiny_model, tmp_path, capsys):
    result = run(tmp_path / "out", "ours", "padded")
    assert [len(side["losses"]) for side in result["sides"].values()] == [3, 3]
    assert 0 < max(result["loss_difference"].values()) <= training_speed.TOLERANCE
    assert (tmp_path / "out" / "training_speed.png").stat().st_size > 10_000
    assert "ours is faster" in capsys.readouterr().out


@pytest.mark.slow
def test_grouped_batches_are_compared_with_ours_on_grouped_batches(tiny_model, tmp_path):
    result = run(tmp_path / "out", "ours", "grouped")
    assert result["sides"]["ours"]["losses"] != result["sides"]["grouped"]["losses"]
    assert result["loss_difference"]["grouped"] <= training_speed.TOLERANCE


@pytest.mark.slow
def test_the_profile_counts_every_matrix_product_of_the_steps(tiny_model, tmp_path):
    found, flops = step_profile.profile_steps("single", 2, tmp_path / "out")
    assert set(found) == {*step_profile.GROUPS, step_profile.OTHER} and min(found.values()) > 0

    workload = build_workload("single", tmp_path / "out" / "samples" / "rows.json", tmp_path / "same", steps=2, seed=0)
    rows = np.concatenate(workload.random)
    size = {"tokens": workload.tokens[rows].sum(), "targets": workload.targets[rows].sum(), "images": len(rows)}
    shape = ModelShape.from_config(LlavaConfig.from_pretrained(workload.model))
    train = TrainSpec(vision_encoder=False, projector={"lr": 1e-3}, language_model={"lr": 1e-3})
    assert flops == pytest.approx(step_flops(shape, train, **size, squared_lengths=0), rel=0.03)


def test_another_loss_is_not_called_equal():
    losses = {"ours": [9.0, 8.9], "padded": [9.0, 8.9002]}
    with pytest.raises(AssertionError, match="padded: a step's loss differs from ours by 2.0e-04"):
        training_speed.loss_differences(losses, {"ours": [9.0, 8.9], "padded": [9.0, 8.9]})


def test_every_side_sees_the_same_samples_and_grouping_removes_the_padding(tiny_model, tmp_path):
    rows = make_samples(tmp_path / "samples", "single", 400, seed=1, side=16)
    workload = build_workload("single", rows, tmp_path, steps=12, seed=1)
    assert sorted(sum(workload.random, [])) == sorted(sum(workload.grouped, []))
    assert len(set(sum(workload.random, []))) == 12 * BATCH
    assert workload.padding(workload.grouped) < 0.05 < 0.15 < workload.padding(workload.random)


def test_a_mixture_has_several_pictures_and_none(tmp_path):
    rows = json.loads(make_samples(tmp_path, "mixture", 200, seed=0, side=32).read_text())
    pictures = np.array([len(row["images"]) for row in rows])
    assert 0.12 < (pictures > 1).mean() < 0.32
    assert pictures.max() == 6 and (pictures == 0).any()
    answers = [len(row["messages"][1]["content"].split()) for row in rows]
    assert 30 <= min(answers) < 40 and 240 < max(answers) <= 250
    assert all(row["messages"][0]["content"].count("<image>") == n for row, n in zip(rows, pictures, strict=True))


def test_ratios_are_taken_turn_by_turn():
    result = {"sides": {"ours": {"speed": [2.0, 3.0, 8.0]}, "trl": {"speed": [1.0, 3.0, 2.0]}}}
    assert ratios(result, "trl", "speed") == [2.0, 1.0, 4.0]
    assert statistics.median(ratios(result, "trl", "speed")) == 2.0


def test_the_peers_have_the_versions_that_ours_has():
    def pins(path):
        lines = (ROOT / path).read_text().splitlines()
        return dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0])

    ours, peers = pins("requirements.txt"), pins("benchmarks/requirements-peers.txt")
    assert {name: ours[name] for name in peers if name in ours} == {name: peers[name] for name in peers if name in ours}
    assert set(peers) - set(ours) == {"trl"}


def test_a_plan_is_measured():
    found = measure(20_000, 128)
    assert found["steps"] == 20_000 // 128 and found["rows_per_step"] % 8 == 0
    assert 0 < found["imbalance"] < 0.02 and 0.5 < found["row_fill"] <= 1


def test_every_benchmark_has_its_line():
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "argparse" in path.read_text()} - {"peers"}
    assert len(scripts) >= 6
    assert all(f"| `python -m benchmarks.{name}" in readme for name in scripts)


def test_the_recipe_that_startup_dry_runs_is_there():
    from benchmarks.startup import COMMANDS

    recipes = {word for command in COMMANDS.values() for word in command if word.endswith(".yaml")}
    assert all(yaml.safe_load((ROOT / recipe).read_text())["name"] for recipe in recipes)
