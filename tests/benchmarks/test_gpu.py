"""The benchmark for a GPU runs unattended: tried at toy size on the CPU, without packages that
its machine may lack."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from benchmarks.gpu import models
from huatuo_vision.recipe import (
    LanguageModelTraining,
    OptimizerSpec,
    PhaseSpec,
    ProjectorTraining,
    ScheduleSpec,
    TrainSpec,
)
from tests.training.conftest import ROOT

# Importing one of these ends the run.
ABSENT = ("datasets", "pydantic", "ijson", "bitsandbytes", "trl", "matplotlib")
WITHOUT = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent} and sys._getframe(1).f_code.co_name == "_find_spec":
            importer = sys._getframe(2)
            while "importlib" in importer.f_code.co_filename:
                importer = importer.f_back
            if "huatuo_vision" in importer.f_code.co_filename or "benchmarks" in importer.f_code.co_filename:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = {argv}
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def run(tmp_path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    code = WITHOUT.format(absent=set(ABSENT), argv=["gpu", "--toy", "--out", str(tmp_path), *arguments])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    results = tmp_path / "results.jsonl"
    return done, [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def test_a_case_of_every_kind_runs(tmp_path):
    wanted = ("matmul", "packed against", "LoRA, 2 x 4k", "data, Llama", "padded", "TRL")
    done, results = run(tmp_path, "--only", *wanted)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = {result["case"]: result for result in results}
    assert {result["status"] for result in results} == {"ok", "not run: trl is not installed"}
    assert found["Llama-3-8B, LoRA, 2 x 4k"]["tokens_per_s"] > 0
    assert 0 <= found["waiting for data, Llama-3-8B, phase 1, 4 workers"]["data_wait_share"] < 1
    # The same loss from the packed rows and from transformers' own forward over padded batches.
    assert found["ours against a padded batch, Llama-3-8B, phase 1"]["loss_difference"] < 1e-3


def test_what_fails_or_no_longer_fits_is_named_and_ends_no_other(tmp_path, monkeypatch):
    from benchmarks.gpu import __main__ as gpu
    from benchmarks.gpu import cases

    def broken(bench: cases.Bench) -> dict:
        raise RuntimeError("no such kernel")

    made = [
        cases.Case("broken", 1, broken),
        cases.Case("long", 10**6, broken),
        cases.Case("fine", 1, lambda bench: {"passed": True}),
        cases.Case("wrong", 1, lambda bench: {"passed": False}),
    ]
    monkeypatch.setattr(cases, "all_cases", lambda bench: made)
    monkeypatch.setattr(sys, "argv", ["gpu", "--toy", "--out", str(tmp_path)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main() == 1
    found = [json.loads(line)["status"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert found == ["failed: RuntimeError: no such kernel", "not run: time", "ok", "failed: not equal"]
    assert "no such kernel" in (tmp_path / "log.txt").read_text()


def test_the_stand_ins_have_the_recipes_fields():
    def fields(stand_in: type) -> dict:
        return {f.name: getattr(stand_in, f.name, None) for f in dataclasses.fields(stand_in)}

    assert fields(models.Optimizer) == {name: f.default for name, f in OptimizerSpec.model_fields.items()}
    assert set(fields(models.Schedule)) == set(ScheduleSpec.model_fields)
    assert set(fields(models.Part)) == set(ProjectorTraining.model_fields) | set(LanguageModelTraining.model_fields)
    assert set(fields(models.Phase)) <= set(PhaseSpec.model_fields)
    for stand_in in (models.PHASE_1, models.PHASE_2, models.LORA):
        values = {part: values or False for part, values in dataclasses.asdict(stand_in).items()}
        for part, given in values.items():
            values[part] = given and {key: value for key, value in given.items() if value is not None}
        true = TrainSpec.model_validate(values)
        assert true.parts == stand_in.parts
        assert (true.lora.model_dump() if true.lora else None) == (
            dataclasses.asdict(stand_in.lora) if stand_in.lora else None
        )


@pytest.mark.slow
def test_every_case_runs(tmp_path):
    done, results = run(tmp_path, "--minutes", "10")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {result["status"] for result in results} == {"ok", "not run: trl is not installed"}
