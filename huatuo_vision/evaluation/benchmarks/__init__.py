"""The benchmarks by name: where their rows come from, which of them count, and how many there must be. No torch here.

Each module holds one family and says which rows are used, which are open, how gold text becomes a letter, and the
known traps. `Benchmark.load` takes the folder of the downloaded data set (or its table file), or None for the Hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huatuo_vision.evaluation.benchmarks import (
    case_challenge,
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
from huatuo_vision.schema import UserError

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
        *case_challenge.BENCHMARKS,
    )
)

# Names that stand for several benchmarks, in the order in which they run.
SETS: dict[str, tuple[str, ...]] = {
    "huatuo-bundle": tuple(benchmark.name for benchmark in huatuo.BENCHMARKS),
    # The four sets of SemiHVision's headline mean: as letters, and whole, for --protocol open.
    "vqa-letters": ("huatuo-vqa-rad", "huatuo-slake", "huatuo-pathvqa", "huatuo-pmc-vqa"),
    "vqa-open": ("vqa-rad", "slake-en", "pathvqa", "pmc-vqa"),
}


def chosen_benchmarks(named: Sequence[str]) -> dict[str, Path | None]:
    """`NAME` or `NAME=PATH`, a set standing for its members; raises UserError for a name that is none."""
    chosen: dict[str, Path | None] = {}
    for argument in named:
        name, _, path = argument.partition("=")
        if name not in BENCHMARKS and name not in SETS:
            raise UserError(
                f"--benchmarks {name}: no such benchmark; expected of {', '.join(BENCHMARKS)}, or one of the sets "
                f"{', '.join(SETS)}"
            )
        if path and not Path(path).exists():
            raise UserError(f"--benchmarks {argument}: {path} does not exist; give the folder or file of its data")
        chosen |= {member: Path(path) if path else None for member in SETS.get(name, (name,))}
    return chosen
