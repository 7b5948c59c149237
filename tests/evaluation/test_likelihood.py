"""Likelihoods from one prefill are those of a full forward for each option."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llava.modeling_llava import LlavaModel

from huatuo_vision.evaluation import generate, likelihood
from huatuo_vision.evaluation.protocols import PROTOCOLS, Decoding
from huatuo_vision.schema import UserError
from tests.evaluation.helpers import read_lines
from tests.evaluation.tiny import mixed_rows, save_tiny_model

PROTOCOL = replace(PROTOCOLS["default"], decoding=Decoding(max_new_tokens=4))
TEMPLATES = Path(likelihood.__file__).parents[1] / "model" / "chat_templates"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=2)


@pytest.fixture(scope="module")
def asked(model) -> generate.Asked:
    return generate.load(model, PROTOCOL, torch.device("cpu"), blind=False)


@pytest.fixture
def run(model, tmp_path):
    calls = iter(range(100))

    def run(rows, *, batch_size=4, processes=1, blind=False, protocol=PROTOCOL) -> dict[str, dict]:
        out = tmp_path / f"out{next(calls)}"
        out.mkdir()
        for rank in range(processes):
            world = SimpleNamespace(
                process_index=rank, num_processes=processes, is_main_process=rank == 0, device=torch.device("cpu")
            )
            likelihood.answer(rows, model, protocol, world, out, blind=blind, batch_size=batch_size)
        lines = [line for path in out.iterdir() for line in read_lines(path)]
        assert len(lines) == len(rows)
        return {line["id"]: line for line in lines}

    return run


@torch.inference_mode()
def full_forward(asked: generate.Asked, row, text: str, lead: str = "") -> float:
    """Mean log-probability of the text's tokens after the row's prompt: no cache, no batch, no padding."""
    images = [generate.load_image(ref, row.id).image for ref in row.images]
    prompt = generate.render_prompt(asked.processor, asked.protocol, row, blind=False)
    lengths, inputs = [], None
    for whole in (prompt, prompt + lead + text):
        inputs = asked.processor(images=images or None, text=[whole], add_special_tokens=False, return_tensors="pt")
        lengths.append(inputs["input_ids"].shape[1])
    ids = inputs["input_ids"][0]
    logs = asked.model(**inputs, use_cache=False).logits[0].log_softmax(dim=-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(*lengths)) / (lengths[1] - lengths[0])


def softmax(scores: list[float]) -> list[float]:
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def test_both_scorings_equal_a_full_forward_per_option(run, asked):
    rows = [row for row in mixed_rows(10) if row.options is not None]
    assert len({len(row.images) for row in rows}) == 3 and len({len(row.options) for row in rows}) > 2
    found = run(rows, batch_size=8)
    for row in rows:
        letters = "ABCDE"[: len(row.options)]
        letter = softmax([full_forward(asked, row, letter) for letter in letters])
        text = softmax([full_forward(asked, row, option) for option in row.options])
        assert found[row.id]["likelihood"]["letter"] == pytest.approx(letter, abs=1e-4)
        assert found[row.id]["likelihood"]["text"] == pytest.approx(text, abs=1e-4)
        assert found[row.id]["response"] == letters[letter.index(max(letter))]
    assert len({answer["response"] for answer in found.values()}) > 1, "too alike to tell a wrong answer by"


def test_likelihoods_depend_on_their_row_alone(run):
    rows = [row for row in mixed_rows() if row.options is not None]
    one = run(rows, batch_size=1)
    for other in (run(rows, batch_size=3), run(rows, batch_size=50), run(rows, batch_size=2, processes=2)):
        for id, answer in one.items():
            assert other[id] | {"likelihood": None} == answer | {"likelihood": None}
            for scoring, probabilities in answer["likelihood"].items():
                assert other[id]["likelihood"][scoring] == pytest.approx(probabilities, abs=5e-6)
                assert sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_images_are_seen_once_and_only_when_sighted(run, monkeypatch):
    rows = [row for row in mixed_rows(8) if row.images and row.options is not None]
    seen = []
    original = LlavaModel.get_image_features

    def count(self, pixel_values, **kwargs):
        seen.append(len(pixel_values))
        return original(self, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(LlavaModel, "get_image_features", count)
    sighted = run(rows, batch_size=50)
    assert seen == [sum(len(row.images) for row in rows)]
    blind = run(rows, batch_size=50, blind=True)
    assert len(seen) == 1
    assert any(blind[id]["likelihood"] != sighted[id]["likelihood"] for id in blind)


def test_open_rows_are_left_to_generation(run, capfd):
    rows = mixed_rows(10)
    found = run(rows)
    assert "2 open questions have no options to score" in capfd.readouterr().err
    for row in rows:
        assert ("likelihood" in found[row.id]) == (row.options is not None)
        assert ("new_tokens" in found[row.id]) == (row.options is None)


def test_an_option_without_text_gets_no_probability(run):
    row = replace(mixed_rows(2)[1], options=("liver", " ", "a very long option of many tokens"))
    probabilities = run([row])["row 1"]["likelihood"]["text"]
    assert probabilities[1] == 0 and probabilities[0] > 0 and probabilities[2] > 0


def test_a_protocol_without_letters_is_refused(run):
    row = replace(mixed_rows(2)[1], options=("Yes", "No"))
    with pytest.raises(UserError, match="llava-med asks made-up row 'row 1' without its options' letters"):
        run([row], protocol=PROTOCOLS["llava-med"])
    likelihood.check_rows([row], PROTOCOLS["huatuo-2024"])


@pytest.mark.parametrize(
    ("template", "lead"), [("huatuo", ""), ("chatml", ""), ("llama3", ""), ("vicuna", " "), ("mistral", " ")]
)
def test_an_answer_begins_where_the_template_lets_it(asked, template, lead):
    before = asked.processor.chat_template
    asked.processor.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    try:
        assert likelihood.answer_lead(asked) == lead
        row = mixed_rows(2)[1]
        batch, continuations = likelihood._with_continuations(asked, [row], lead)
        found = likelihood.score(asked, batch, continuations)[0]
        letters = [full_forward(asked, row, letter, lead) for letter in "ABC"[: len(row.options)]]
        assert found.letter == pytest.approx(softmax(letters), abs=1e-4)
    finally:
        asked.processor.chat_template = before
