"""Generation on random weights: an answer is its row's own, whatever surrounds it."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import logging

from huatuo_vision.evaluation import answers, generate
from huatuo_vision.evaluation.protocols import PROTOCOLS, Decoding
from huatuo_vision.inputs.processor import load_processor
from huatuo_vision.schema import ImageRef, UserError
from tests.evaluation.helpers import read_lines
from tests.evaluation.tiny import mixed_rows, picture, save_tiny_model

GREEDY = replace(PROTOCOLS["default"], decoding=Decoding(max_new_tokens=12))
SAMPLED = replace(
    PROTOCOLS["huatuo-2024"],
    decoding=Decoding(max_new_tokens=12, temperature=0.7, repetition_penalty=1.5, seed=42),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=2)


def world(rank: int = 0, processes: int = 1) -> SimpleNamespace:
    """What `answer` reads of accelerate's PartialState."""
    return SimpleNamespace(
        process_index=rank, num_processes=processes, is_main_process=False, device=torch.device("cpu")
    )


@pytest.fixture
def ask(model, tmp_path):
    """Answers by row id, from as many processes as asked for."""
    calls = iter(range(100))

    def run(rows, protocol, *, batch_size=4, processes=1, blind=False, model=model) -> dict[str, dict]:
        out = tmp_path / f"out{next(calls)}"
        out.mkdir()
        for rank in range(processes):
            generate.answer(rows, model, protocol, world(rank, processes), out, blind=blind, batch_size=batch_size)
        lines = [line for rank in range(processes) for line in read_lines(out / f"responses.rank{rank}.jsonl")]
        assert len(lines) == len(rows)
        return {line["id"]: line for line in lines}

    return run


