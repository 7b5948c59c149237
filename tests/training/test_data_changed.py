"""A data set that changed under a run is refused, even where no count changes; --fresh is the way out."""

import json
import shutil

import pytest
import yaml

from tests.training.conftest import TINY


@pytest.mark.slow
def test_a_data_file_that_changed_between_the_runs_is_refused_until_fresh(launcher, finished, tmp_path):
    made = next(launcher.hf_home.rglob("PubMedVision_InstructionTuning_VQA.json")).parent
    own = shutil.copytree(made, tmp_path / "data")
    recipe = yaml.safe_load(TINY.read_text())
    recipe["data"]["questions"] = {"adapter": "pubmedvision", "config": "instruction", "path": str(own)}
    file, out = tmp_path / "own.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(recipe))
    launcher.run_and_kill(out, lambda: (out / "instruct/checkpoint-5").exists(), recipe=file)
    questions = own / "PubMedVision_InstructionTuning_VQA.json"
    rows = json.loads(questions.read_text())
    said = rows[0]["conversations"][1]["value"]
    rows[0]["conversations"][1]["value"] = said.swapcase()  # as long as before
    questions.write_text(json.dumps(rows))
    sentence = " ".join(launcher.run(out, recipe=file, code=2).stderr.split())
    assert "the data of phase instruct changed since it began (96 samples with digest" in sentence
    assert "--fresh" in sentence
    launcher.run(out, "--fresh", "--phase", "align", recipe=file)
    assert (tmp_path / "run.old-1/instruct/checkpoint-5").exists()
