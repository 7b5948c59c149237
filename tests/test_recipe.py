"""A recipe says everything, and what it gets wrong is said in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from huatuo_vision.recipe import Recipe, differing_keys, load_recipe, save_recipe
from huatuo_vision.schema import UserError

ROOT = Path(__file__).parent.parent

SMALL = {
    "name": "small",
    "model": {
        "vision_encoder": {"config": {"model_type": "clip_vision_model"}},
        "language_model": {"config": {"model_type": "llama"}, "tokenizer": {"vocab_size": 512}},
    },
    "data": {
        "captions": {"adapter": "phantom", "config": "alignment", "train": 10},
        "questions": {"adapter": "phantom", "config": "instruction", "train": 10},
    },
    "phases": {
        "align": {"data": [{"source": "captions"}], "train": {"projector": {"lr": "1e-3"}}, "global_batch_size": 4},
        "instruct": {
            "data": [{"source": "questions"}],
            "train": {"projector": {"lr": 2.0e-5}, "language_model": {"lr": 2.0e-5}},
            "global_batch_size": 4,
        },
    },
}


def write(folder: Path, values: dict, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def small(tmp_path) -> Path:
    return write(tmp_path, SMALL)


RECIPES = ROOT / "recipes"
# Sets of ablations, which lie there too, name recipes and are none.
SHIPPED = [
    path
    for path in sorted(RECIPES.rglob("*.yaml"))
    if path.parent.name != "accelerate" and yaml.safe_load(path.read_text()).keys() & {"model", "ablates"}
]
PAPER = [path for path in SHIPPED if path.is_relative_to(RECIPES / "paper")]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(RECIPES)) for path in paths]


def test_recipes_are_shipped():
    assert len(SHIPPED) >= 33
    assert len(PAPER) >= 26
    recipes = [load_recipe(path) for path in SHIPPED]
    assert len({recipe.name for recipe in recipes}) == len(recipes), "runs/NAME would be shared"


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_every_shipped_recipe_resolves(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.phases
    save_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml").fingerprint() == recipe.fingerprint()
    if path.parent.name != "mini":
        command = next(line for line in path.read_text().splitlines() if "--recipe" in line)
        assert f"--recipe {path.relative_to(ROOT)}" in command
    if recipe.launch is not None:
        assert (RECIPES / "accelerate" / f"{recipe.launch.config}.yaml").is_file()


MEMBERS = [path for path in SHIPPED if yaml.safe_load(path.read_text()).get("base")]
# What says which experiment it is, not what is learnt.
FREE = {"name", "base", "ablates", "reproduces", "hub", "reuse"}


def flat(values: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    pairs = (flat(value, f"{prefix}.{key}" if prefix else key) for key, value in values.items())
    return {key: value for found in pairs for key, value in found.items()}


@pytest.mark.parametrize("path", MEMBERS, ids=names(MEMBERS))
def test_an_ablation_differs_in_what_it_names_and_in_nothing_else(path):
    values = yaml.safe_load(path.read_text())
    recipe, base = load_recipe(path), load_recipe(path.parent / values["base"])
    left, right = (flat({k: v for k, v in r.model_dump(mode="json").items() if k not in FREE}) for r in (recipe, base))
    differs = {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)}
    ablates = set(recipe.ablates)
    assert differs and ablates
    within = {named: {key for key in differs if key == named or key.startswith(f"{named}.")} for named in ablates}
    assert set().union(*within.values()) == differs, "differs in a key that ablates does not name"
    assert all(within.values()), f"ablates names what does not differ: {[k for k, v in within.items() if not v]}"
    written = {key for key in flat({k: v for k, v in values.items() if k not in FREE})}
    idle = {key for key in written if not any(key == d or d.startswith(f"{key}.") for d in differs)}
    assert not idle, f"repeats the base's value: {sorted(idle)}"


@pytest.mark.parametrize("path", PAPER, ids=names(PAPER))
def test_what_a_recipe_reproduces_is_what_was_published(path):
    from huatuo_vision.evaluation.published import PUBLISHED

    recipe = load_recipe(path)
    if recipe.name.startswith("stage1-projector"):
        assert recipe.reproduces is None, "the paper has one row for both readings"
        return
    for benchmark, target in recipe.reproduces.targets.items():
        assert benchmark in PUBLISHED, benchmark
        published = {p.model: p.value for p in PUBLISHED[benchmark]}
        if recipe.reproduces.table in (2, "README"):
            assert published[recipe.reproduces.row] == pytest.approx(target / 100), (benchmark, target)


def test_the_readmes_table_has_every_recipe_and_its_numbers():
    lines = (RECIPES / "README.md").read_text().splitlines()
    for path in (path for path in SHIPPED if path.parent.name != "mini"):
        recipe, place = load_recipe(path), path.relative_to(RECIPES)
        found = [line for line in lines if line.startswith(f"| [{recipe.name}]({place}) |") and "`train " in line]
        assert len(found) == 1, place
        cells = [cell.strip() for cell in found[0].split("|")[1:-1]]
        targets = recipe.reproduces.targets if recipe.reproduces else {}
        assert [float(text.split()[-1]) for text in cells[2].split(", ") if text] == list(targets.values()), place
        config = recipe.launch.config if recipe.launch else "cpu"
        assert cells[4].removeprefix("`train ").rstrip("`").split()[:2] == [config, str(place.with_suffix(""))]


REFUSED = [
    ("phases.align.epoch=2", "phases.align: unknown key 'epoch'; did you mean 'epochs'?"),
    ("phases.aling.epochs=2", "unknown phase; expected one of text, align, instruct, anneal, did you mean 'align'?"),
    ("modle.x=1", "unknown key 'modle'; did you mean 'model'?"),
    ("phases.align.schedule.warmup=1", "phases.align.schedule: unknown key 'warmup'; did you mean 'warmup_ratio'?"),
    ("phases.align.data.0.sorce=x", "phases.align.data.0: unknown key 'sorce'; did you mean 'source'?"),
    (
        "phases.instruct.train.language_model.lora={rank: 2}",
        "language_model.lora: unknown key 'rank'; valid keys: r, alpha",
    ),
    ("phases.align.epochs=two", "phases.align.epochs: got 'two' (str); input should be a valid integer"),
    ("phases.align.epochs=0", "phases.align.epochs: got 0 (int); input should be greater than 0"),
    ("phases.align.train.projector=true", "phases.align.train.projector: true does not say how to train this part"),
    ("phases.align.recompute=some", "phases.align.recompute: got 'some'; expected none, all, or a number n"),
    (
        "phases.align.schedule.name=cos",
        "phases.align.schedule.name: got 'cos' (str); input should be 'cosine', 'linear'",
    ),
    ("data.captions.adapter=coco", "data.captions.adapter: got 'coco' (str); input should be 'pubmedvision'"),
    ("phases.align.max_row_tokens=100", "max_sample_tokens 4096 is above max_row_tokens 100"),
    ("phases.align.train={}", "every part is frozen"),
    ("phases.align.train.projector=false", "every part is frozen"),
    ("phases.instruct.train={language_model: {lr: 1, lora: {}}}", "lora trains the projector in full"),
    ("phases.align.data=[{source: captionz}]", "names the source 'captionz'; data has: captions, questions"),
    ("phases.align.data=[{source: captions, weight: 1}, {source: questions}]", "a weight beside rows says nothing"),
    ("phases.align.data=[{source: captions, weight: 1, rows: 1}]", "give rows or weight, not both"),
    ("phases.align.data=[{source: captions}, {source: captions}]", "a source stands twice"),
    ("model.language_model.tokenizer=null", "has no tokenizer"),
    ("model.vision_encoder.revision=main", "model.vision_encoder: revision is of a Hub id; remove it, or give id"),
    ("model.feature_layer=0", "model.feature_layer: 0 is the patch embedding"),
    ("model.vision_encoder.path=x", "give exactly one of id, path, config; got path and config"),
    ("data.captions.path=x", "adapter phantom makes its own data; remove path"),
    ("data.captions.train=null", "adapter phantom needs train"),
    ("data.captions={adapter: llava}", "give exactly one of path, hub_id; got none of them"),
    ("data.captions={adapter: pubmedvision, path: x}", "adapter pubmedvision needs config"),
    ("data.captions={adapter: llava, path: x, config: chinese}", "belong to adapter pubmedvision"),
    ("data.captions={adapter: captions, path: x, seed: 1}", "seed belong to adapter phantom"),
    ("model.llava={path: x}", "model: vision_encoder, language_model come with the llava checkpoint"),
    ("model={llava: {path: x}, feature_layer: -1}", "model: feature_layer come with the llava checkpoint"),
    ("model={language_model: {path: x}}", "model: vision_encoder missing; give vision_encoder and language_model"),
    ("model={llava: {}}", "model.llava: give exactly one of id, path; got none of them"),
    ("launch={config: single, processes: 2}", "launch: config single is one process, and processes is 2"),
    ("hub.push=final", "push: final needs a repo_id and a license"),
    ("hub.repo_id=me/org/x", "hub: repo_id 'me/org/x' is no repository on the Hub; expected ORG/NAME"),
    ("hub.repo_id=https://me:pass@host/x", "hub.repo_id holds a key or a password; take it out"),
    ("data.captions.columns.id=hf_abcdefghijklmnopqrstuvwxyz", "data.captions.columns.id holds a key or a password"),
    ("name=../x", "name: got '../x' (str); string should match"),
    ("phases.align.data.0.weight=.inf", "phases.align.data.0.weight: got inf (float); input should be a finite number"),
    ("data={../x: {adapter: phantom, config: alignment, train: 1}}", "string should match"),
    ("no-equals-sign", "expected key=value"),
    ("seed.x.y=1", "seed: got {'x': {'y': 1}} (dict)"),
    ("phases.align.data.7.source=x", "has no key '7'"),
]


@pytest.mark.parametrize(("override", "sentence"), REFUSED, ids=[override for override, _ in REFUSED])
def test_refusals_are_one_sentence_that_names_the_key(small, override, sentence):
    with pytest.raises(UserError) as caught:
        load_recipe(small, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty or not a mapping"),
        ("a: [", "is not a YAML file"),
        ("- 1", "is empty or not a mapping"),
        ("x: 1", "unknown"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, sentence):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(tmp_path / "absent.yaml")


def test_overrides_reach_defaults_and_lists(small):
    recipe = load_recipe(small, ["phases.align.optimizer.max_grad_norm=0.5", "phases.align.data.0.rows=3", "seed=7"])
    assert recipe.phases["align"].optimizer.max_grad_norm == 0.5
    assert recipe.phases["align"].data[0].rows == 3
    assert recipe.seed == 7


def test_scientific_notation_that_yaml_reads_as_text_is_a_number(small):
    assert load_recipe(small).phases["align"].train.projector.lr == 1e-3


def test_a_resolved_recipe_loads_to_the_same_recipe(small, tmp_path):
    recipe = load_recipe(small, ["hub.push=final", "hub.repo_id=a/b", "hub.license=mit"])
    save_recipe(recipe, tmp_path / "resolved.yaml")
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


def test_base_and_ablates(tmp_path):
    write(tmp_path, SMALL, "base.yaml")
    change = {"name": "b", "base": "base.yaml", "phases": {"align": {"epochs": 2}}}
    with pytest.raises(UserError, match=r"differs from its base in phases.align.epochs, which ablates does not name"):
        load_recipe(write(tmp_path, change))
    write(tmp_path, SMALL | {"reproduces": {"paper": "p", "table": 1, "row": "r", "targets": {}}}, "base.yaml")
    recipe = load_recipe(write(tmp_path, change | {"ablates": ["phases.align.epochs"]}))
    assert recipe.reproduces is None, "that row is the base's"
    assert recipe.phases["align"].epochs == 2
    assert recipe.phases["instruct"] == load_recipe(tmp_path / "base.yaml").phases["instruct"]
    write(tmp_path, change | {"ablates": ["phases.align.epochs"]}, "middle.yaml")
    with pytest.raises(UserError, match="one level deep"):
        load_recipe(write(tmp_path, {"name": "c", "base": "middle.yaml"}))


def test_fingerprint_is_of_what_is_learnt(small):
    recipe = load_recipe(small)
    for operational in ("name=other", "workers=0", "phases.align.max_row_tokens=9000", "phases.align.recompute=all"):
        assert load_recipe(small, [operational]).fingerprint() == recipe.fingerprint(), operational
    for learnt in ("seed=1", "phases.align.epochs=2", "model.feature_layer=-1", "data.captions.train=11"):
        assert load_recipe(small, [learnt]).fingerprint() != recipe.fingerprint(), learnt
    later = load_recipe(small, ["phases.instruct.epochs=2"])
    assert later.fingerprint("align") == recipe.fingerprint("align")
    assert differing_keys(later, recipe) == ["phases.instruct.epochs"]


def test_a_tokenizer_trained_on_the_data_belongs_to_what_every_phase_learns(small):
    """Its tokens come from all that `data` lists, so the list counts, and which phase uses what of it does not."""
    recipe = load_recipe(small)
    other_mix = load_recipe(small, ["phases.instruct.data=[{source: captions}]"])
    assert other_mix.fingerprint("align") == recipe.fingerprint("align")
    more = "data.more={adapter: phantom, config: mllm_distill, train: 10}"
    assert load_recipe(small, [more]).fingerprint("align") != recipe.fingerprint("align")
    fixed = "model.language_model.tokenizer={id: some/tokenizer}"
    assert load_recipe(small, [fixed, more]).fingerprint("align") == load_recipe(small, [fixed]).fingerprint("align")


def test_null_takes_away_what_the_base_has(tmp_path):
    write(tmp_path, SMALL)
    row = {"name": "row", "base": "recipe.yaml", "ablates": ["phases.align"], "phases": {"align": None}}
    assert list(load_recipe(write(tmp_path, row, "row.yaml")).phases) == ["instruct"]
    undeclared = write(tmp_path, row | {"ablates": []}, "undeclared.yaml")
    with pytest.raises(UserError, match="differs from its base in phases.align.*, which ablates does not name"):
        load_recipe(undeclared)


def test_where_things_come_from_is_not_what_is_learnt(small, tmp_path):
    llava = ["model={llava: {path: x}}", "data.captions={adapter: captions, path: x}"]
    recipe = load_recipe(small, llava)
    for same in ("model.llava.made_by=r.yaml", "data.captions.expected_rows=5", "launch={config: ddp, processes: 8}"):
        assert load_recipe(small, [*llava, same]).fingerprint() == recipe.fingerprint(), same
    assert load_recipe(small, [*llava, "model.llava.path=y"]).fingerprint() != recipe.fingerprint()
    save_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert "feature_layer" not in (tmp_path / "resolved.yaml").read_text()


def test_schema_is_printed_and_forbids_unknown_keys():
    done = subprocess.run(
        [sys.executable, "-m", "huatuo_vision.recipe", "--schema"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    schema = json.loads(done.stdout)
    assert schema == Recipe.model_json_schema()
    objects = [schema, *(d for d in schema["$defs"].values() if d["type"] == "object")]
    assert len(objects) > 15
    assert all(o["additionalProperties"] is False for o in objects)


@pytest.mark.parametrize("override", ["phases.align.epoch=2", "phases.align.epochs=two", "hub.push=final"])
def test_the_command_says_it_without_a_traceback(small, override):
    done = subprocess.run(
        [sys.executable, "train.py", "--recipe", str(small), "--set", override],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe")
    assert "Traceback" not in done.stderr


def test_help_answers_without_importing_torch():
    code = """
import sys, runpy
sys.argv = ['train.py', '--help']
try:
    runpy.run_path('train.py', run_name='__main__')
except SystemExit:
    pass
assert 'torch' not in sys.modules and 'transformers' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for flag in ("--recipe", "--phase", "--set", "--out", "--fresh", "--dry-run"):
        assert flag in done.stdout