@pytest.mark.parametrize("protocol", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_depends_on_its_row_alone(ask, protocol):
    rows = mixed_rows()
    one = ask(rows, protocol, batch_size=1)
    assert len({answer["response"] for answer in one.values()}) > 5, "too alike to tell a wrong answer by"
    assert ask(rows, protocol, batch_size=5) == one
    assert ask(rows, protocol, batch_size=50) == one
    assert ask(rows, protocol, batch_size=3, processes=2) == one
    # As after a kill: some rows are done, the others are asked alone.
    left = rows[3:8]
    assert ask(left, protocol, batch_size=2) == {row.id: one[row.id] for row in left}


def test_every_answer_is_that_of_a_plain_loop(ask, model):
    """Penalty on new tokens only, then temperature, then the row's own draw: all written out, row by row."""
    rows = mixed_rows(8)
    for protocol in (GREEDY, SAMPLED):
        found = ask(rows, protocol, batch_size=8)
        asked = generate.load(model, protocol, torch.device("cpu"), blind=False)
        for row in rows:
            assert (found[row.id]["response"], found[row.id]["new_tokens"]) == plain_loop(asked, row)


@torch.inference_mode()
def plain_loop(asked: generate.Asked, row) -> tuple[str, int]:
    decoding, processor = asked.protocol.decoding, asked.processor
    images = [generate.load_image(ref, row.id).image for ref in row.images]
    text = generate.render_prompt(processor, asked.protocol, row, blind=False)
    inputs = processor(images=images or None, text=[text], add_special_tokens=False, return_tensors="pt")
    # With the cache, as random weights also answer with <image>, for which there would be no features.
    output, new = asked.model(**inputs, use_cache=True), []
    noise = generate.RowNoise(decoding.seed, [row], torch.device("cpu"))
    while len(new) < decoding.max_new_tokens:
        scores = output.logits[:, -1].float()
        for token in set(new):
            factor = decoding.repetition_penalty
            scores[0, token] = scores[0, token] / factor if scores[0, token] > 0 else scores[0, token] * factor
        if decoding.temperature:
            scores = noise(None, scores / decoding.temperature)
        new.append(int(scores.argmax()))
        if new[-1] in asked.model.generation_config.eos_token_id:
            return processor.tokenizer.decode(new[:-1], skip_special_tokens=True), len(new)
        past = output.past_key_values
        output = asked.model(input_ids=torch.tensor([new[-1:]]), past_key_values=past, use_cache=True)
    return processor.tokenizer.decode(new, skip_special_tokens=True), len(new)


def test_an_answer_ends_before_the_checkpoints_own_end_token(ask, model, tmp_path):
    """Rows of a batch end at different places; the token that ends them is no part of the text, but it is counted."""
    rows = mixed_rows(8)
    whole = ask(rows, GREEDY)
    tokenizer = load_processor(model).tokenizer
    ends = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(answer["response"])[k]) for k, answer in
            enumerate(whole.values()) if k in (3, 5)]  # fmt: skip
    stops = tmp_path / "stops"
    shutil.copytree(model, stops)
    (stops / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    found = ask(rows, GREEDY, batch_size=8, model=stops)
    asked = generate.load(stops, GREEDY, torch.device("cpu"), blind=False)
    assert len({answer["new_tokens"] for answer in found.values()}) > 2
    for row in rows:
        assert (found[row.id]["response"], found[row.id]["new_tokens"]) == plain_loop(asked, row)
        assert whole[row.id]["response"].startswith(found[row.id]["response"])


def test_sampling_hangs_on_the_seed_and_on_the_rows_name(ask):
    row = mixed_rows(3)[2]
    twins = [replace(row, id=str(i)) for i in range(6)]
    found = ask(twins, SAMPLED, batch_size=6)
    assert len({answer["response"] for answer in found.values()}) > 3
    other = replace(SAMPLED, decoding=replace(SAMPLED.decoding, seed=43))
    assert ask(twins, other) != found
    assert len({answer["response"] for answer in ask(twins, GREEDY).values()}) == 1


def test_draws_have_the_softmaxs_frequencies():
    rows = mixed_rows(2)
    noise = generate.RowNoise(0, rows, torch.device("cpu"))
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, -math.inf, 0.0]])
    n = 4000
    counts = torch.zeros_like(scores)
    for _ in range(n):
        counts[torch.arange(2), noise(None, scores).argmax(dim=1)] += 1
    expected = scores.softmax(dim=1)
    error = (expected * (1 - expected) / n).sqrt()
    assert ((counts / n - expected).abs() <= 4 * error).all()


def test_a_response_holds_the_row_then_its_extra_keys():
    closed, open_row = replace(mixed_rows(2)[1], extra={"case": "7", "notes": ["x"]}), mixed_rows(5)[4]
    found = answers.response_of(closed, "B", new_tokens=2)
    assert list(found) == [
        "benchmark", "id", "question_type", "question", "options", "answer", "response", "groups", "image_sha256",
        "case", "notes", "new_tokens",
    ]  # fmt: skip
    assert found["options"] == list(closed.options) and found["image_sha256"] == [closed.images[0].sha256]
    found = answers.response_of(open_row, "?")
    assert (found["question_type"], found["options"]) == ("open", None)
    assert found["answer"] == ["spleen", "an organ"]


