"""The demonstration's articles: the same for the same seed, and what is planted is what the builder finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

import yaml
from datasets import load_dataset

from data.funnel import funnel
from data.mllm.answers import judge
from data.mllm.prompts import render_prompt, scenarios
from data.phantom_articles import EXPECTED_FILE, make_articles
from data.sources.jats import BadArticle, parse_article
from data.stand_in import MODEL, reply
from data.tables import RunFolder
from huatuo_vision.openai_endpoint import Reply
from huatuo_vision.schema import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("articles") / "made"
    make_articles(folder, 12, 0)
    return folder


def test_the_same_seed_gives_the_same_articles(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.phantom_articles.LABELLED", 4)
    make_articles(tmp_path / "again", 12, 0)
    make_articles(tmp_path / "other", 12, 1)

    def contents(folder: Path) -> dict[Path, bytes]:
        files = [folder / EXPECTED_FILE, *(path for path in (folder / "articles").rglob("*") if path.is_file())]
        return {path.relative_to(folder): path.read_bytes() for path in files}

    assert contents(made) == contents(tmp_path / "again") != contents(tmp_path / "other")


def test_there_already(made: Path, tmp_path: Path) -> None:
    before = (made / EXPECTED_FILE).stat().st_mtime_ns
    assert make_articles(made, 12, 0)["rows"] and (made / EXPECTED_FILE).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds something else"):
        make_articles(made, 12, 1)
    with pytest.raises(UserError, match="expected 11"):
        make_articles(tmp_path / "few", 3, 0)


def test_the_articles_read_as_they_were_meant(made: Path) -> None:
    broken, figures = 0, {}
    for path in sorted(made.rglob("*.xml")):
        try:
            article = parse_article(path.read_bytes())
        except BadArticle:
            broken += 1
            continue
        figures[path.parent.name] = article.figures
        assert article.source and all(figure.mentions for figure in article.figures)
    assert broken == 2
    sound = figures["phantom-0"]
    assert [len(figure.graphics) for figure in sound] == [1, 3, 1]
    assert len(sound[1].mentions) == 2  # its own, and the range from the first to the third
    assert "onclick" not in sound[0].caption and "<script" not in sound[0].caption


def test_the_stand_in_answers_as_it_was_asked() -> None:
    for method in ("mllm_reformatted", "llm_reformatted", "mllm_distill"):
        prompt = render_prompt(method, 1, scenarios()[0], "Radiograph of the knee.\n\nSeen from the side (Fig. 2).")
        sent = reply({"messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}]})
        answer = judge(Reply(sent["choices"][0]["message"]["content"], None, None)).answer
        assert sent["model"] == MODEL and answer is not None
        if method == "mllm_distill":
            assert "cannot see" in answer.description and answer.modality == "Others"
        else:
            assert answer.description == "Radiograph of the knee. Seen from the side."
            assert (answer.modality, answer.body_part) == ("X-Ray", "Lower Limb")


@pytest.mark.slow
def test_the_demonstration_finds_what_was_planted(made: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> None:
        command = [sys.executable, "-m", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    config = yaml.safe_load((ROOT / "data/demo.yaml").read_text())
    config["image_filter"]["classifier"] = str(tmp_path / "classifier.json")
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(config))
    rows = made / "labelled/labels.jsonl"
    run("data.filters.classifier", "--rows", rows, "--config", path, "--out", tmp_path / "classifier.json")
    out = tmp_path / "build"
    arguments = ("data.build", "--config", path, "--source", made / "articles", "--out", out)
    run("data.stand_in", "--", sys.executable, "-m", *arguments)
    stages = funnel(RunFolder(out))
    expected = json.loads((made / EXPECTED_FILE).read_text())
    dropped = {reason: n for stage in stages for reason, n in stage.counts.dropped.items()}
    assert stages[0].counts.rows_in == expected["rows"]
    assert dropped == expected["dropped"] and stages[-1].counts.rows_out == expected["kept"]
    for name in ("alignment", "instruction"):
        loaded = load_dataset(
            "parquet", data_dir=str(out / f"out/commercial/{name}"), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert set(loaded["model"]) == {MODEL} and set(loaded["method"]) == {"mllm_reformatted"}
        assert any(len(images) == 3 for images in loaded["image"])
    text = (out / "out/README.md").read_text()
    assert "Demonstration data" in text and MODEL in text and "onclick" not in text
    # Once more: nothing is asked, nothing changes (the stand-in is not even there).
    environment = os.environ | {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
    command = [sys.executable, "-m", *map(str, arguments)]
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and (out / "out/README.md").read_text() == text
