"""Scores as the Hub shows them beside a model: `.eval_results/*.yaml`, and model-index in the card. No torch here.

Both are written by huggingface_hub's own classes. Only what may be compared is written: no blind result, no `--limit`,
no benchmark whose row count differs from its protocol's. Each number carries its protocol's name and hash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import metadata_load, metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from huatuo_vision.evaluation.responses import write_whole
from huatuo_vision.schema import UserError

RESULTS_FOLDER = ".eval_results"
TASK = "visual-question-answering"
# The metric argument that marks a result of the model-index as written here.
MARK = "protocol_hash"


@dataclass(frozen=True, slots=True)
class HubDataset:
    id: str
    split: str
    # Sets apart what several benchmarks read from one data set; its own configuration where it has one.
    config: str | None = None


_BUNDLE = "FreedomIntelligence/Medical_Multimodal_Evaluation_Data"
_PMC, _MMMU, _PRO = "RadGenome/PMC-VQA", "MMMU/MMMU", "MMMU/MMMU_Pro"
_HEALTH = "Health & Medicine"

# Benchmark -> the Hub's data set. The phantoms and what a user brings have none: not written.
DATASETS = {
    "vqa-rad": HubDataset("flaviagiammarino/vqa-rad", "test"),
    "pathvqa": HubDataset("flaviagiammarino/path-vqa", "test"),
    "slake-en": HubDataset("BoKelvin/SLAKE", "test", "English"),
    "slake-zh": HubDataset("BoKelvin/SLAKE", "test", "Chinese"),
    "pmc-vqa": HubDataset(_PMC, "test", "test_clean"),
    "pmc-vqa-v1": HubDataset(_PMC, "test", "test"),
    "pmc-vqa-v2": HubDataset(_PMC, "test", "test_2"),
    "omnimedvqa": HubDataset("foreverbeliever/OmniMedVQA", "test", "Open-access"),
    "mmmu-medical-dev": HubDataset(_MMMU, "dev", _HEALTH),
    "mmmu-medical-val": HubDataset(_MMMU, "validation", _HEALTH),
    "mmmu-medical-test": HubDataset(_MMMU, "test", _HEALTH),
    "mmmu-pro-medical": HubDataset(_PRO, "test", f"{_HEALTH}, standard (10 options)"),
    "mmmu-pro-medical-4": HubDataset(_PRO, "test", f"{_HEALTH}, standard (4 options)"),
    "mmmu-pro-medical-vision": HubDataset(_PRO, "test", f"{_HEALTH}, vision"),
    "medxpertqa-mm": HubDataset("TsinghuaC3I/MedXpertQA", "test", "MM"),
    "gmai-mmbench-val": HubDataset("VLMEval/GMAI-MMBench", "validation"),
    "medthinkvqa": HubDataset("bio-nlp-umass/MedThinkVQA", "test"),
    "huatuo-vqa-rad": HubDataset(_BUNDLE, "test", "VQA-RAD_test"),
    "huatuo-slake": HubDataset(_BUNDLE, "test", "SLAKE_test"),
    "huatuo-pathvqa": HubDataset(_BUNDLE, "test", "PathVQA_test"),
    "huatuo-pmc-vqa": HubDataset(_BUNDLE, "test", "PMC-VQA_test"),
    "huatuo-omnimedvqa": HubDataset(_BUNDLE, "test", "OmniMedVQA"),
    "huatuo-mmmu-val": HubDataset(_BUNDLE, "test", "MMMU_Medical_Validation"),
}


def write_results(folder: Path, scores: Mapping[str, Any]) -> list[Path]:
    """Write the results that may be published into a model folder; returns the files written.

    `.eval_results/<benchmark>.yaml` for each, and model-index into README.md, whose other metadata and text stay as
    they are. Results written here before, of the same data set, are replaced; everyone else's are kept.

    Returns:
        Empty where nothing may be published: a blind result, or none that is comparable.
    Raises:
        UserError where the folder's README.md has metadata that is not YAML.
    """
    found = publishable(scores)
    if not found:
        return []
    card = folder / "README.md"
    metadata = _metadata(card)
    index = eval_results_to_model_index(
        _model_name(metadata, scores),
        [result for name, entry in found.items() for result in _results(name, entry, scores)],
    )
    written = [_write_entry(folder, name, entry, scores) for name, entry in found.items() if _entry_class()]
    metadata_save(card, {**metadata, "model-index": _merged(metadata.get("model-index"), index[0])})
    return [*written, card]


def publishable(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The benchmarks whose numbers may stand beside a model: sighted, whole, and from a data set on the Hub."""
    if scores["blind"] or scores["limit"] is not None:
        return {}
    return {
        name: entry
        for name, entry in scores["benchmarks"].items()
        if entry["comparable"] and entry["accuracy"] is not None and name in DATASETS
    }


