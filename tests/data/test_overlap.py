"""Training rows that hold evaluation cases are found by case, by picture and by words; clean ones are left alone."""

import io
import json
import sys

import pytest
from huggingface_hub import constants
from PIL import Image

from data import overlap
from data.dedup.guard import case_keys
from huatuo_vision.schema import UserError
from tests.data.test_dedup import textured
from tests.evaluation import layouts

RECIPE = "recipes/mini/captions.yaml"
DISCUSSION = (
    "The intermuscular fascial oedema together with mechanic's hands points to the antisynthetase syndrome, and not to "
    "gout, which spares the muscles of the thigh."
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))


def saved(picture: Image.Image, kind="JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def cases(tmp_path):
    """MedThinkVQA's layout: case 19250 with the pictures 0 and 1, case 19251 with 2 and 3."""
    rows = [layouts.medthinkvqa_row(0, discussion=DISCUSSION), layouts.medthinkvqa_row(1)]
    folder = layouts.medthinkvqa(tmp_path / "cases", rows)
    for number, path in enumerate(sorted((folder / "images").rglob("*.jpg"))):
        path.write_bytes(saved(textured(number), quality=92))
    return folder


def training(folder, rows) -> None:
    """rows: id -> (picture, caption)."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for name, (picture, caption, *more) in rows.items():
        file = f"images/{name.replace('/', '_')}.png"
        (folder / file).write_bytes(picture if isinstance(picture, bytes) else saved(picture, "PNG"))
        lines.append({"id": name, "image": file, "caption": caption} | (more[0] if more else {}))
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def command(tmp_path, cases, monkeypatch):
    def run(*more, benchmarks=None, out="out", workers=1):
        named = benchmarks or [f"medthinkvqa={cases}"]
        arguments = ["--recipe", RECIPE, "--benchmarks", *named, "--out", tmp_path / out, "--workers", workers, *more]
        for source in ("captions", "mentions"):
            arguments += ["--set", f"data.{source}.path={tmp_path / 'train'}"]
        arguments += ["--set", "data.mentions.columns={context: caption}"]
        monkeypatch.setattr(sys, "argv", ["overlap", *map(str, arguments)])
        return overlap.main()

    return run


def found(tmp_path, out="out", source="captions"):
    lines = (tmp_path / out / "overlaps.jsonl").read_text().splitlines()
    return {
        (one["id"], one["reason"]): one["evaluation_row"] for one in map(json.loads, lines) if one["source"] == source
    }


CLEAN = "A chest radiograph of a child with pneumonia in the right lower lobe and a small effusion."


def test_all_three_ways_and_nothing_else(tmp_path, command, capsys):
    shown = textured(2)
    training(
        tmp_path / "train",
        {
            "clean": (textured(100), CLEAN),
            "eurorad-19251-f1": (textured(101), CLEAN),
            "in-a-column": (textured(102), CLEAN, {"article": "eurorad/19250"}),
            "smaller": (shown.resize((180, 135)), CLEAN),
            "quoting": (textured(103), f"Teaching file. {DISCUSSION.upper()}"),
            "case 1925": (textured(104), "Figure 19250 of 19251 cases is not one of theirs, although it counts them."),
            "broken": (b"no picture", CLEAN),
        },
    )
    assert command() == 0
    assert found(tmp_path) == {
        ("eurorad-19251-f1", "case"): "medthinkvqa:eurorad/19251",
        ("in-a-column", "case"): "medthinkvqa:eurorad/19250",
        ("smaller", "picture"): "medthinkvqa:eurorad/19251",
        ("quoting", "words"): "medthinkvqa:eurorad/19250",
    }
    report = json.loads((tmp_path / "out" / "overlap.json").read_text())
    captions = report["sources"]["captions"]
    assert (captions["rows"], captions["overlapping"]) == (7, 4) and sum(captions["unreadable"].values()) == 1
    assert captions["rows_by_reason"] == {"case": 2, "picture": 1, "words": 1}
    assert captions["overlaps_by_benchmark"] == {"medthinkvqa": 4}
    assert report["benchmarks"]["medthinkvqa"] | {"revision": ""} == {
        "revision": "", "questions": 2, "different_questions": 2, "comparable_questions": 2, "references": 2,
        "images": 4,
    }  # fmt: skip
    # Both sources of the recipe are looked at.
    assert report["overlapping_rows"] == 8 and found(tmp_path, source="mentions") == found(tmp_path)
    assert "training rows that overlap" in capsys.readouterr().out
    assert command("--require-clean") == 1


def test_cases_without_a_number_by_the_columns_that_name_them(tmp_path, command):
    mine = layouts.cases(tmp_path / "mine")
    rows = {"a": (textured(1), CLEAN, {"case": "case-1"}), "case-2": (textured(2), CLEAN, {"article": "case-20"})}
    training(tmp_path / "train", rows)
    assert command(benchmarks=[f"case-challenge={mine}"]) == 0
    assert found(tmp_path) == {("a", "case"): "case-challenge:case-1"}


def test_a_clean_set_is_clean(tmp_path, command):
    training(tmp_path / "train", {"clean": (textured(100), CLEAN), "text": (textured(101), "Nothing of theirs.")})
    assert command("--require-clean") == 0
    assert found(tmp_path) == {}


@pytest.mark.slow
def test_several_processes_find_the_same(tmp_path, command, monkeypatch):
    monkeypatch.setattr(overlap, "SHARD_ROWS", 2)
    training(tmp_path / "train", {f"r{n}": (textured(n), CLEAN) for n in range(5)})
    assert command() == command(workers=2, out="two") == 0
    assert found(tmp_path) == found(tmp_path, "two") and len(found(tmp_path)) == 4


def test_a_stopped_check_goes_on_and_changed_rows_are_read_again(tmp_path, command, monkeypatch):
    monkeypatch.setattr(overlap, "SHARD_ROWS", 2)
    rows = {f"r{n}": (textured(100 + n), CLEAN) for n in range(4)}
    training(tmp_path / "train", rows)
    seen = []
    looking = overlap._seen

    def stopping(source, row, known):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append((source.name, row))
        return looking(source, row, known)

    monkeypatch.setattr(overlap, "_seen", stopping)
    with pytest.raises(KeyboardInterrupt):
        command()
    first = list(seen)
    assert first == [("captions", 0), ("captions", 1), ("captions", 2), ("captions", 3), ("mentions", 0)]
    seen.clear()
    monkeypatch.setattr(overlap, "_seen", lambda *args: seen.append((args[0].name, args[1])) or looking(*args))
    command()
    assert seen == [("mentions", n) for n in range(4)]
    seen.clear()
    command()
    assert seen == []
    (tmp_path / "train" / "images" / "r3.png").write_bytes(saved(textured(0), "PNG"))
    command()
    assert seen == [("captions", 2), ("captions", 3), ("mentions", 2), ("mentions", 3)]
    assert found(tmp_path) == {("r3", "picture"): "medthinkvqa:eurorad/19250"}


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("https://www.eurorad.org/case/19254", {"eurorad/19254"}),
        ("eurorad_case_19254.jpg", {"eurorad/19254"}),
        ("images/case19254/6D-JPs9h.jpg", {"eurorad/19254"}),
        ("https://jamanetwork.com/journals/jamadermatology/fullarticle/2811083", {"jama/2811083"}),
        ("jama-2811083-2", {"jama/2811083"}),
        ("jama case 2811083", {"jama/2811083"}),
        ("pubmedvision_19254", set()),
        ("19254", set()),
        ("case 12", set()),
        ("eurorad", set()),
    ],
)
def test_cases_by_their_names(text, keys):
    assert set(case_keys(text)) == keys


def test_wrong_words(tmp_path, command):
    training(tmp_path / "train", {"clean": (textured(100), CLEAN)})
    for more, said in ((("--words", "0"), "--words 0"), (("--workers", "-1"), "--workers -1")):
        with pytest.raises(UserError, match=said):
            command(*more)
    with pytest.raises(UserError, match="no such benchmark"):
        command(benchmarks=["nothing"])
    with pytest.raises(UserError, match="can't be downloaded"):
        command(benchmarks=["jama-clinical-challenge"])
