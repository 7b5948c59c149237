"""Described figures become a data set that others can load, wherever it is moved."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("datatrove")

from datasets import Image, load_dataset

from data.assemble import FEATURES, assemble_pass, finish, licence_class, rows_by_class
from data.config import Assemble
from data.tables import Pair, RunFolder
from huatuo_vision.inputs.sources import open_source
from huatuo_vision.recipe import SourceSpec
from huatuo_vision.schema import UserError
from tests.data.rows import complete_stage, described


def assemble(run: RunFolder, **settings: object) -> Path:
    """The stage's steps on every rank, without an executor."""
    tasks = run.tasks("reformat")
    made = assemble_pass(run, Assemble(**settings), tasks)
    (run.path / "logs" / "assemble.json").write_text(json.dumps({"fingerprint": "0", "tasks": tasks}))
    for rank in range(tasks):
        rows = None
        for step in made.steps:
            rows = step.run(rows, rank, tasks)
    made.finish()
    return run.out


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    ranks = [
        [described(1), described(2, n_images=3, query="What is in the <image> here?")],
        [],
        [described(4, licence="CC-BY-NC-4.0"), described(5, licence="of the hospital"), described(6)],
        [described(7, method="native_caption", query=None, answer=None, modality=None, body_part=None)],
    ]
    return complete_stage(tmp_path / "run", "reformat", ranks)


def test_the_data_set_loads_after_it_was_moved(run: RunFolder, tmp_path: Path) -> None:
    out = assemble(run)
    moved = tmp_path / "elsewhere"
    shutil.move(out, moved)
    shutil.rmtree(run.path)
    rows = load_dataset("parquet", data_dir=str(moved / "commercial/alignment"), cache_dir=str(tmp_path / "c"))["train"]
    assert rows.features["image"].feature == Image()
    assert [row["id"] for row in rows] == [f"Alignment_VQA_{n}" for n in (1, 2, 5, 6)]
    assert [len(row["image"]) for row in rows] == [1, 3, 1, 1]
    assert rows[0]["image"][0].size == (48, 40)
    assert rows[1]["conversations"][1] == {"from": "gpt", "value": "Description 2."}
    assert (rows[0]["pair"], rows[0]["state"], rows[0]["licence"]) == ("PMC1.1-f1", "ok", "CC-BY-4.0")
    assert (rows[3]["modality"], rows[3]["method"]) == ("", "native_caption")
    # Never a path of this machine.
    for file in moved.rglob("*.parquet"):
        images = [image for row in pq.read_table(file)["image"].to_pylist() for image in row]
        assert all(image["bytes"] and image["path"].startswith("images/pmc_") for image in images)
        assert str(tmp_path).encode() not in file.read_bytes()


def test_licences_are_apart_and_nothing_is_lost(run: RunFolder) -> None:
    assert rows_by_class(assemble(run)) == {
        "commercial": {"alignment": 4, "instruction": 3},
        "noncommercial": {"alignment": 1, "instruction": 1},
        "restricted": {"alignment": 1, "instruction": 1},
    }
    counts = run.rank_counts("assemble", 2)
    assert (counts.rows_in, counts.rows_out) == (3, 3)


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("CC0", "commercial"),
        ("cc by 4.0", "commercial"),
        ("CC-BY-SA-4.0", "commercial"),
        ("CC BY-NC", "noncommercial"),
        ("CC-BY-NC-SA-4.0", "noncommercial"),
        ("CC-BY-ND-4.0", "restricted"),
        ("CC-BY-NC-ND-4.0", "restricted"),
        ("TDM", "restricted"),
        ("", "restricted"),
        (None, "restricted"),
    ],
)
def test_licence_classes(licence: str | None, expected: str) -> None:
    assert licence_class(licence) == expected


@pytest.mark.parametrize("layout", ["parquet", "json"])
def test_the_main_job_reads_it_without_conversion(run: RunFolder, tmp_path: Path, layout: str) -> None:
    folder = assemble(run) / "commercial"
    for kind, n in (("alignment", 4), ("instruction", 3)):
        path = folder / kind if layout == "parquet" else folder
        source = open_source("s", SourceSpec(adapter="pubmedvision", config=kind, path=str(path)), tmp_path / "cache")
        samples = [source.sample(i) for i in range(len(source))]
        assert len(samples) == n
        assert [len(sample.images) for sample in samples] == [1, 3, 1, 1][:n]
        assert samples[1].messages[0].content.count("<image>") == 3
        # PubMedVision's own files have no column for the article.
        article = {"article": "PMC1.1"} if layout == "parquet" else {}
        assert samples[0].meta == {"modality": "X-Ray", "body_part": "Chest", **article}


