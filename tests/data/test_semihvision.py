"""The whole way on synthetic sources with the stand-in: what evidence changes, and that nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("datatrove")

import yaml

from data.phantom_cases import FOLLOW_UPS, RULES, make_cases, stated
from data.retrieve import evidence_of
from data.stand_in import MODEL, serve
from data.tables import RunFolder
from tests.data.test_build import run

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def stand_in() -> Iterator[None]:
    with serve() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", url)
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


def built(name: str, source: Path, out: Path, **changed: object) -> RunFolder:
    """A shipped configuration, on these sources."""
    values = yaml.safe_load((DATA / f"{name}.yaml").read_text()) | {"executor": {"workers": 1}} | changed
    if "retrieve" in values:
        values["retrieve"]["guidelines"]["path"] = str(source / "guidelines.jsonl")
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values))
    run(config, source, out)
    return RunFolder(out)


def rows(run_: RunFolder, kind: str) -> dict[str, dict]:
    files = sorted(run_.out.glob(f"*/{kind}/*.parquet"))
    return {row["pair"]: row for file in files for row in pq.read_table(file).to_pylist()}


@pytest.mark.slow
def test_two_builds_differ_in_what_the_guideline_tells_alone(tmp_path: Path, stand_in: None) -> None:
    source = tmp_path / "source"
    make_cases(source, cases=12, pictures=48, test=0, volumes=0, seed=0)
    found = {
        name: rows(built(f"evidence-{name}", source, tmp_path / name), "instruction") for name in ("with", "without")
    }
    assert found["with"].keys() == found["without"].keys() and len(found["with"]) == 18 + 48
    right = {}
    for name, of in found.items():
        asked = {pair: row for pair, row in of.items() if row["method"] == "mllm_grounded"}
        tags = {row["id"]: row["tags"] for row in _table(source / "slices/rows.csv")}
        truth = {pair: RULES[stated(tags[pair.removeprefix("slices-")])] for pair in asked}
        answers = {pair: FOLLOW_UPS["ABCD".index(row["conversations"][1]["value"])] for pair, row in asked.items()}
        right[name] = sum(answers[pair] == truth[pair] for pair in asked) / len(asked)
        assert all(bool(row["evidence"]) == (name == "with") for row in asked.values())
    # A guess is right by 0.25 +- 0.0625; the same in every run.
    assert right["with"] > 0.85 and 0.05 < right["without"] < 0.45
    for pair, row in found["with"].items():
        other = found["without"][pair]
        assert row["conversations"][0] == other["conversations"][0] and row["image"] == other["image"]
        if row["method"] == "mllm_reformatted":
            assert row["conversations"] == other["conversations"]


def _table(path: Path) -> list[dict]:
    import csv

    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_kind_of_source_ends_in_one_data_set(tmp_path: Path, stand_in: None) -> None:
    pytest.importorskip("nibabel")
    source = tmp_path / "source"
    make_cases(source, cases=6, pictures=20, test=0, volumes=2, seed=0)
    # Without the guard, which would draw its 600 pictures first.
    dedup = {"max_hash_distance": 0, "min_cosine": None}
    made = built("semihvision-demo", source, tmp_path / "run", dedup=dedup, balance={"cap": 9})
    described, human = rows(made, "alignment"), rows(made, "human")
    assert {row["collection"] for row in described.values()} == {"cases", "captions", "reports", "slices", "volumes"}
    assert {row["collection"] for row in human.values()} == {"cases", "captions", "reports"}
    assert {row["model"] for row in described.values()} == {MODEL}
    for pair, row in described.items():
        assert bool(row["evidence"]) == (row["collection"] in ("slices", "volumes")), pair
    # What was written with a case of theirs is as restricted as the cases.
    for file in made.out.glob("commercial/alignment/*.parquet"):
        assert not any("case:cases-" in e for row in pq.read_table(file)["evidence"].to_pylist() for e in row)
    for rank in range(made.tasks("balance")):
        article = {pair.id: pair.article for pair in made.pairs("balance", rank)}
        for row_id, evidence in evidence_of(made, rank).items():
            assert not any(article[row_id] in e.id for e in evidence)
    card = (made.out / "README.md").read_text()
    assert "SemiHVision-style on open data" in card and "No reproduction" in card
    assert "| slices | no | 20 | 9 | 9 |" in card and "| non-medical | 58.03 | 6.69 | none |" in card
    assert "without_text 2" in card.replace("\\_", "_") and (made.out / "balance.png").stat().st_size > 5000
