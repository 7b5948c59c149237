"""The paper's numbers as typed: what they average to, and where they may stand."""

import re

import pytest

from huatuo_vision.evaluation.benchmarks import BENCHMARKS, SETS
from huatuo_vision.evaluation.published import (
    BASE,
    HEADLINE,
    HUATUO_7B,
    MEANS,
    PUBLISHED,
    PUBMEDVISION,
    RELATED,
    RUBRIC_SCORES,
    cell,
    published_for,
)

# Rows behind each printed cell.
MODALITY_ROWS = (1991, 626, 4040, 570, 796, 728, 1019, 1354)
SUBJECT_ROWS = {"huatuo-mmmu-val": (28, 30, 30, 27, 30), "mmmu-medical-test": (326, 325, 162, 430, 509)}
# Cells and means are rounded to a tenth of a percent: each may be off by half of one.
ROUNDING = 0.00101

TABLE_2_AVERAGES = {
    "Med-Flamingo": 41.7, "RadFM": 37.5, "LLaVA-Med-7B": 45.4, "Qwen-VL-Chat": 48.9, "Yi-VL-34B": 49.7,
    "LLaVA-v1.6-7B": 48.5, "LLaVA-v1.6-13B": 50.8, "LLaVA-v1.6-34B": 57.4, BASE: 51.0, f"{BASE} + LLaVA_Med": 55.6,
    PUBMEDVISION: 62.7, "HuatuoGPT-Vision-34B": 66.7, HUATUO_7B: 63.0,
}  # fmt: skip


def by_model(name):
    return {published.model: published for published in PUBLISHED[name]}


def mean(cells, rows):
    return sum(value * n for value, n in zip(cells, rows, strict=True)) / sum(rows)


def test_table_2_averages_to_what_is_printed_but_for_one_row():
    names = ("huatuo-vqa-rad", "huatuo-slake", "huatuo-pathvqa", "huatuo-pmc-vqa")
    averages = {model: sum(by_model(name)[model].value for name in names) / 4 for model in TABLE_2_AVERAGES}
    wrong = {
        model: average
        for model, average in averages.items()
        if average != pytest.approx(TABLE_2_AVERAGES[model] / 100, abs=ROUNDING)
    }
    assert wrong == pytest.approx({"Qwen-VL-Chat": 0.487}, abs=ROUNDING)
    assert all("48.7" in by_model(name)["Qwen-VL-Chat"].flaw for name in names)


def test_table_3_is_macro_but_for_the_base_model():
    for published in PUBLISHED["huatuo-omnimedvqa"]:
        if not published.groups:
            continue
        cells = published.groups.values()
        macro, micro = mean(cells, [1] * 8), mean(cells, MODALITY_ROWS)
        printed, other = (micro, macro) if published.metric == "micro" else (macro, micro)
        assert printed == pytest.approx(published.value, abs=ROUNDING), published.model
        assert (published.metric == "micro") == (published.model == BASE)
        if published.model == BASE:
            assert other == pytest.approx(0.515, abs=ROUNDING) and "51.5" in published.flaw
        if published.model == PUBMEDVISION:
            assert other == pytest.approx(0.712, abs=ROUNDING) and "71.2" in published.flaw


@pytest.mark.parametrize("name", SUBJECT_ROWS)
def test_the_subject_tables_are_means_over_rows_but_where_the_flaw_says_so(name):
    wrong = {
        published.model: mean(published.groups.values(), SUBJECT_ROWS[name])
        for published in PUBLISHED[name]
        if published.groups
        and mean(published.groups.values(), SUBJECT_ROWS[name]) != pytest.approx(published.value, abs=ROUNDING)
    }
    expected = {"huatuo-mmmu-val": {"Yi-VL-34B": 0.484}, "mmmu-medical-test": {"LLaVA-v1.6-13B": 0.388}}[name]
    assert wrong == pytest.approx(expected, abs=ROUNDING)
    assert all(len(by_model(name)[model].flaw) > 60 for model in wrong)


def test_known_flaws_are_said():
    assert all("145" in published.flaw for published in PUBLISHED["huatuo-mmmu-val"])
    copied = by_model("mmmu-medical-test")["LLaVA-v1.6-13B"]
    assert copied.groups == by_model("huatuo-mmmu-val")["LLaVA-v1.6-13B"].groups and "copying slip" in copied.flaw
    assert "76.9" in by_model("huatuo-omnimedvqa")["HuatuoGPT-Vision-34B"].flaw
    assert by_model("huatuo-omnimedvqa")[HUATUO_7B].metric == "unknown"


def test_every_number_is_a_fraction_and_every_name_a_benchmark():
    assert PUBLISHED.keys() | RELATED.keys() <= BENCHMARKS.keys()
    assert set(RELATED.values()) <= PUBLISHED.keys()
    for numbers in PUBLISHED.values():
        assert len({published.model for published in numbers}) == len(numbers)
        assert all(0.1 < v < 1 for p in numbers for v in (p.value, *p.groups.values()))
        assert all(published.protocol == "huatuo-2024" for published in numbers)
    assert MEANS.keys() <= SETS.keys() and RUBRIC_SCORES.keys() <= BENCHMARKS.keys()
    assert all(any(p.model == model for p in PUBLISHED["huatuo-slake"]) for model in HEADLINE)


def test_semihvisions_headline_is_what_it_says_of_huatuo_and_says_what_is_unknown():
    names = SETS["vqa-letters"]
    printed = {target.model: target.value for target in MEANS["vqa-letters"]}
    copied = sum(by_model(name)["HuatuoGPT-Vision-34B"].value for name in names) / 4
    assert printed["HuatuoGPT-Vision-34B"] == pytest.approx(copied, abs=0.0005) and copied == pytest.approx(0.66675)
    assert printed == {"PMC-Cambrian-8B-AN": 0.790, "HuatuoGPT-Vision-34B": 0.667, "Claude3-Opus": 0.557}
    scores = {target.model: target.value for target in RUBRIC_SCORES["jama-clinical-challenge"]}
    assert scores == {"PMC-Cambrian-8B-AN": 1.29, "HuatuoGPT-Vision-34B": 1.13, "Claude3-Opus": 1.17}
    for target in (*MEANS["vqa-letters"], *RUBRIC_SCORES["jama-clinical-challenge"]):
        assert re.search("known|copied", target.unknown), target


def test_standing():
    assert published_for("huatuo-slake", "huatuo-2024", whole=True)[1] == "same rows and protocol"
    assert published_for("huatuo-slake", "default", whole=True)[1] == "other protocol"
    assert published_for("huatuo-slake", "huatuo-2024", whole=False)[1] == "other rows"
    assert published_for("slake-en", "huatuo-2024", whole=True) == (PUBLISHED["huatuo-slake"], "other rows")
    assert published_for("phantom", "huatuo-2024", whole=True) is None


def test_cells_are_found_under_any_spelling():
    omni = by_model("huatuo-omnimedvqa")[PUBMEDVISION]
    spelled = {
        "CT(Computed Tomography)": 0.616, "MR (Mag-netic Resonance Imaging)": 0.651, "ultrasound": 0.874,
        "OCT (Optical Coherence Tomography": 0.863, "X-Ray": 0.814, "Microscopy Images": 0.674, "Infrared": None,
    }  # fmt: skip
    assert {value: cell(omni, value) for value in spelled} == spelled
    mmmu = by_model("huatuo-mmmu-val")[PUBMEDVISION]
    assert cell(mmmu, "Diagnostics_and_Laboratory_Medicine") == 0.367
    assert cell(mmmu, "Public Health") == 0.533
    assert cell(mmmu, "") is None
