"""A finished data set goes to the Hub by the command, and comes back as what it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("datatrove")


from data.card import write_card
from data.tables import RunFolder
from tests.data.rows import described
from tests.data.test_card import config, finished
from tests.fake_hub import FakeHub

ROOT = Path(__file__).parents[2]
LOAD = """
import json
from datasets import load_dataset
rows = load_dataset("org/set", "alignment-commercial", split="train")
print(json.dumps([list(rows["id"]), rows[1]["image"][1].size, rows[0]["conversations"][1]["value"]]))
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = finished(tmp_path / "run", [described(1), described(2, n_images=2), described(3, licence="ours")])
    write_card(run, config())
    return run


def publish(hub: FakeHub, run: RunFolder, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data.publish", "--out", str(run.path), "--repo", "org/set", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=hub.environment(home), capture_output=True, text=True, check=False, timeout=120
    )


def test_pushed_and_loaded_again(hub: FakeHub, run: RunFolder, tmp_path: Path) -> None:
    done = publish(hub, run, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.url}/datasets/org/set/commit/")
    files = hub.files("org/set", kind="datasets")
    expected = {p.relative_to(run.out).as_posix() for p in run.out.rglob("*.parquet")}
    assert files.keys() - {".gitattributes"} == expected | {"README.md", "build.json", "funnel.png", "labels.png"}
    environment = hub.environment(tmp_path / "other_home")
    loaded = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, timeout=120)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    ids, size, text = json.loads(loaded.stdout)
    assert (ids, size, text) == (["Alignment_VQA_1", "Alignment_VQA_2"], [48, 40], "Description 1.")
    # Again: nothing new. Another data set: not without being asked.
    again = publish(hub, run, tmp_path / "home")
    assert again.returncode == 0 and hub.files("org/set", kind="datasets") == files
    build = json.loads((run.out / "build.json").read_text())
    (run.out / "build.json").write_text(json.dumps(build | {"fingerprint": "another"}))
    (run.out / "commercial/instruction/train-00000-of-00001.parquet").unlink()
    refused = publish(hub, run, tmp_path / "home")
    assert refused.returncode == 2 and "already holds tiny-set (fingerprint assemble-1)" in refused.stderr
    assert publish(hub, run, tmp_path / "home", "--overwrite").returncode == 0
    assert not any("commercial/instruction" in p for p in hub.files("org/set", kind="datasets") if "non" not in p)


def test_restricted_rows_never_go_public(hub: FakeHub, run: RunFolder, tmp_path: Path) -> None:
    refused = publish(hub, run, tmp_path / "home", "--public")
    assert refused.returncode == 2 and "class restricted" in refused.stderr and "Traceback" not in refused.stderr
    assert not hub.sent("POST")


def test_a_key_in_the_card_is_refused(hub: FakeHub, run: RunFolder, tmp_path: Path) -> None:
    with (run.out / "README.md").open("a") as file:
        file.write("hf_" + "Zq7" * 11)
    refused = publish(hub, run, tmp_path / "home")
    assert refused.returncode == 2 and "Hugging Face token" in refused.stderr
    assert not hub.sent("POST")


def test_an_unfinished_run_is_refused(hub: FakeHub, run: RunFolder, tmp_path: Path) -> None:
    (run.out / "build.json").unlink()
    assert "has no build.json" in publish(hub, run, tmp_path / "home").stderr
    (run.logging_dir("assemble") / "completions/00000").unlink()
    assert "is not complete" in publish(hub, run, tmp_path / "home").stderr