def _note(entry: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    low, high = (f"{100 * bound:.1f}" for bound in entry["ci95"])
    protocol = scores["protocol"]
    scoring = ", scored by likelihood" if scores["scoring"] == "likelihood" else ""
    return (
        f"accuracy over rows, n {entry['n']}, 95 % interval {low} to {high}, {entry['unparsed']} unparsed; protocol "
        f"{protocol['name']} ({protocol['hash']}){scoring}; rows {entry['protocol_hash']}"
    )


def _revision(entry: Mapping[str, Any]) -> str | None:
    """The data set's commit, where the rows came from the Hub and not from local files."""
    revision = entry["revision"] or ""
    return revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None


def _entry_class() -> type | None:
    # Of huggingface_hub 1.x on; without it there is model-index alone.
    return getattr(huggingface_hub, "EvalResultEntry", None)


def _write_entry(folder: Path, name: str, entry: Mapping[str, Any], scores: Mapping[str, Any]) -> Path:
    dataset = DATASETS[name]
    result = huggingface_hub.EvalResultEntry(
        dataset_id=dataset.id,
        task_id=name,
        value=round(100 * entry["accuracy"], 2),
        dataset_revision=_revision(entry),
        notes=_note(entry, scores),
    )
    path = folder / RESULTS_FOLDER / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = huggingface_hub.eval_result_entries_to_yaml([result])
    write_whole(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
    return path


def _results(name: str, entry: Mapping[str, Any], scores: Mapping[str, Any]) -> list[EvalResult]:
    """Accuracy over rows, and where the benchmark has groups, their unweighted mean; percent."""
    dataset = DATASETS[name]
    arguments = {
        "benchmark": name,
        "protocol": scores["protocol"]["name"],
        MARK: scores["protocol"]["hash"],
        "rows_hash": entry["protocol_hash"],
        "n": entry["n"],
        "unparsed": entry["unparsed"],
        "scoring": scores["scoring"],
    }
    metrics = [("accuracy", "accuracy (micro)", entry["accuracy"], entry["ci95"])]
    if entry["macro"] is not None:
        over = f"accuracy (macro over {entry['macro_over']})"
        metrics.append(("macro_accuracy", over, entry["macro"], entry["macro_ci95"]))
    return [
        EvalResult(
            task_type=TASK,
            task_name="Visual question answering",
            dataset_type=dataset.id,
            dataset_name=entry["title"],
            dataset_config=dataset.config,
            dataset_split=dataset.split,
            dataset_revision=_revision(entry),
            metric_type=metric,
            metric_name=title,
            metric_value=round(100 * value, 2),
            metric_args={**arguments, "ci95": [round(100 * bound, 2) for bound in bounds]},
        )
        for metric, title, value, bounds in metrics
    ]


def _metadata(card: Path) -> dict[str, Any]:
    if not card.exists():
        return {}
    try:
        metadata = metadata_load(card) or {}
        if metadata.get("model-index"):
            model_index_to_eval_results(metadata["model-index"])
    except (ValueError, yaml.YAMLError):
        raise UserError(f"{card}: its metadata is not a YAML mapping; mend what stands between its --- lines") from None
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{card}: its model-index is not in the Hub's form; mend it or take it out") from None
    return metadata


def _model_name(metadata: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    index = metadata.get("model-index")
    if index:
        return index[0]["name"]
    return scores["model"].rstrip("/").rsplit("/", 1)[-1]


def _merged(before: list[dict[str, Any]] | None, own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model-index with our results in it; results that were not written here stay as they are."""
    if not before:
        return [dict(own)]
    first, *others = before
    replaced = [_place(result) for result in own["results"]]
    kept = [result for result in first["results"] if not (_is_ours(result) and _place(result) in replaced)]
    return [{**first, "results": [*kept, *own["results"]]}, *others]


def _place(result: Mapping[str, Any]) -> tuple[str | None, ...]:
    dataset = result["dataset"]
    return result["task"]["type"], dataset["type"], dataset.get("config"), dataset.get("split")


def _is_ours(result: Mapping[str, Any]) -> bool:
    return all(MARK in (metric.get("args") or {}) for metric in result["metrics"])
