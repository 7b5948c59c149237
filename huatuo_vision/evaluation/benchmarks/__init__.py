"""The benchmarks by name: where their rows come from, which of them count, and how many there must be. No torch here.

Each module holds one family and says which rows are used, which are open, how gold text becomes a letter, and the
known traps. `Benchmark.load` takes the folder of the downloaded data set (or its table file), or None for the Hub.
"""

from __future__ import annotations

from huatuo_vision.evaluation.benchmarks import (
    gmai,
    huatuo,
    medxpertqa,
    mmmu,
    omnimedvqa,
    phantom,
    pmc_vqa,
    slake,
    vqa_rad,
)
from huatuo_vision.evaluation.rows import by_name

BENCHMARKS = by_name(
    (
        phantom.PHANTOM,
        phantom.PHANTOM_LARGE,
        phantom.PHANTOM_FOLLOW_UP,
        *vqa_rad.BENCHMARKS,
        *slake.BENCHMARKS,
        *pmc_vqa.BENCHMARKS,
        omnimedvqa.OMNIMEDVQA,
        *mmmu.BENCHMARKS,
        medxpertqa.MEDXPERTQA_MM,
        gmai.GMAI_MMBENCH_VAL,
        *huatuo.BENCHMARKS,
    )
)

# Names that stand for several benchmarks, in the order in which they run.
SETS: dict[str, tuple[str, ...]] = {
    "huatuo-bundle": tuple(benchmark.name for benchmark in huatuo.BENCHMARKS),
}
