"""Plans without weights, data or the Hub: figures that people of the field would expect, and the README's table."""

from __future__ import annotations

from pathlib import Path

import pytest

from huatuo_vision.inputs import assumed
from huatuo_vision.model import backbones
from huatuo_vision.model.backbones import known_shape
from huatuo_vision.model.flops import ModelShape
from huatuo_vision.recipe import ModelSpec, Recipe, load_recipe
from huatuo_vision.schema import OutOfReach, UserError
from huatuo_vision.training.planning import (
    MARKERS,
    ROWS_OF_YOUR_OWN,
    PhasePlan,
    assumed_plan,
    plans_table,
    rows_of,
    shipped_recipes,
    with_table,
)

RECIPES = Path(__file__).parent.parent.parent / "recipes"
PLANNED = [path for path in shipped_recipes(RECIPES) if (launch := load_recipe(path).launch) and launch.config != "cpu"]
A100 = 312e12


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(RECIPES.parent)  # made_by is relative to it, as in the README's commands
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def plan(recipe: Recipe, phase: str, **rows: int) -> PhasePlan:
    sources = [entry.source for entry in recipe.phases[phase].data]
    rows = rows or {name: recipe.data[name].expected_rows or ROWS_OF_YOUR_OWN for name in sources}
    return assumed_plan(recipe, phase, known_shape(recipe.model), rows, recipe.launch.processes, recipe.launch.sharding)


def test_the_readmes_table_is_what_the_command_makes():
    readme = (RECIPES / "README.md").read_text()
    assert with_table(readme, plans_table(RECIPES), "recipes/README.md") == readme, (
        "stale: run python -m huatuo_vision.training.planning --write recipes/README.md"
    )


def test_the_table_goes_between_its_markers():
    assert with_table(f"a\n{MARKERS[0]}old{MARKERS[1]}\nb", "new\n", "f") == f"a\n{MARKERS[0]}\nnew\n{MARKERS[1]}\nb"
    with pytest.raises(UserError, match="f has no place for the table"):
        with_table("a", "new", "f")


@pytest.mark.parametrize(
    ("id_", "billions"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8.03),
        ("Qwen/Qwen2-7B", 7.62),
        ("Qwen/Qwen2.5-7B-Instruct", 7.62),
        ("Qwen/Qwen3-8B", 8.19),
        ("01-ai/Yi-1.5-34B", 34.4),
        ("lmsys/vicuna-7b-v1.5", 6.74),
    ],
)
def test_known_language_models_have_their_published_sizes(id_, billions):
    spec = {"vision_encoder": {"id": "openai/clip-vit-large-patch14-336"}, "language_model": {"id": id_}}
    shape = known_shape(ModelSpec.model_validate(spec))
    assert shape.weights["language_model"] == pytest.approx(billions * 1e9, rel=2e-3)
    assert shape.weights["vision_encoder"] == pytest.approx(0.304e9, rel=0.01)
    assert shape.image_tokens == 576


def test_siglip_and_whole_checkpoints():
    siglip = {
        "vision_encoder": {"id": "google/siglip2-so400m-patch14-384"},
        "language_model": {"id": "Qwen/Qwen3-8B"},
        "feature_strategy": "full",
    }
    assert known_shape(ModelSpec.model_validate(siglip)).image_tokens == 729
    llava = {"llava": {"id": "llava-hf/llava-1.5-7b-hf"}}
    assert sum(known_shape(ModelSpec.model_validate(llava)).weights.values()) == pytest.approx(7.06e9, rel=5e-3)


def test_an_unknown_backbone_and_a_checkpoint_that_nothing_makes_are_said():
    spec = {"vision_encoder": {"id": "some/encoder"}, "language_model": {"id": "Qwen/Qwen3-8B"}}
    with pytest.raises(OutOfReach, match="some/encoder is not among the known backbones"):
        known_shape(ModelSpec.model_validate(spec))
    with pytest.raises(OutOfReach, match="runs/nothing is not there; name the recipe"):
        known_shape(ModelSpec.model_validate({"llava": {"path": "runs/nothing"}}))


def test_a_block_behind_the_last_layer_is_refused_without_the_hub():
    recipe = load_recipe(RECIPES / "semihvision/two-encoders-8b.yaml", ["model.sva.in_llm=[0, 36]"])
    with pytest.raises(UserError, match="names the decoder layer 36, but the language model has 36; expected 0 to 35"):
        known_shape(recipe.model)


def test_llava_1_5_7b_is_what_was_published():
    """LLaVA's README: 3.5 h and 10 h on 8 A100. The plan's FLOPs over that time are a usual MFU of its day."""
    recipe = load_recipe(RECIPES / "paper/llava-1.5-7b.yaml")
    align, instruct = plan(recipe, "align"), plan(recipe, "instruct")
    assert (align.steps, instruct.steps) == (2180, 5197 - 2)  # 2,048 tokens are too few for some rows
    assert align.flops / (8 * 3.5 * 3600 * A100) == pytest.approx(0.29, abs=0.02)
    assert instruct.flops / (8 * 10 * 3600 * A100) == pytest.approx(0.235, abs=0.02)
    assert align.tokens / align.samples == pytest.approx(600, rel=0.01)
    assert instruct.tokens / instruct.samples == pytest.approx(800, rel=0.05)


