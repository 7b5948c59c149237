"""Set files: what they refuse, and that the shipped ones load."""

from pathlib import Path

import pytest

from huatuo_vision.ablate.plan import make_plan
from huatuo_vision.ablate.set_file import load_set
from huatuo_vision.evaluation.benchmarks import BENCHMARKS
from huatuo_vision.schema import UserError
from tests.ablate.conftest import ROOT, SET, write_set

SHIPPED = sorted((ROOT / "recipes").rglob("ablations/*.yaml"))


def test_shipped_sets_load():
    assert len(SHIPPED) >= 2
    names = [load_set(path).spec.name for path in SHIPPED]
    assert len(set(names)) == len(names)


MINI = [path for path in SHIPPED if path.parent.parent.name == "mini"]


@pytest.mark.parametrize("path", MINI, ids=lambda path: path.stem)
def test_the_miniature_sets_are_large_enough_to_say_something(path: Path, tmp_path: Path):
    loaded = load_set(path)
    assert len(loaded.spec.seeds) >= 3
    assert sum(BENCHMARKS[name].expected_n for name in loaded.benchmarks) >= 1500
    assert "ynthetic" in loaded.spec.note
    assert loaded.spec.blind == "base"
    # What the rows share is trained once for each seed.
    plan = make_plan(loaded, tmp_path, [])
    for seed in loaded.spec.seeds:
        trained = [
            run.recipe.fingerprint("align")
            for run in plan.runs
            if run.seed == seed and "align" in run.recipe.phases and "align" not in run.shared
        ]
        assert trained and len(trained) == len(set(trained))


def test_the_miniature_rows_of_data_construction_differ_in_the_added_source_only():
    loaded = load_set(next(path for path in MINI if path.stem == "construction"))
    base = loaded.base.recipe
    added = {}
    for row in loaded.rows[1:]:
        assert row.recipe.ablates == ("phases.instruct.data",)
        common, addition = row.recipe.phases["instruct"].data
        assert (common,) == base.phases["instruct"].data
        added[addition.source] = row.recipe.data[addition.source]
    assert len({spec.model_copy(update={"config": None}) for spec in added.values()}) == 1  # the same pictures
    assert {spec.config for spec in added.values()} == {
        "native_caption",
        "llm_reformatted",
        "mllm_distill",
        "mllm_reformatted",
    }


REFUSED = [
    ({"base": "tyni"}, "base 'tyni' is no row; rows has: tiny, no alignment, longer"),
    ({"seeds": [0, 0]}, "a seed stands twice in seeds"),
    ({"seeds": []}, "seeds: got"),
    ({"rows": {"tiny": "tiny.yaml"}}, "rows: got"),
    ({"benchmark": ["phantom"]}, "unknown key 'benchmark'; did you mean 'benchmarks'?"),
    ({"benchmarks": None}, "benchmarks: is missing and has no default"),
    ({"benchmarks": ["phantoms"]}, "--benchmarks phantoms: no such benchmark"),
    ({"protocol": "huatuo"}, "protocol 'huatuo': no such protocol; expected one of default"),
    ({"blind": "some"}, "blind: got 'some'"),
    ({"launch": {"config": "no.yaml"}}, "launch.config no.yaml does not exist beside it"),
    ({"launch": {"job": 2}}, "launch: unknown key 'job'; did you mean 'jobs'?"),
    ({"rows": SET["rows"] | {"more": "more.yaml"}}, "more.yaml does not exist"),
    ({"rows": SET["rows"] | {"again": "tiny.yaml"}}, "both have the name 'tiny'"),
    ({"rows": {"tiny": "tiny.yaml", "x": {"recipe": "tiny.yaml", "papr": {}}}}, "unknown key 'papr'"),
]


@pytest.mark.parametrize(("changed", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_refusals_are_one_sentence(folder: Path, changed: dict, sentence: str):
    with pytest.raises(UserError) as caught:
        load_set(write_set(folder, **changed))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_that_differs_in_more_than_it_says_is_refused(folder: Path):
    (folder / "tiny-longer.yaml").write_text(
        "name: tiny-longer\nbase: tiny.yaml\nablates: [phases.instruct.epochs]\n"
        "phases: {instruct: {epochs: 2, global_batch_size: 4}}\n"
    )
    with pytest.raises(UserError, match=r"differs from its base in phases.instruct.global_batch_size"):
        load_set(write_set(folder))


def test_the_papers_numbers_come_from_the_recipe_or_the_set(folder: Path):
    text = (folder / "tiny.yaml").read_text()
    reproduces = "reproduces: {paper: arXiv 0, table: 6, row: none, targets: {slake: 59.4}}\n"
    (folder / "tiny.yaml").write_text(text + reproduces)
    rows = SET["rows"] | {"longer": {"recipe": "tiny-longer.yaml", "paper": {"slake": 60.0}}}
    loaded = load_set(write_set(folder, rows=rows))
    assert [row.paper for row in loaded.rows] == [{"slake": 59.4}, {}, {"slake": 60.0}]  # the base's row is the base's
