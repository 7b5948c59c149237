"""The numbers of the table, from the evaluation folders: rates, paired differences to the base, spread over seeds.

Two kinds of chance make a difference, and each has its interval. Other questions: rows are resampled (by pictures or
cases where several share one; the answers that the seeds give to one question stay together), with an exact test.
Another training: the t interval over the seeds' differences, which with few seeds is wide, as it should be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from huatuo_vision.ablate.plan import Plan, Run, evaluation_folder, is_asked_blind
from huatuo_vision.ablate.set_file import Row
from huatuo_vision.evaluation import statistics
from huatuo_vision.evaluation.benchmarks import BENCHMARKS
from huatuo_vision.evaluation.compare import Paired, pair, read
from huatuo_vision.run_record import read_record
from huatuo_vision.schema import UserError

RESULTS_FILE = "results.json"


def summarise(plan: Plan) -> dict[str, Any]:
    """The content of results.json, of a plan whose parts are all finished."""
    loaded = plan.loaded
    paired = {row.label: [_against_base(plan, run) for run in plan.runs_of(row)] for row in loaded.rows}
    benchmarks = {name: _benchmark(name, plan, paired) for name in loaded.benchmarks}
    differences = [row["versus_base"] for entry in benchmarks.values() for row in entry["rows"].values()]
    tested = [difference for difference in differences if difference is not None]
    for difference, p in zip(tested, statistics.holm([one["p"] for one in tested]), strict=True):
        difference["p_holm"] = p
    return {
        "schema": 1,
        "set": loaded.spec.name,
        "title": loaded.spec.title,
        "note": loaded.spec.note,
        "base": loaded.base.label,
        "seeds": list(loaded.spec.seeds),
        "protocol": loaded.spec.protocol,
        "benchmarks": benchmarks,
        "paper": _paper(plan),
        "phases": list(plan.phases),
        "runs": [_run(run) for run in plan.runs],
    }


def _against_base(plan: Plan, run: Run) -> dict[str, Paired]:
    """The run's answers beside those of the base with the same seed, by benchmark."""
    base = next(other for other in plan.runs if other.row is plan.loaded.base and other.seed == run.seed)
    paired = pair(*(read(evaluation_folder(one, plan.loaded, blind=False)) for one in (run, base)))
    if missing := [name for name in plan.loaded.benchmarks if name not in paired]:
        raise UserError(f"{', '.join(missing)}: no answer can be graded here, so no rows can be compared; leave it out")
    return paired


def _benchmark(name: str, plan: Plan, paired: Mapping[str, Sequence[dict[str, Paired]]]) -> dict[str, Any]:
    benchmark = BENCHMARKS[name]
    rows = {row.label: _row(name, row, plan, [seed[name] for seed in paired[row.label]]) for row in plan.loaded.rows}
    n = len(paired[plan.loaded.base.label][0][name].rows)
    return {"title": benchmark.title, "n": n, "expected_n": benchmark.expected_n, "note": benchmark.note, "rows": rows}


def _row(name: str, row: Row, plan: Plan, seeds: Sequence[Paired]) -> dict[str, Any]:
    ids = [answer["id"] for answer in seeds[0].rows]
    if any([answer["id"] for answer in seed.rows] != ids for seed in seeds):
        raise UserError(f"{row.label}: its seeds were not asked the same questions of {name}; evaluate them again")
    # The seeds' answers to one question belong together.
    cluster = np.tile(statistics.clusters(seeds[0].rows), len(seeds))
    right, base_right = (np.concatenate(sides) for sides in zip(*(seed.right for seed in seeds), strict=True))
    return {
        "accuracy": float(right.mean()),
        "ci95": list(statistics.rate_interval(right, cluster)[0]),
        "seeds": [float(np.mean(seed.right[0])) for seed in seeds],
        "blind": _blind(name, row, plan),
        "groups": _groups(seeds),
        "paper": row.paper.get(name),
        "versus_base": None if row is plan.loaded.base else _difference(right, base_right, cluster, len(seeds)),
    }


def _difference(right: np.ndarray, base_right: np.ndarray, cluster: statistics.Integers, seeds: int) -> dict[str, Any]:
    each = [float(part.mean()) for part in np.split(right.astype(float) - base_right.astype(float), seeds)]
    over_seeds = statistics.seeds_interval(each)
    discordance = statistics.paired_discordance(right, base_right, cluster)
    return {
        "difference": float(np.mean(each)),
        "ci95": list(statistics.difference_interval(right, base_right, cluster)),
        "seeds": each,
        "ci95_seeds": None if over_seeds is None else list(over_seeds),
        "p": statistics.sign_flip_p(right, base_right, cluster),
        "smallest_detectable_difference": statistics.smallest_detectable_difference(len(right), discordance),
    }


def _blind(name: str, row: Row, plan: Plan) -> dict[str, Any] | None:
    """What the row scores without the pictures, and what the pictures add."""
    if not is_asked_blind(row, plan.loaded):
        return None
    sides = [
        pair(*(read(evaluation_folder(run, plan.loaded, blind)) for blind in (False, True)))[name].right
        for run in plan.runs_of(row)
    ]
    sighted, blind = (float(np.mean([np.mean(side) for side in both])) for both in zip(*sides, strict=True))
    return {"accuracy": blind, "gain": sighted - blind}


def _groups(seeds: Sequence[Paired]) -> dict[str, dict[str, float]]:
    """Group -> value -> accuracy, over all seeds."""
    right = np.mean([seed.right[0] for seed in seeds], axis=0)
    groups: dict[str, dict[str, list[float]]] = {}
    for answer, share in zip(seeds[0].rows, right, strict=True):
        for group, value in answer["groups"].items():
            groups.setdefault(group, {}).setdefault(value, []).append(float(share))
    return {
        group: {value: float(np.mean(shares)) for value, shares in sorted(values.items())}
        for group, values in groups.items()
    }


def _paper(plan: Plan) -> dict[str, Any] | None:
    """The paper's mean over the benchmarks that all its rows have, and each row's difference to its base there."""
    rows = [row for row in plan.loaded.rows if row.paper]
    if plan.loaded.base not in rows or len(rows) < 2:
        return None
    common = [name for name in plan.loaded.base.paper if all(name in row.paper for row in rows)]
    if not common:
        return None
    means = {row.label: float(np.mean([row.paper[name] for name in common])) for row in rows}
    base = means[plan.loaded.base.label]
    return {
        "benchmarks": common,
        "rows": {label: {"mean": mean, "difference": mean - base} for label, mean in means.items()},
    }


def _run(run: Run) -> dict[str, Any]:
    record = read_record(run.folder / list(run.recipe.phases)[-1] / "model")
    return {
        "row": run.row.label,
        "recipe": run.row.path.name,
        "seed": run.seed,
        "fingerprint": run.recipe.fingerprint(),
        "commit": record["commit"],
        "device": record["hardware"]["device"],
        "phases": {
            phase: {key: record["phases"][phase][key] for key in ("samples", "optimizer_steps", "train_seconds")}
            | {"taken_over": phase in run.shared}
            for phase in run.recipe.phases
        },
    }
