"""A set of tiny rows, and run folders as train.py and eval.py leave them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from huatuo_vision.ablate.plan import Plan, Run, evaluation_folder, make_plan
from huatuo_vision.ablate.set_file import load_set
from huatuo_vision.recipe import save_recipe
from tests.evaluation.results import Result, choice

ROOT = Path(__file__).parent.parent.parent
SET = {
    "name": "tiny-set",
    "title": "Tiny rows",
    "note": "Synthetic pictures.",
    "base": "tiny",
    "rows": {"tiny": "tiny.yaml", "no alignment": "tiny-no-alignment.yaml", "longer": "tiny-longer.yaml"},
    "seeds": [0, 1],
    "benchmarks": ["phantom"],
    "blind": "base",
}
ROWS = {
    "tiny-no-alignment": {"ablates": ["phases.align"], "phases": {"align": None}},
    "tiny-longer": {"ablates": ["phases.instruct.epochs"], "phases": {"instruct": {"epochs": 2}}},
}


@pytest.fixture(scope="session")
def hf_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The recipes of the set's rows, and where run folders go."""
    (tmp_path / "tiny.yaml").write_text((ROOT / "recipes" / "mini" / "tiny.yaml").read_text())
    for name, values in ROWS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "base": "tiny.yaml"} | values))
    return tmp_path


def write_set(folder: Path, **changed: object) -> Path:
    path = folder / "set.yaml"
    values = {key: value for key, value in (SET | changed).items() if value is not None}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def plan_of(folder: Path, **changed: object) -> Plan:
    return make_plan(load_set(write_set(folder, **changed)), folder / "runs", [])


def pretend_trained(run: Run, phases: tuple[str, ...] | None = None) -> None:
    """The files by which a run's phases count as finished; no weights."""
    wanted = tuple(run.recipe.phases) if phases is None else phases
    facts = {"samples": 96, "optimizer_steps": 12, "train_seconds": 2.0}
    record = {
        "commit": "0123456789",
        "hardware": {"device": "CPU"},
        "phases": {p: facts | {"fingerprint": run.recipe.fingerprint(p)} for p in wanted},
    }
    for phase in wanted:
        (run.folder / phase / "model").mkdir(parents=True, exist_ok=True)
        save_recipe(run.recipe, run.folder / phase / "recipe.yaml")
        (run.folder / phase / "model" / "run.json").write_text(json.dumps(record))
    if wanted == tuple(run.recipe.phases):
        (run.folder / "final").mkdir(exist_ok=True)


def pretend_evaluated(plan: Plan, run: Run, right: set[int], n: int, blind: bool = False) -> None:
    """Answers and scores of `n` questions of each benchmark, of which those in `right` are correct."""
    answers = [choice(name, number, number in right) for name in plan.loaded.benchmarks for number in range(n)]
    out = evaluation_folder(run, plan.loaded, blind)
    out.parent.mkdir(parents=True, exist_ok=True)
    Result(out, answers, model=str(run.folder / "final"), weights=run.name, blind=blind)