def test_the_papers_steps():
    """Facts: (558K + 647K) / 256 = 4,707 and (658K + 647K) / 128 = 10,195; ours has the whole 665K file."""
    recipe = load_recipe(RECIPES / "paper/llava-v1.5-llama3-8b-pubmedvision.yaml")
    assert plan(recipe, "align").steps == pytest.approx(4707, rel=1e-3)
    assert plan(recipe, "instruct").steps == pytest.approx(10195 * (665 + 647) / (658 + 647), rel=1e-3)


@pytest.mark.parametrize("path", PLANNED, ids=[str(path.relative_to(RECIPES)) for path in PLANNED])
def test_every_plan_fits_its_gpu(path):
    recipe = load_recipe(path)
    for name in recipe.phases:
        cost = plan(recipe, name)
        # A tenth is left to the allocator, the CUDA context and the library's workspaces.
        assert cost.memory_gib < 0.9 * recipe.launch.gpu_gb, (name, cost.memory)
        phase = recipe.phases[name]
        assert 0 < cost.supervised_tokens < cost.tokens
        assert cost.left_over < phase.epochs * phase.global_batch_size
        assert 0.3 < cost.row_fill <= 1


def test_one_24_gb_gpu_does_not_hold_what_needs_80():
    lora = load_recipe(RECIPES / "qwen3-8b-pubmedvision-lora.yaml")
    qlora = load_recipe(RECIPES / "qwen3-8b-pubmedvision-qlora.yaml")
    assert plan(lora, "instruct").memory_gib > 24 > 0.9 * 24 > plan(qlora, "instruct").memory_gib
    full = load_recipe(RECIPES / "qwen3-8b-pubmedvision.yaml", ["launch={config: single, gpu_gb: 80}"])
    assert plan(full, "instruct").memory_gib > 80


def test_assumed_figures_scale_with_the_rows():
    recipe = load_recipe(RECIPES / "bring-your-own.yaml")
    small, large = plan(recipe, "instruct", pairs=6_400), plan(recipe, "instruct", pairs=64_000)
    assert large.steps == 10 * small.steps == 3 * 64_000 // 32
    assert large.flops == pytest.approx(10 * small.flops)
    assert large.memory == small.memory


def test_epochs_and_explicit_rows_are_counted():
    recipe = load_recipe(RECIPES / "paper/table6/mllm-60k.yaml")
    assert plan(recipe, "instruct").samples == pytest.approx(665_298 + 60_000, abs=128)
    with pytest.raises(UserError, match="rows asks for 60,000 samples but"):
        plan(recipe, "instruct", **{"llava-665k": 1000, "pubmedvision-alignment": 1000})


def test_rows_that_nobody_counted_are_said():
    recipe = load_recipe(RECIPES / "bring-your-own.yaml")
    with pytest.raises(OutOfReach, match=r"data.pairs cannot be read and has no expected_rows"):
        rows_of(recipe, "instruct", {})
    assert rows_of(recipe, "instruct", {"pairs": 3}) == {"pairs": 3}


def test_every_assumption_is_used_and_adds_up():
    used = set()
    for path in PLANNED:
        recipe = load_recipe(path)
        for name, phase in recipe.phases.items():
            for entry in phase.data:
                lengths = assumed._table()[assumed._key(recipe.data[entry.source], name, entry.source)]
                used |= {key for key, value in assumed._table().items() if value is lengths}
                assert sum(lengths["images"].values()) == pytest.approx(1)
    assert used == set(assumed._table())
    ids = {spec.id for path in PLANNED for spec in load_recipe(path).model.pretrained.values() if spec.id}
    assert ids <= {id_ for section in backbones._table().values() for id_ in section}


def test_the_dry_run_without_hub_or_data_says_what_is_assumed(launcher, tmp_path):
    done = launcher.run(tmp_path / "dry", "--dry-run", recipe=RECIPES / "paper/table7/slake-pubmedvision.yaml")
    text = " ".join(done.stdout.split())
    for expected in (
        "out of reach: data.slake: mdwiratathya/SLAKE-vqa-english",
        "train it first: accelerate launch train.py --recipe recipes/paper/llava-v1.5-llama3-8b-pubmedvision.yaml",
        "ASSUMED",
        "8 = 8 x 1",
        "fsdp on 8 process(es)",
        "GPU-hours",
    ):
        assert expected in text, expected
    assert "supervised tokens marked" not in text and not (tmp_path / "dry").exists()


def test_shapes_of_folders_are_read(tmp_path):
    from tests.model.tiny import tiny_config

    tiny_config().save_pretrained(tmp_path)
    assert known_shape(ModelSpec.model_validate({"llava": {"path": str(tmp_path)}})) == ModelShape.from_config(
        tiny_config()
    )
