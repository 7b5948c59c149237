"""What the Hub is told of a result, read back by huggingface_hub's own parsers."""

import huggingface_hub
import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from huggingface_hub.repocard import metadata_load

from huatuo_vision.evaluation.benchmarks import BENCHMARKS
from huatuo_vision.evaluation.hub_results import DATASETS, write_results
from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.schema import UserError
from tests.evaluation.results import Result, choice

CARD = """---
license: apache-2.0
library_name: transformers
x-own: {kept: [1, 2], empty: null}
model-index:
- name: a-model
  results:
  - task:
      type: visual-question-answering
    dataset:
      type: BoKelvin/SLAKE
      name: SLAKE by someone else
      config: English
      split: test
    metrics:
    - type: accuracy
      value: 12.5
---

# A model

Text with --- and

---

more | text.
"""


def made(tmp_path, right=15, names=("slake-en", "huatuo-slake", "huatuo-vqa-rad", "phantom"), **changed):
    answers = [choice(name, number, number < right) for name in names for number in range(20)]
    return Result(tmp_path / "eval", answers, **changed).scores


def entries(folder, name):
    return parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / f"{name}.yaml").read_text()))


def test_entries_read_back(tmp_path):
    written = write_results(tmp_path, made(tmp_path))
    names = ["slake-en", "huatuo-slake", "huatuo-vqa-rad"]  # not the phantoms: they are no data set of the Hub
    assert written == [*(tmp_path / ".eval_results" / f"{name}.yaml" for name in names), tmp_path / "README.md"]
    (entry,) = entries(tmp_path, "huatuo-slake")
    assert isinstance(entry, EvalResultEntry)
    assert (entry.dataset_id, entry.task_id) == (
        "FreedomIntelligence/Medical_Multimodal_Evaluation_Data", "huatuo-slake",
    )  # fmt: skip
    assert (entry.value, entry.dataset_revision, entry.date) == (75.0, "f" * 40, None)
    for said in ("default", PROTOCOLS["default"].hash, "n 20", "53.1 to 88.8", "0123456789abcdef"):
        assert said in entry.notes


def test_model_index_reads_back(tmp_path):
    write_results(tmp_path, made(tmp_path))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.model_name == "a"
    micro = [result for result in data.eval_results if result.metric_type == "accuracy"]
    assert [(r.dataset_type, r.dataset_config, r.metric_value) for r in micro] == [
        ("BoKelvin/SLAKE", "English", 75.0),
        ("FreedomIntelligence/Medical_Multimodal_Evaluation_Data", "SLAKE_test", 75.0),
        ("FreedomIntelligence/Medical_Multimodal_Evaluation_Data", "VQA-RAD_test", 75.0),
    ]
    assert all(result.task_type == "visual-question-answering" for result in micro)
    assert micro[0].metric_args["protocol"] == "default"
    assert micro[0].metric_args["protocol_hash"] == PROTOCOLS["default"].hash
    assert micro[0].metric_args["ci95"] == [53.13, 88.81]
    macro = [result for result in data.eval_results if result.metric_type == "macro_accuracy"]
    assert len(macro) == 3 and macro[0].metric_name == "accuracy (macro over subject)"


def test_the_rest_of_the_card_stays(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(CARD)
    write_results(tmp_path, made(tmp_path))
    assert card.read_text().partition("\n---\n")[2] == CARD.partition("\n---\n")[2]
    before, after = yaml.safe_load(CARD.split("---")[1]), metadata_load(card)
    assert list(before) == list(after)
    index, theirs = after.pop("model-index"), before.pop("model-index")
    assert after == before
    assert index[0]["name"] == "a-model"
    assert index[0]["results"][0] == theirs[0]["results"][0], "another's result of the same data set is not ours"
    assert len(index[0]["results"]) == 4


def test_writing_again_replaces_and_repeats_nothing(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    write_results(tmp_path, made(tmp_path, right=5))
    write_results(tmp_path, made(tmp_path, right=15))
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    values = [result.metric_value for result in results if result.metric_type == "accuracy"]
    assert values == [12.5, 75.0, 75.0, 75.0]
    assert entries(tmp_path, "slake-en")[0].value == 75.0
    first = (tmp_path / "README.md").read_bytes()
    write_results(tmp_path, made(tmp_path, right=15))
    assert (tmp_path / "README.md").read_bytes() == first
    write_results(tmp_path, made(tmp_path, names=("slake-en",), right=10))
    assert len(ModelCard.load(tmp_path / "README.md").data.eval_results) == 7, "the other benchmarks' results stay"


@pytest.mark.parametrize("changed", [{"blind": True}, {"limit": 20}, {"expected": {"slake-en": 21}}])
def test_what_cannot_be_compared_is_not_published(tmp_path, changed):
    scores = made(tmp_path, names=("slake-en",), **changed)
    assert write_results(tmp_path, scores) == []
    assert not (tmp_path / "README.md").exists() and not (tmp_path / ".eval_results").exists()


def test_local_data_has_no_commit(tmp_path):
    write_results(tmp_path, made(tmp_path, revision="sha256 " + "0" * 64))
    assert entries(tmp_path, "slake-en")[0].dataset_revision is None


def test_without_the_entry_class_there_is_model_index_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "EvalResultEntry", None, raising=False)
    assert write_results(tmp_path, made(tmp_path)) == [tmp_path / "README.md"]
    assert ModelCard.load(tmp_path / "README.md").data.eval_results


@pytest.mark.parametrize(
    ("metadata", "said"),
    [("license: [", "not a YAML"), ("- a", "not a YAML"), ("model-index: [{results: 1}]", "not in the Hub's form")],
)
def test_a_broken_card_is_refused_and_left(tmp_path, metadata, said):
    card = tmp_path / "README.md"
    card.write_text(f"---\n{metadata}\n---\n# A\n")
    with pytest.raises(UserError, match=said):
        write_results(tmp_path, made(tmp_path))
    assert card.read_text() == f"---\n{metadata}\n---\n# A\n"
    assert not (tmp_path / ".eval_results").exists()


def test_every_benchmark_has_its_data_set():
    without = {"phantom", "phantom-large", "phantom-follow-up", "case-challenge", "jama-clinical-challenge"}
    assert DATASETS.keys() == BENCHMARKS.keys() - without
    places = [(dataset.id, dataset.config, dataset.split) for dataset in DATASETS.values()]
    assert len(set(places)) == len(places), "two benchmarks in one place would overwrite each other"
