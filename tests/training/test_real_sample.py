"""Real figures with captions and in-text mentions train both phases, by the README's own commands."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.training.conftest import ROOT, Launcher

SAMPLES = os.environ.get("HUATUO_SAMPLES")

pytestmark = pytest.mark.skipif(SAMPLES is None, reason="HUATUO_SAMPLES names no folder with real samples")


@pytest.mark.slow
def test_figures_train_both_phases_and_one_is_described(launcher: Launcher, tmp_path, monkeypatch, capsys):
    folder = Path(SAMPLES).resolve() / "real_sample"
    out = tmp_path / "runs/captions"
    overrides = [f"data.captions.path={folder}", f"data.mentions.path={folder}"]
    arguments = [part for override in overrides for part in ("--set", override)]
    launcher.run(out, *arguments, recipe=ROOT / "recipes/mini/captions.yaml")

    report = json.loads((out / "prepare/report.json").read_text())
    rows = len((folder / "samples.jsonl").read_text().splitlines())
    assert report["sources"]["captions"]["rows"] == rows == report["sources"]["mentions"]["rows"]
    assert report["sources"]["captions"]["dropped"] == {}
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for phase, fall in (("align", 0.8), ("instruct", 0.9)):
        losses = [entry["loss"] for entry in entries if entry["phase"] == phase]
        assert losses[-1] < fall * losses[0], (phase, losses)

    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    shutil.copy(next((folder / "images").glob("*.jpg")), tmp_path / "figure.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    described = capsys.readouterr().out.strip()
    assert len(described.split()) > 5
