"""The numbers that the papers print, as data, each with its known flaw. No torch here.

HuatuoGPT-Vision: arXiv 2406.19280, tables 2, 3, 4 and 8, and the repository's README for the 7B model. A number stands
beside ours only with its standing: the same rows under the same protocol, or not.

SemiHVision: arXiv 2410.14948. Of its tables only the abstract's headline is known here: means of four benchmarks, and
"GPT-4 scores" on JAMA's cases. Neither says enough to be compared with, and what is missing stands with each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

PROTOCOL = "huatuo-2024"

BASE = "LLaVA-v1.5-LLaMA3-8B"
PUBMEDVISION = "LLaVA-v1.5-LLaMA3-8B + PubMedVision"
HUATUO_7B = "HuatuoGPT-Vision-7B"
HUATUO_34B = "HuatuoGPT-Vision-34B"
# What stands beside a result where there is room for a few: model -> a short name of it.
HEADLINE = {PUBMEDVISION: "8B", HUATUO_7B: "7B", HUATUO_34B: "34B"}

Metric = Literal["micro", "macro", "unknown"]
Standing = Literal["same rows and protocol", "other protocol", "other rows"]


@dataclass(frozen=True, slots=True)
class Published:
    model: str
    value: float  # 0..1, as printed
    metric: Metric  # mean over rows, mean over groups, or not said
    protocol: str
    source: str
    flaw: str | None = None
    groups: Mapping[str, float] = field(default_factory=dict)  # the printed cells, 0..1


# Table 2: VQA-RAD, SLAKE, PathVQA, PMC-VQA, percent.
_TABLE_2 = {
    "Med-Flamingo": (45.4, 43.5, 54.7, 23.3),
    "RadFM": (50.6, 34.6, 38.7, 25.9),
    "LLaVA-Med-7B": (51.4, 48.6, 56.8, 24.7),
    "Qwen-VL-Chat": (47.0, 56.0, 55.1, 36.6),
    "Yi-VL-34B": (53.0, 58.9, 47.3, 39.5),
    "LLaVA-v1.6-7B": (52.6, 57.9, 47.9, 35.5),
    "LLaVA-v1.6-13B": (55.8, 58.9, 51.9, 36.6),
    "LLaVA-v1.6-34B": (58.6, 67.3, 59.1, 44.4),
    BASE: (54.2, 59.4, 54.1, 36.4),
    f"{BASE} + LLaVA_Med": (60.2, 61.2, 54.5, 46.6),
    PUBMEDVISION: (63.8, 74.5, 59.9, 52.7),
    HUATUO_34B: (68.1, 76.9, 63.5, 58.2),
}
_FLAWS_2 = {
    "Qwen-VL-Chat": "The printed average over the four benchmarks is 48.9, that of the cells 48.7: one is misprinted."
}

# Table 3: a mean, then the cells of MODALITIES, percent.
MODALITIES = ("CT", "Fundus Photography", "MR", "OCT", "Dermoscopy", "Microscopy", "X-Ray", "Ultrasound")
_TABLE_3 = {
    "Med-Flamingo": (30.2, 34.6, 33.3, 27.5, 26.0, 28.3, 28.1, 30.1, 33.2),
    "RadFM": (30.5, 33.3, 35.0, 22.0, 31.3, 36.3, 28.0, 31.5, 26.1),
    "LLaVA-Med-7B": (44.5, 25.3, 48.4, 35.9, 42.1, 45.2, 44.0, 31.7, 83.7),
    "Qwen-VL-Chat": (49.5, 51.5, 45.4, 43.9, 54.0, 55.4, 49.5, 63.1, 33.5),
    "Yi-VL-34B": (54.9, 39.8, 57.2, 51.4, 70.5, 54.5, 61.4, 64.2, 40.5),
    "LLaVA-v1.6-7B": (49.6, 40.1, 39.5, 54.8, 58.4, 54.0, 48.8, 53.3, 47.9),
    "LLaVA-v1.6-13B": (50.6, 40.0, 43.6, 47.4, 63.2, 58.0, 50.5, 59.6, 42.6),
    "LLaVA-v1.6-34B": (61.4, 50.6, 63.4, 60.9, 68.4, 65.7, 62.8, 74.7, 44.5),
    BASE: (48.8, 33.0, 49.7, 53.8, 76.0, 63.1, 48.4, 56.6, 31.2),
    f"{BASE} + LLaVA_Med": (65.5, 60.8, 68.5, 66.3, 79.0, 66.6, 60.3, 73.3, 49.3),
    PUBMEDVISION: (75.1, 61.6, 80.2, 65.1, 86.3, 71.6, 67.4, 81.4, 87.4),
    HUATUO_34B: (76.7, 60.8, 85.5, 66.5, 90.0, 74.0, 71.3, 83.8, 81.7),
}
_MACRO = "The mean of the eight modalities, each counted alike; its row-weighted mean over the 11,124 questions is {}."
_FLAWS_3 = {
    BASE: (
        "48.8 is the row-weighted mean; every other row of the table is the unweighted mean of the eight modalities, "
        "by which this model has 51.5."
    ),
    f"{BASE} + LLaVA_Med": _MACRO.format("64.3"),
    PUBMEDVISION: _MACRO.format("71.2") + " The printed gain of 26.3 points sets a macro against a micro mean.",
    "LLaVA-v1.6-34B": _MACRO.format("59.3"),
    HUATUO_34B: _MACRO.format("72.0") + " The repository prints 76.9.",
}

# Tables 4 (test) and 8 (validation): a mean, then the cells of SUBJECTS, percent.
SUBJECTS = (
    "Basic Medical Science", "Clinical Medicine", "Diagnostics and Laboratory Medicine", "Pharmacy", "Public Health",
)  # fmt: skip
_TABLE_4 = {
    "Med-Flamingo": (28.3, 29.6, 28.1, 24.8, 25.3, 31.2),
    "RadFM": (27.0, 27.5, 26.8, 25.8, 24.7, 29.1),
    "LLaVA-Med-7B": (36.9, 39.9, 39.1, 34.6, 37.4, 34.0),
    "Qwen-VL-Chat": (32.7, 36.5, 31.7, 32.7, 28.4, 34.6),
    "Yi-VL-34B": (41.5, 49.4, 48.9, 43.2, 40.5, 32.0),
    "LLaVA-v1.6-7B": (33.1, 40.5, 36.9, 32.1, 32.3, 26.9),
    "LLaVA-v1.6-13B": (39.3, 53.6, 46.7, 33.3, 22.2, 40.0),
    "LLaVA-v1.6-34B": (48.8, 56.4, 56.0, 46.9, 46.7, 41.7),
    BASE: (38.2, 42.3, 44.0, 37.0, 34.7, 35.2),
    f"{BASE} + LLaVA_Med": (41.1, 48.2, 43.8, 42.0, 39.7, 35.8),
    PUBMEDVISION: (49.1, 61.0, 58.8, 50.0, 44.7, 38.7),
    HUATUO_34B: (54.4, 64.6, 62.5, 50.6, 54.1, 44.2),
}
_FLAWS_4 = {
    "LLaVA-v1.6-13B": (
        "Digit for digit this model's row of the validation table: a copying slip. Nothing is known of its test score."
    )
}
_TABLE_8 = {
    "Med-Flamingo": (28.4, 33.6, 30.2, 23.3, 29.3, 25.8),
    "RadFM": (27.9, 31.6, 28.2, 26.7, 26.2, 26.8),
    "LLaVA-Med-7B": (38.6, 50.0, 33.3, 26.7, 40.7, 43.3),
    "Qwen-VL-Chat": (31.7, 39.3, 36.7, 20.0, 29.6, 33.3),
    "Yi-VL-34B": (48.2, 48.1, 55.6, 36.7, 48.1, 53.3),
    "LLaVA-v1.6-7B": (33.1, 46.4, 33.3, 30.0, 29.6, 26.7),
    "LLaVA-v1.6-13B": (39.3, 53.6, 46.7, 33.3, 22.2, 40.0),
    "LLaVA-v1.6-34B": (55.9, 57.1, 63.3, 50.0, 44.4, 63.3),
    BASE: (38.6, 42.9, 43.3, 30.0, 25.9, 50.0),
    f"{BASE} + LLaVA_Med": (42.8, 42.9, 46.7, 36.7, 40.7, 46.7),
    PUBMEDVISION: (50.3, 50.0, 63.3, 36.7, 48.1, 53.3),
    HUATUO_34B: (58.6, 64.3, 60.0, 46.7, 66.7, 56.7),
}
_OVER_145 = "Over 145 of the 150 rows: the five open questions are left out."
_FLAWS_8 = {
    "Yi-VL-34B": f"{_OVER_145} Its cells average to 48.4, not 48.2, and 55.6 % is no share of 30 questions.",
}

# Table 2's benchmarks in the repository's README for the 7B model, percent.
_README_7B = {"huatuo-vqa-rad": 63.7, "huatuo-slake": 76.2, "huatuo-pathvqa": 57.9, "huatuo-pmc-vqa": 54.3}


def _plain(
    column: int, table: Mapping[str, tuple[float, ...]], source: str, flaws: Mapping[str, str]
) -> tuple[Published, ...]:
    return tuple(
        Published(model, round(row[column] / 100, 4), "micro", PROTOCOL, source, flaws.get(model))
        for model, row in table.items()
    )


def _with_cells(
    table: Mapping[str, tuple[float, ...]],
    names: tuple[str, ...],
    source: str,
    metric: Metric,
    flaws: Mapping[str, str],
    flaw: str | None = None,
) -> tuple[Published, ...]:
    return tuple(
        Published(
            model=model,
            value=round(mean / 100, 4),
            metric=metric,
            protocol=PROTOCOL,
            source=source,
            flaw=flaws.get(model, flaw),
            groups={name: round(cell / 100, 4) for name, cell in zip(names, cells, strict=True)},
        )
        for model, (mean, *cells) in table.items()
    )


def _readme(value: float, metric: Metric, flaw: str | None = None) -> Published:
    return Published(HUATUO_7B, round(value / 100, 4), metric, PROTOCOL, "repository README", flaw)


PUBLISHED: dict[str, tuple[Published, ...]] = {
    name: (*_plain(column, _TABLE_2, "paper, table 2", _FLAWS_2), _readme(_README_7B[name], "micro"))
    for column, name in enumerate(_README_7B)
} | {
    "huatuo-omnimedvqa": (
        *(
            # The one row that is another mean than all others.
            replace(published, metric="micro") if published.model == BASE else published
            for published in _with_cells(_TABLE_3, MODALITIES, "paper, table 3", "macro", _FLAWS_3)
        ),
        _readme(74.0, "unknown", "Which mean this is, is not said; an independent rerun has 73.5 micro."),
    ),
    "huatuo-mmmu-val": _with_cells(_TABLE_8, SUBJECTS, "paper, table 8", "micro", _FLAWS_8, _OVER_145),
    "mmmu-medical-test": (
        *_with_cells(_TABLE_4, SUBJECTS, "paper, table 4", "micro", _FLAWS_4),
        _readme(50.6, "unknown", "Only this average was published."),
    ),
}

# Benchmarks that ask some of the same questions, over other rows or another copy of them.
RELATED = {
    "vqa-rad": "huatuo-vqa-rad",
    "slake-en": "huatuo-slake",
    "pathvqa": "huatuo-pathvqa",
    "pmc-vqa": "huatuo-pmc-vqa",
    "omnimedvqa": "huatuo-omnimedvqa",
    "mmmu-medical-val": "huatuo-mmmu-val",
}

# -- SemiHVision -----------------------------------------------------------------------------------------------------

SEMIHVISION = "arXiv 2410.14948, abstract"
PMC_CAMBRIAN = "PMC-Cambrian-8B-AN"


@dataclass(frozen=True, slots=True)
class Target:
    """A printed number that nothing here can be set beside with a clear conscience, and why."""

    model: str
    value: float  # a share of 1 for a mean, 0 to 5 for a rubric
    unknown: str


_MEAN_OF_FOUR = "Rows, prompt and cells of its four benchmarks are not known here"
# Set of benchmarks -> means over its four.
MEANS = {
    "vqa-letters": (
        Target(
            PMC_CAMBRIAN,
            0.790,
            f"{_MEAN_OF_FOUR}, nor whether their training splits were trained on, as a later version's table says.",
        ),
        Target(
            HUATUO_34B,
            0.667,
            "The mean of HuatuoGPT-Vision's own four numbers (66.675), so almost certainly copied: letters, bundle.",
        ),
        Target("Claude3-Opus", 0.557, f"{_MEAN_OF_FOUR}."),
    )
}
_JAMA = (
    "Unknown: the judge's version, temperature and repeats, how three lists become one score, how many cases, and any "
    "interval. If it is a mean of 0 to 5, {}"
)
# Benchmark -> rubric scores, 0 to 5.
RUBRIC_SCORES = {
    "jama-clinical-challenge": (
        Target(
            PMC_CAMBRIAN,
            1.29,
            _JAMA.format("it is 2.6 of 10 items. JAMA is among its data set's own sources: test cases may be in it."),
        ),
        Target("Claude3-Opus", 1.17, _JAMA.format("the winner's margin is 0.2 of an item.")),
        Target(HUATUO_34B, 1.13, _JAMA.format("the winner's margin is 0.3 of an item.")),
    )
}


def published_for(benchmark: str, protocol: str, *, whole: bool) -> tuple[tuple[Published, ...], Standing] | None:
    """What was published on a benchmark and how it stands to a result under `protocol`; None where nothing was.

    `whole` says whether the result covers all the benchmark's rows.
    """
    name = RELATED.get(benchmark, benchmark)
    if name not in PUBLISHED:
        return None
    if name != benchmark or not whole:
        return PUBLISHED[name], "other rows"
    return PUBLISHED[name], "same rows and protocol" if protocol == PROTOCOL else "other protocol"


def cell(published: Published, group_value: str) -> float | None:
    """The printed cell for a group's value, which data sets spell in many ways: "CT(Computed Tomography)" is "CT"."""
    cells = {_first_word(name): value for name, value in published.groups.items()}
    return cells.get(_first_word(group_value))


def _first_word(text: str) -> str:
    return next(iter(re.findall(r"[a-z]+", text.casefold())), "")
