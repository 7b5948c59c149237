"""eval.py from end to end, on a model of random weights and the real phantom questions."""

import hashlib
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model

from huatuo_vision.cli import run_command
from huatuo_vision.evaluation import answers as answering
from huatuo_vision.evaluation import generate
from huatuo_vision.evaluation.benchmarks import BENCHMARKS
from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.evaluation.rows import Row
from huatuo_vision.inputs.encode import Encoder
from huatuo_vision.inputs.processor import load_processor
from huatuo_vision.model.folder import find_model, load_model
from huatuo_vision.schema import ImageRef, Message, Sample, UserError
from tests.evaluation.helpers import REPOSITORY, environment, read_lines, run_python
from tests.evaluation.tiny import save_tiny_model

LIMIT = 12
DEFAULT = PROTOCOLS["default"]


def phantom_rows() -> tuple[Row, ...]:
    return BENCHMARKS["phantom"].load(None).rows


def made_up(row_id: str, question: str, image: ImageRef) -> Row:
    return Row("made-up", row_id, question, "multiple-choice", ("x", "y"), "A", (image,), {})


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def evaluate(model, home, monkeypatch):
    """Run eval.py's main in this process, with --limit 12 unless told otherwise."""
    monkeypatch.setattr(constants, "HF_HOME", str(home))

    def run(out: Path, *arguments: str, model: Path = model) -> list[dict]:
        limit = [] if "--limit" in arguments else ["--limit", str(LIMIT)]
        command = ["eval.py", "--model", str(model), "--benchmarks", "phantom", "--out", str(out), *limit, *arguments]
        monkeypatch.setattr(sys, "argv", command)
        importlib.import_module("eval").main()
        return read_lines(out / "responses.jsonl")

    return run


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What the model is given from now on, call by call."""
    calls: list[dict] = []
    original = generate.LlavaForConditionalGeneration.generate

    def record(self, **inputs):
        calls.append(inputs)
        return original(self, **inputs)

    monkeypatch.setattr(generate.LlavaForConditionalGeneration, "generate", record)
    return calls


def test_answers_are_the_models_own_greedy_ones_whatever_the_batch(evaluate, model, home, tmp_path):
    answers = evaluate(tmp_path / "five", "--batch-size", "5")
    assert len({answer["response"] for answer in answers}) > 3, "too alike to tell a wrong answer by"
    evaluate(tmp_path / "one", "--batch-size", "1")
    evaluate(tmp_path / "all")
    one, five, every = ((tmp_path / name / "responses.jsonl").read_bytes() for name in ("one", "five", "all"))
    assert one == five == every

    rows = phantom_rows()
    assert [answer["id"] for answer in answers] == [row.id for row in rows[:LIMIT]]
    processor, plain = load_processor(model), load_model(model, dtype=torch.float32).eval()
    for row, answer in zip(rows[:3], answers, strict=False):
        inputs = processor(
            images=[generate.load_image(ref, row.id).image for ref in row.images],
            text=generate.render_prompt(processor, DEFAULT, row, blind=False),
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids, start = inputs["input_ids"], inputs["input_ids"].shape[1]
        while ids.shape[1] < start + DEFAULT.decoding.max_new_tokens and ids[0, -1] != processor.tokenizer.eos_token_id:
            logits = plain(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        assert processor.decode(ids[0, start:], skip_special_tokens=True) == answer["response"]


def test_an_adapter_answers_as_it_does_merged(evaluate, model, tmp_path):
    adapted = get_peft_model(
        load_model(model, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapted.save_pretrained(adapter)
    adapted.merge_and_unload().save_pretrained(merged)
    for folder in (adapter, merged):
        load_processor(model).save_pretrained(folder)
    answers = [evaluate(tmp_path / f"out-{folder.name}", model=folder) for folder in (model, adapter, merged)]
    assert answers[1] == answers[2] != answers[0]


def test_a_row_of_answers_is_whole(evaluate, tmp_path):
    answer = evaluate(tmp_path / "out")[0]
    row = phantom_rows()[0]
    assert list(answer) == [
        "benchmark", "id", "question_type", "question", "options", "answer", "response", "groups", "image_sha256",
        "new_tokens",
    ]  # fmt: skip
    assert (answer["question"], answer["options"], answer["answer"]) == (row.question, list(row.options), row.answer)
    pictures = [Path(ref.path).read_bytes() for ref in row.images]
    assert answer["image_sha256"] == [hashlib.sha256(picture).hexdigest() for picture in pictures]
    assert set(answer["groups"]) == {"subject", "modality", "body_part"}
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["benchmarks"]["phantom"]
    assert (scores["n"], scores["expected_n"], scores["comparable"]) == (LIMIT, 600, False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "eval.json", "responses.jsonl", "verdicts.jsonl", "scores.json", "report.md", "report.html", "images",
    }  # fmt: skip


def test_blind_asks_the_same_without_any_image(evaluate, asked, model, tmp_path):
    sighted = evaluate(tmp_path / "sighted")
    seen = asked.pop()
    blind = evaluate(tmp_path / "blind", "--blind")
    unseen = asked.pop()
    assert "pixel_values" in seen and "pixel_values" not in unseen
    tokenizer = load_processor(model).tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert not (unseen["input_ids"] == image).any()

    def texts(inputs: dict) -> list[str]:
        return sorted(
            tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        )

    assert texts(unseen) == sorted(re.sub("(<image>)+\n", "", text) for text in texts(seen))
    assert [a["response"] for a in blind] != [a["response"] for a in sighted]
    assert [a | {"response": ""} for a in blind] == [a | {"response": ""} for a in sighted]


def test_the_prompt_is_the_tokens_that_training_puts_before_an_answer(model, home, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    processor, encoder = load_processor(model), Encoder(model)
    row = max(phantom_rows(), key=lambda row: len(row.images))
    question = "<image>\n" * len(row.images) + DEFAULT.render(row)
    sample = Sample(row.id, "phantom", row.images, (Message("user", question), Message("assistant", "B")))
    encoded = encoder.encode(sample)
    inputs = processor(
        images=[generate.load_image(ref, row.id).image for ref in row.images],
        text=generate.render_prompt(processor, DEFAULT, row, blind=False),
        add_special_tokens=False,
    )
    assert list(inputs["input_ids"][0]) == encoded.input_ids[: int(encoded.supervised.argmax())].tolist()


def test_a_question_that_spells_the_placeholder_shows_no_image(model):
    row = made_up("1", "What is <image>?", ImageRef(data=b""))
    prompt = generate.render_prompt(load_processor(model), DEFAULT, row, blind=False)
    assert prompt.count("<image>") == 1


@pytest.mark.parametrize("left", ["responses.rank0.jsonl", "responses.rank3.jsonl", "responses.jsonl"])
def test_a_killed_run_goes_on_where_it_was(evaluate, asked, tmp_path, left):
    out = tmp_path / "out"
    evaluate(out, "--batch-size", "4")
    whole = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    asked.clear()
    lines = whole["responses.jsonl"].splitlines(keepends=True)
    for name in ("responses.jsonl", "verdicts.jsonl", "scores.json", "report.md", "report.html"):
        (out / name).unlink()
    (out / left).write_bytes(b"".join(lines[2:7]) + lines[7][:50])
    evaluate(out, "--batch-size", "4")
    assert sum(len(inputs["input_ids"]) for inputs in asked) == LIMIT - 5
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == whole


def test_a_finished_run_asks_nothing_again(evaluate, asked, tmp_path):
    evaluate(tmp_path / "out")
    whole = (tmp_path / "out" / "responses.jsonl").read_bytes()
    asked.clear()
    evaluate(tmp_path / "out")
    assert not asked
    assert (tmp_path / "out" / "responses.jsonl").read_bytes() == whole


def test_another_model_or_setting_is_refused_and_nothing_is_lost(evaluate, model, tmp_path):
    out = tmp_path / "out"
    evaluate(out)
    whole = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="another model: .*tiny.* there, .*other.* now"):
        evaluate(out, model=save_tiny_model(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="another blind: false there, true now"):
        evaluate(out, "--blind")
    with pytest.raises(UserError, match="another limit: 12 there, 13 now"):
        evaluate(out, "--limit", "13")
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == whole


def test_the_fingerprint_tells_one_changed_weight_and_nothing_else(model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    assert generate.weights_fingerprint(copy) == generate.weights_fingerprint(model)
    (copy / "README.md").write_text("a card")
    assert generate.weights_fingerprint(copy) == generate.weights_fingerprint(model)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[8 + int.from_bytes(weights[:8], "little")] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert generate.weights_fingerprint(copy) != generate.weights_fingerprint(model)


def test_unreadable_images_are_listed_before_any_question(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refs = [ImageRef(path=str(tmp_path / name)) for name in ("cut.png", "gone.png")]
    rows = [made_up(str(i), "?", ref) for i, ref in enumerate(refs)]
    with pytest.raises(UserError, match="2 images .*'0'.*cut.png.*'1'.*gone.png"):
        answering.check_images(rows)


def test_a_prompt_longer_than_the_model_is_refused_by_row(evaluate, model, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(model, short)
    config = json.loads((short / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 100
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"row 'phantom_test_\d+' has \d+ tokens with its images, .* room for 68"):
        evaluate(tmp_path / "out", model=short)


def test_a_model_without_a_processor_is_one_sentence(evaluate, model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*processor_config.json", "token*"))
    with pytest.raises(UserError, match="bare: no processor can be loaded from it"):
        evaluate(tmp_path / "out", model=bare)


def test_models_that_are_not_there_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no folder of that name"):
        find_model("nobody/no-such-model")
    with pytest.raises(UserError, match="no folder of that name"):
        find_model("a/b/c d")
    with pytest.raises(UserError, match="safetensors"):
        generate.weights_fingerprint(tmp_path)


def test_a_user_error_is_one_line_on_stderr_and_exit_code_2(capsys):
    def main() -> None:
        raise UserError("the file [x].yaml is " + "very " * 40 + "long")

    with pytest.raises(SystemExit) as exit:
        run_command(main)
    assert exit.value.code == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "error: the file [x].yaml is " + "very " * 40 + "long\n")
    for returned, code in ((None, 0), (0, 0), (1, 1)):
        with pytest.raises(SystemExit) as exit:
            run_command(lambda returned=returned: returned)
        assert exit.value.code == code


def test_several_processes_that_each_believe_to_be_alone_are_refused(evaluate, monkeypatch, tmp_path):
    evaluate(tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched but"):
        evaluate(tmp_path / "out")


def test_help_and_wrong_flags_answer_without_torch():
    helped = run_python("-X", "importtime", "eval.py", "--help")
    assert helped.returncode == 0 and "--blind" in helped.stdout
    assert not re.search(r"\| +(torch|transformers|scipy|accelerate)\n", helped.stderr)
    for arguments in (["--limit", "0"], ["--batch-size", "x"], ["--benchmark", "fantom"]):
        wrong = run_python("eval.py", "--model", "m", "--benchmarks", "phantom", "--out", "o", *arguments)
        assert wrong.returncode == 2 and "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_two_processes_answer_as_one(evaluate, model, home, tmp_path):
    evaluate(tmp_path / "one", "--limit", "9")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "eval.py", "--model", model]
    arguments = ["--benchmarks", "phantom", "--limit", "9", "--batch-size", "2", "--out", tmp_path / "two"]
    done = run_python(*command, *arguments, HF_HOME=str(home), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    for name in ("responses.jsonl", "verdicts.jsonl", "scores.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_sigkill_and_the_same_command_again(evaluate, model, home, tmp_path):
    expected = evaluate(tmp_path / "whole", "--limit", "60")
    out = tmp_path / "out"
    arguments = ["--model", model, "--benchmarks", "phantom", "--out", out, "--limit", "60", "--batch-size", "1"]
    command = [sys.executable, "eval.py", *map(str, arguments)]
    killed = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(HF_HOME=str(home)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    answers = out / "responses.rank0.jsonl"
    while not (answers.exists() and answers.read_bytes().count(b"\n") >= 3):
        assert killed.poll() is None, killed.stdout.read().decode()
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = answers.read_bytes().count(b"\n")
    assert 3 <= done < 60
    assert evaluate(out, "--limit", "60", "--batch-size", "1") == expected