def test_a_batch_is_what_the_processor_makes_of_it(model, monkeypatch):
    asked = generate.load(model, GREEDY, torch.device("cpu"), blind=False)
    rows = [row for row in mixed_rows(9) if row.images]
    loaded = []
    original = generate.load_image
    monkeypatch.setattr(generate, "load_image", lambda ref, id: loaded.append(ref) or original(ref, id))
    batch = generate.prepare(asked, rows)
    assert len(loaded) == len(set(loaded)) == 3 < sum(len(row.images) for row in rows)
    expected = asked.processor(
        images=[original(ref, row.id).image for row in rows for ref in row.images],
        text=[generate.render_prompt(asked.processor, GREEDY, row, blind=False) for row in rows],
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(getattr(batch, name), expected[name]), name
    assert (batch.attention_mask[:, -1] == 1).all(), "padded on the left"


def test_blind_batches_have_no_image_and_the_same_text(model):
    asked = generate.load(model, GREEDY, torch.device("cpu"), blind=True)
    rows = mixed_rows(4)
    batch = generate.prepare(asked, rows)
    assert batch.pixel_values is None
    image = asked.processor.tokenizer.convert_tokens_to_ids("<image>")
    assert not (batch.input_ids == image).any()
    for row, prompt in zip(rows, batch.prompts, strict=True):
        sighted = generate.render_prompt(asked.processor, GREEDY, row, blind=False)
        assert prompt == sighted.replace("<image>\n", "")


def test_processes_share_the_rows_evenly_and_the_longest_come_first():
    rows = mixed_rows(13)
    shares = [generate.share_of(rows, GREEDY, world(rank, 3), blind=False) for rank in range(3)]
    assert sorted(len(share) for share in shares) == [4, 4, 5]
    assert {row.id for share in shares for row in share} == {row.id for row in rows}
    for share in shares:
        assert len(share[0].images) == 2
        cost = [(len(row.images), len(GREEDY.render(row))) for row in share]
        assert cost == sorted(cost, reverse=True)


def test_loading_shows_no_bar_and_leaves_the_setting_alone(model, capfd):
    assert logging.is_progress_bar_enabled()
    generate.load(model, GREEDY, torch.device("cpu"), blind=False)
    assert logging.is_progress_bar_enabled()
    shown = capfd.readouterr()
    assert "Loading" not in shown.err + shown.out


def test_a_prompt_longer_than_the_model_is_refused_by_row(model, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(model, short)
    config = (
        (short / "config.json").read_text().replace('"max_position_embeddings": 1024', '"max_position_embeddings": 150')
    )
    (short / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"row 'row \d+' has \d+ tokens with its images, but .* room for 138"):
        generate.answer(mixed_rows(), short, GREEDY, world(), tmp_path, blind=False, batch_size=4)


def test_running_out_of_memory_is_one_sentence_and_keeps_what_is_done(ask, model, tmp_path, monkeypatch):
    rows = mixed_rows(6)
    original = generate.LlavaForConditionalGeneration.generate

    def fail_on_short(self, **inputs):
        if inputs.get("pixel_values") is None:
            raise torch.OutOfMemoryError
        return original(self, **inputs)

    monkeypatch.setattr(generate.LlavaForConditionalGeneration, "generate", fail_on_short)
    with pytest.raises(UserError, match="out of memory with 2 rows at once; .* smaller --batch-size"):
        generate.answer(rows, model, GREEDY, world(), tmp_path, blind=False, batch_size=2)
    assert len(read_lines(tmp_path / "responses.rank0.jsonl")) == 4


def test_unreadable_images_are_listed_once_each(tmp_path, capfd):
    (tmp_path / "cut.tif").write_bytes(picture(1, "TIFF").data[:400])
    cut, gone = ImageRef(path=str(tmp_path / "cut.tif")), ImageRef(path=str(tmp_path / "gone.png"))
    good = replace(mixed_rows(1)[0], images=(picture(2, "TIFF", "L"), picture(3, "PNG", "P")))
    answers.check_images([good, good])
    assert "palette 1" in capfd.readouterr().err
    rows = [replace(good, id=str(i), images=(ref,)) for i, ref in enumerate((cut, gone, cut))]
    with pytest.raises(UserError, match="2 images .*'0'.*cut.tif.*'1'.*gone.png") as refused:
        answers.check_images([good, *rows])
    assert str(refused.value).count("cut.tif") == 1


def test_what_is_computed_ahead_keeps_its_order_and_its_errors():
    assert list(generate.ahead(lambda n: n * n, range(5))) == [0, 1, 4, 9, 16]
    assert list(generate.ahead(lambda n: n, [])) == []
    results = generate.ahead(lambda n: 1 // (2 - n), range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
