"""The data card: true to the run, safe to render, and its configurations load."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from datasets import load_dataset
from huggingface_hub import DatasetCard

from data import card
from data.assemble import STAGE, assemble_pass
from data.card import write_card
from data.config import BuildConfig
from data.funnel import ROW_STAGES
from data.mllm.cache import AnswerCache, Kept
from data.reformat import answers_folder
from data.tables import Counts, Pair, RunFolder
from tests.data.rows import complete_stage, described

HOSTILE = "</td><script>alert(1)</script> | `x` **b** [a](javascript:1)\nsecond line"


def finished(folder: Path, rows: list[Pair], method: str = "mllm_reformatted") -> RunFolder:
    """A run whose stages are all complete with these rows, and its data set without a card."""
    run = complete_stage(folder, "reformat", [rows])
    n = len(rows)
    for stage in (*ROW_STAGES, STAGE):
        settings = {"method": method, "min_side": 336, "columns": {"id": "id"}, "address": "/home/me/src"}
        state = {"fingerprint": f"{stage}-1", "tasks": 1, "settings": settings}
        (folder / "logs" / f"{stage}.json").write_text(json.dumps(state))
        completions = run.logging_dir(stage) / "completions"
        completions.mkdir(parents=True)
        (completions / "00000").touch()
        lost = {"missing_image": 3} if stage == "ingest" else {}
        run.write_counts(stage, 0, Counts(n + sum(lost.values()), n, lost))
    (folder / "decisions").mkdir()
    report = {"benchmarks": {}, "cases": 0, "on_overlap": "drop", "overlaps": []}
    (folder / "decisions/contamination.json").write_text(json.dumps(report))
    made = assemble_pass(run, config().assemble, 1)
    made.steps[1].run(made.steps[0].run(None, 0, 1), 0, 1)
    made.finish()
    return run


def config(**changed: object) -> BuildConfig:
    reformat = {"method": "mllm_reformatted", "model": "m", "prices": {"input": 1e6, "output": 2e6}}
    return BuildConfig(**{"name": "tiny-set", "reformat": reformat} | changed)


def test_the_card_says_what_the_run_did(tmp_path: Path) -> None:
    rows = [described(1), described(2, modality="Ultrasound"), described(3, licence="CC-BY-NC-4.0", modality=None)]
    run = finished(tmp_path / "run", rows)
    with AnswerCache(answers_folder(run), "0") as cache:
        for n in range(4):
            cache.keep(Kept(str(n), 1, "ok", "{}", None, "stop", 100, 20, 10, False, "m", 1.0))
    card = DatasetCard.load(write_card(run, config(notice="Made up.")))
    text = card.text
    assert "> **Made up.**" in text
    assert "| ingest | 6 | 3 | missing_image 3 |" in text and "| reformat | 3 | 3 | none |" in text
    assert "| mllm_reformatted | m | mllm_reformatted-1 | 3 |" in text.replace("\\_", "_")
    assert "4, with 400 prompt tokens (80 of them cached) and 40 new ones" in text
    assert "480.00 USD" in text and "not recorded" not in text
    assert "| Ultrasound | 1 | 33.3 % | not printed |" in text and "| unknown | 1 | 33.3 % | not printed |" in text
    assert "Not checked" in text and "min_side | 336" in text.replace("\\_", "_")
    assert "/home/me" not in text and "columns" not in text
    assert card.data.license == "other" and card.data.task_categories[0] == "image-text-to-text"
    names = [entry["config_name"] for entry in card.data.to_dict()["configs"]]
    assert names == [f"{k}-{c}" for c in ("commercial", "noncommercial") for k in ("alignment", "instruction")]
    for picture in ("funnel.png", "labels.png"):
        assert (run.out / picture).stat().st_size > 5000 and f"({picture})" in text
    build = json.loads((run.out / "build.json").read_text())
    assert build["fingerprint"] == "assemble-1" and build["rows"]["commercial"] == {"alignment": 2, "instruction": 2}


def test_its_configurations_load_from_the_folder(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", [described(1), described(2), described(3, licence="CC-BY-NC-4.0")])
    write_card(run, config())
    moved = run.out.rename(tmp_path / "moved")
    rows = load_dataset(str(moved), "instruction-commercial", split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"] == ["Instruction-Tuning_VQA_1", "Instruction-Tuning_VQA_2"]
    assert rows[0]["image"][0].size == (48, 40)


def test_one_licence_is_named_to_the_hub(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", [described(1)])
    assert DatasetCard.load(write_card(run, config())).data.license == "cc-by-4.0"


def test_captions_alone_claim_no_model(tmp_path: Path) -> None:
    bare = {"method": "native_caption", "model": None, "prompt_version": None, "query": None, "answer": None}
    run = finished(tmp_path / "run", [described(1, **bare, modality=None, body_part=None)], "native_caption")
    card = DatasetCard.load(write_card(run, config(reformat={})))
    assert "No model was asked" in card.text and "synthetic" not in card.data.tags
    assert "| unknown | 1 | 100.0 %" in card.text and "questions with answers" not in card.text


@pytest.mark.parametrize("field", ["licence", "model", "modality"])
def test_hostile_text_cannot_leave_its_cell(tmp_path: Path, field: str) -> None:
    run = finished(tmp_path / "run", [described(1, **{field: HOSTILE})])
    text = DatasetCard.load(write_card(run, config())).text
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert all("second line" not in line or line.startswith("| ") for line in text.splitlines())
    assert not re.search(r"(?<!\\)\]\(javascript", text)


def test_labels_of_the_data_are_drawn_as_they_stand(tmp_path):
    """matplotlib would read what stands between two dollars as TeX, and stop where it is none."""
    labels = Counter({"$x_{$": 3, "CT": 1})
    card._draw_labels({"modality": labels, "body_part": labels}, tmp_path / "labels.png")
    card._draw_balance({"before": labels, "after": labels}, tmp_path / "balance.png")
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("labels.png", "balance.png"))