def test_both_layouts_hold_the_same(run: RunFolder) -> None:
    folder = assemble(run) / "commercial"
    written = json.loads((folder / "PubMedVision_Alignment_VQA.json").read_text())
    assert list(written[0]) == ["id", "image", "conversations", "modality", "body_part"]
    stored = [row for file in sorted((folder / "alignment").iterdir()) for row in pq.read_table(file).to_pylist()]
    assert [row["conversations"] for row in written] == [row["conversations"] for row in stored]
    with zipfile.ZipFile(folder / "images_0.zip") as archive:
        for row, other in zip(written, stored, strict=True):
            assert [archive.read(name) for name in row["image"]] == [image["bytes"] for image in other["image"]]


def test_shards_are_split_by_size_and_numbered(run: RunFolder) -> None:
    out = assemble(run, shard_bytes=1, pubmedvision_files=False)
    names = sorted(path.name for path in (out / "commercial/alignment").iterdir())
    assert names == [f"train-{n:05d}-of-00004.parquet" for n in range(4)]
    assert not (out / "commercial/PubMedVision_Alignment_VQA.json").exists()
    assert sorted(path.name for path in out.iterdir()) == ["commercial", "noncommercial", "restricted"]
    assert pq.ParquetFile(out / "commercial/alignment" / names[0]).schema_arrow.equals(FEATURES.arrow_schema)


def test_a_task_done_twice_leaves_its_rows_once(run: RunFolder) -> None:
    out = assemble(run, shard_bytes=1)
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.parquet")}
    shutil.rmtree(out)
    made = assemble_pass(run, Assemble(shard_bytes=1), 4)
    for rank in (0, 0, 1, 2, 2, 3):
        made.steps[1].run(made.steps[0].run(None, rank, 4), rank, 4)
    finish(out, pubmedvision_files=True)
    finish(out, pubmedvision_files=True)
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*.parquet")} == before


def test_an_interrupted_finish_starts_over(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "images_0.zip").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.assemble._write_pubmedvision_files", fail)
        assemble(run)
    finish(run.out, pubmedvision_files=True)
    assert rows_by_class(run.out)["commercial"] == {"alignment": 4, "instruction": 3}
    assert zipfile.ZipFile(run.out / "commercial/images_0.zip").testzip() is None


def test_nothing_to_assemble_is_said(tmp_path: Path) -> None:
    run = complete_stage(tmp_path / "run", "reformat", [[]])
    with pytest.raises(UserError, match="no row is left to assemble"):
        assemble(run)


def test_what_people_wrote_is_kept_word_for_word(tmp_path: Path) -> None:
    texts = {"history": "Pain.", "findings": "A cyst.", "boxes": "(1, 2, 3, 4)", "discussion": "Cysts are common."}
    told = {"context": tuple(texts.values()), "sections": tuple(texts), "collection": "cases"}
    rows = [
        described(1, caption="CT with a cyst.", **told),
        described(2, collection="slices", annotated=False),
        described(3, caption="", context=("Cysts.",), sections=("discussion",), collection="cases"),
        described(4),
    ]
    out = assemble(complete_stage(tmp_path / "run", "reformat", [rows]))
    kept = [row for file in (out / "commercial/human").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert [row["pair"] for row in kept] == ["PMC1.1-f1", "PMC3.1-f1"]
    request, findings, question, discussion = (turn["value"] for turn in kept[0]["conversations"])
    assert request.startswith("History: Pain.\n") and findings == "CT with a cyst.\nA cyst."
    assert question.endswith("why?") and discussion == "Cysts are common."
    assert [turn["value"] for turn in kept[1]["conversations"]][1:] == ["Cysts."]
    assert kept[0]["method"] == "human" and kept[0]["model"] is None and kept[0]["evidence"] == []
    spec = SourceSpec(adapter="pubmedvision", config="instruction", path=str(out / "commercial/human"))
    assert len(open_source("human", spec, tmp_path / "cache")) == 2


def test_a_row_is_as_restricted_as_its_evidence(tmp_path: Path) -> None:
    def row(number: int, *licences: str) -> Pair:
        return described(number, evidence=("case:x",), evidence_licences=licences)

    rows = [row(1, "CC0"), row(2, "CC-BY-4.0", "CC-BY-NC-4.0"), row(3, "CC-BY-NC", "own agreement"), row(4, "")]
    out = assemble(complete_stage(tmp_path / "run", "reformat", [rows]))
    counts = {where: kinds["alignment"] for where, kinds in rows_by_class(out).items()}
    assert counts == {"commercial": 1, "noncommercial": 1, "restricted": 2}
    (file,) = (out / "commercial/instruction").glob("*.parquet")
    assert pq.read_table(file)["evidence"].to_pylist() == [["case:x"]]
