"""Concept overlap: which medical terms of the reference an explanation names, by a list of the user's. No torch here.

SemiHVision reports a UMLS-F score, "concept overlap", without saying how it is made. Here the concepts of a text are
the entries of the given list that it names, longest first ("chest pain" is not "pain"), each once; precision, recall
and F1 of an answer are over these sets, and the score is their mean over the answers. Without the UMLS's own list,
which needs its licence, it is no UMLS score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huatuo_vision.evaluation import statistics
from huatuo_vision.evaluation.variants import by_condition, is_original
from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from huatuo_vision.terms import Terms

METRICS = ("precision", "recall", "f1")

Answer = Mapping[str, Any]
Key = tuple[str, str]  # benchmark, id


def measure(answers: Sequence[Answer], path: Path) -> tuple[dict[str, dict[str, Any]], dict[Key, dict[str, float]]]:
    """Benchmark -> its `concepts` entry of scores.json, and the metrics of each answer that has a reference.

    Raises UserError for a file that is no list of terms.
    """
    try:
        from huatuo_vision.terms import Terms, read_terms
    except ImportError:
        raise UserError("--concepts needs the package pyahocorasick: pip install pyahocorasick") from None
    entries = read_terms(path, "--concepts")
    terms = Terms(entries)
    about = {
        "file": path.name,
        "entries": len(entries),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
    }
    found: dict[str, dict[str, Any]] = {}
    metrics: dict[Key, dict[str, float]] = {}
    whole = {(a["benchmark"], a["id"]) for a in answers if is_original(a) and a.get("reference")}
    own = [a for a in answers if a.get("reference") and (a["benchmark"], a.get("control_of") or a["id"]) in whole]
    for benchmark, conditions in by_condition(own).items():
        of_benchmark = {}
        for condition, asked in conditions.items():
            measured = [(answer, overlap) for answer in asked if (overlap := _overlap(answer, terms)) is not None]
            metrics |= {(answer["benchmark"], answer["id"]): overlap for answer, overlap in measured}
            of_benchmark[condition] = _summary(measured) | {"without_concepts": len(asked) - len(measured)}
        found[benchmark] = about | {"conditions": of_benchmark}
    return found, metrics


def _overlap(answer: Answer, terms: Terms) -> dict[str, float] | None:
    """None where the list knows nothing of the reference: such an answer can't be measured."""
    gold, said = terms.longest(answer["reference"]), terms.longest(answer["response"])
    if not gold:
        return None
    shared = len(gold & said)
    precision, recall = shared / len(said) if said else 0.0, shared / len(gold)
    f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def _summary(measured: Sequence[tuple[Answer, Mapping[str, float]]]) -> dict[str, Any]:
    if not measured:
        return {"n": 0} | dict.fromkeys(METRICS)
    measured = sorted(measured, key=lambda pair: pair[0]["id"])
    values = [[overlap[metric] for metric in METRICS] for _, overlap in measured]
    intervals = statistics.mean_intervals(values, statistics.clusters([answer for answer, _ in measured]))
    means = (sum(column) / len(column) for column in zip(*values, strict=True))
    return {"n": len(measured)} | {
        metric: {"mean": mean, "ci95": list(interval)}
        for metric, mean, interval in zip(METRICS, means, intervals, strict=True)
    }
