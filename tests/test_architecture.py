"""Imports run one way. Each rule with its reason; the scan reads every import statement, also inside functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Folder or module of huatuo_vision -> what of the package it may import.
LEAVES = {
    "schema",
    "redaction",
    "recipe",
    "run_record",
    "launch",
    "cli",
    "phantom",
    "html",
    "openai_endpoint",
    "caption_requests",
    "terms",
    "multi_encoder_processor",
}
ALLOWED = {
    "schema": set(),
    "recipe": {"schema", "redaction", "run_record"},  # its resolved copy is one of the files of a run
    "run_record": {"schema"},
    "launch": {"schema"},
    "redaction": set(),
    "cli": {"schema", "redaction"},
    "phantom": {"schema"},
    "html": set(),
    "openai_endpoint": {"schema"},
    "caption_requests": set(),
    "terms": {"schema"},
    "multi_encoder_processor": {"schema"},  # made with the model, read with the data
    "inputs": LEAVES,  # knows nothing of models: a data set can be prepared without one
    "model": LEAVES,  # knows nothing of data
    "training": LEAVES | {"inputs", "model"},
    "inference": LEAVES | {"inputs", "model"},
    "conversation": LEAVES | {"inputs", "model", "inference"},  # measures nothing
    "chat": LEAVES | {"model", "conversation"},
    "evaluation": LEAVES | {"inputs", "model", "inference"},  # training and evaluation do not know each other
    "ablate": LEAVES | {"evaluation"},  # starts train.py and eval.py as commands
    "hub": LEAVES,  # called by the entry scripts only
}
TORCH_FREE = (
    "evaluation/scorers.py",
    "evaluation/responses.py",
    "evaluation/rules.py",
    "evaluation/parsing.py",
    "evaluation/words.py",
    "evaluation/choices.py",
    "evaluation/open_answers.py",
    "evaluation/self_test.py",
    "evaluation/statistics.py",
    "evaluation/scores.py",
    "evaluation/compare.py",
    "evaluation/report.py",
    "evaluation/run.py",
    "evaluation/endpoint.py",
    "evaluation/judges.py",
    "evaluation/judge_client.py",
    "evaluation/rubric.py",
    "evaluation/concepts.py",
    "evaluation/reasoning.py",
    "evaluation/variants.py",
    "evaluation/protocols.py",
    "evaluation/rows.py",
    "model/convert.py",
    "model/official.py",
    "ablate/__main__.py",
    "ablate/set_file.py",
    "ablate/plan.py",
    "ablate/parts.py",
    "ablate/results.py",
    "ablate/report.py",
    "html.py",
    "openai_endpoint.py",
    "recipe.py",
    "schema.py",
    "launch.py",
    "cli.py",
    "chat.py",
    "phantom.py",
)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


MODULES = sorted((ROOT / "huatuo_vision").rglob("*.py"))


def test_there_is_something_to_check():
    assert len(MODULES) > 30


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "huatuo_vision")))
def test_imports_run_one_way(path):
    room = path.relative_to(ROOT / "huatuo_vision").parts[0].removesuffix(".py")
    for name in imports(path):
        assert name.split(".")[0] not in ("data", "tests"), f"{path.name} imports {name}; the package imports neither"
        if name.startswith("huatuo_vision.") and room != "__init__":
            other = name.split(".")[1]
            assert other == room or other in ALLOWED[room], f"{room} may not import {other} ({path.name}: {name})"


@pytest.mark.parametrize("path", sorted((ROOT / "data").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_data_knows_the_contract_only(path):
    allowed = ("schema", "redaction", "hub", "html", "cli", "openai_endpoint", "caption_requests", "terms")
    # Pixels are decoded one way everywhere; the evaluation's rows are what training data must not hold.
    allowed += ("inputs.images", "evaluation.benchmarks")
    allowed += ("inputs.sources",)  # training data is read the one way that training reads it
    allowed += ("recipe",)  # its strict models: a wrong key is refused in the same words
    package = {name.removeprefix("huatuo_vision.") for name in imports(path) if name.startswith("huatuo_vision.")}
    assert all(any(name == room or name.startswith(f"{room}.") for room in allowed) for name in package), package


@pytest.mark.parametrize("name", TORCH_FREE)
def test_light_modules_import_no_torch(name):
    heavy = {"torch", "transformers", "datasets", "accelerate", "peft"}
    assert not heavy & {n.split(".")[0] for n in imports(ROOT / "huatuo_vision" / name, top_level_only=True)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_no_print(path):
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    assert "print" not in {ast.unparse(call.func) for call in calls}


def test_every_recipe_key_is_read_somewhere():
    """A key that nothing reads is a promise that nobody keeps."""
    from huatuo_vision import recipe

    text = "\n".join(path.read_text() for path in MODULES)
    models = [m for m in vars(recipe).values() if isinstance(m, type) and issubclass(m, recipe.Strict)]
    models.remove(recipe.Reproduces)  # read by whoever compares results
    known_elsewhere = {"ablates", "base", "reproduces"}  # read by the loader itself
    unread = [
        f"{m.__name__}.{field}"
        for m in models
        for field in m.model_fields
        if f".{field}" not in text and f'"{field}"' not in text and field not in known_elsewhere
    ]
    assert not unread


def test_no_path_of_this_machine_and_no_secret_in_the_repository():
    import re
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"/(?:root|home/[a-z]+|Users/[A-Za-z]+)/")
    offenders = [
        f for f in files if (ROOT / f).suffix in (".py", ".md", ".yaml") and pattern.search((ROOT / f).read_text())
    ]
    assert not [f for f in offenders if not f.startswith("tests/")]
