"""Official checkpoints, converted: the same token ids, pixels, logits and answers in stock transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
)

from huatuo_vision.cli import run_command
from huatuo_vision.model import conversion
from huatuo_vision.model import convert as command
from huatuo_vision.model import processor as processor_module
from huatuo_vision.model.conversion import convert
from huatuo_vision.model.folder import PROCESSOR_FILES, load_model, tensor_shapes
from huatuo_vision.model.official import RELEASES, TRIALS, fit_template
from huatuo_vision.schema import UserError
from tests.environments import python_with
from tests.fake_hub import Blob, FakeHub, Repo
from tests.model.official import (
    PATCHES,
    TOWER,
    Original,
    write_checkpoint,
    write_llama_tokenizer,
    write_shards,
    write_tower,
)
from tests.model.parts import picture

ROOT = Path(__file__).parents[2]

# (user text, answer or None), images in the order of their placeholders
CONVERSATIONS = {
    "text only": [("What is a cyst?  ", None)],
    "one image": [("<image>\nWhich organ is shown?", None)],
    "three images": [("<image>\n<image>\n<image>\nCompare 2 and 3", None)],
    "turns": [
        ("<image>\nIs it a cyst?", "Yes, of 12 mm."),
        ("Sure?", "是的。\nIt is 5"),
        ("<image>\n<image>\nAnd here", None),
    ],
    "a turn of text, then an image": [("Hello!", "no"), ("<image>\n这张图片显示了什么？", None)],
}

# model type, where the tokenizer puts a blank, whether the tower is only outside, whose prompt
LAYOUTS = {
    "huatuo-qwen2": ("llava_qwen2", "each", False, "huatuo"),
    "huatuo-yi": ("llava_llama", "each", False, "huatuo"),
    "huatuo-llama-first": ("llava_llama", "first", False, "huatuo"),
    "llava-1.5": ("llava_llama", "each", True, "vicuna"),
    "llava-1.5-first": ("llava", "first", True, "vicuna"),
    "llava-med": ("llava_mistral", "each", True, "mistral"),
}


@dataclass
class Pair:
    """One checkpoint, run by the official code's rules and, converted, by stock transformers."""

    source: Path
    folder: Path
    original: Original
    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    prompt: str

    def both(self, name: str) -> tuple[list[int], list, dict[str, torch.Tensor]]:
        """The official ids, the images, and the inputs that transformers' processor makes."""
        conversation = CONVERSATIONS[name]
        ids = getattr(self.original, f"{self.prompt}_ids")(conversation)
        images = [picture(40 + 9 * n, 31 - 3 * n, seed=n) for n in range(ids.count(Original.IMAGE))]
        messages = []
        for text, answer in conversation:
            messages.append(_user(text))
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(text=prompt, images=images or None, return_tensors="pt")
        return ids, images, inputs


def _user(text: str) -> dict[str, object]:
    images, words = text.count("<image>\n"), text.replace("<image>\n", "")
    # The text first: images go before it whatever the caller's order.
    return {"role": "user", "content": [{"type": "text", "text": words}, *[{"type": "image"}] * images]}


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model_type, blank, outside, prompt = LAYOUTS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    tower = root / "clip" if outside else None
    if tower:
        write_tower(tower, seed=7)
    source = write_checkpoint(root / "official", model_type, tower=tower, blank=blank)
    convert(str(source), root / "converted")
    yield Pair(
        source,
        root / "converted",
        Original(source),
        AutoModelForImageTextToText.from_pretrained(root / "converted"),
        AutoProcessor.from_pretrained(root / "converted"),
        prompt,
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_pixels_and_logits_are_the_official_ones(pair: Pair, name: str) -> None:
    ids, images, inputs = pair.both(name)
    image_token = pair.model.config.image_token_id
    expanded = [t for token in ids for t in ([image_token] * PATCHES if token == Original.IMAGE else [token])]
    assert inputs["input_ids"][0].tolist() == expanded
    if images:
        assert torch.equal(inputs["pixel_values"], pair.original.pixels(images))
    official = pair.original.logits(ids, images)
    with torch.no_grad():
        logits = pair.model(**inputs).logits[0]
    rows = official.shape[1]
    torch.testing.assert_close(logits[:, :rows], official, rtol=0, atol=1e-5)
    # A row that the official model does not have is never the likeliest, with or without generate()'s suppression.
    assert logits.argmax(dim=1).max() < rows
    assert official.abs().max() > 1, "logits near zero would agree with anything"


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_answers_are_the_official_ones(pair: Pair, penalty: float) -> None:
    answers = []
    for name in CONVERSATIONS:
        ids, images, inputs = pair.both(name)
        official = pair.original.answer(ids, images, 12, penalty)
        length = inputs["input_ids"].shape[1]
        processors = [RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=length)]
        tokens = pair.model.generate(
            **inputs, do_sample=False, max_new_tokens=12, logits_processor=LogitsProcessorList(processors)
        )
        assert tokens[0, length:].tolist() == official
        answers.append(tuple(official))
    assert len(set(answers)) > 2, "a model that answers everything alike proves nothing"


def test_the_folder_is_a_plain_model_folder(pair: Pair) -> None:
    load_model(pair.folder, dtype=torch.float32)
    assert all((pair.folder / name).is_file() for name in PROCESSOR_FILES)
    config = json.loads((pair.folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])
    assert config["text_config"]["rope_theta"] == 70000.0
    assert config["text_config"]["rms_norm_eps"] == 1e-4
    assert "huatuo" not in json.dumps(config) and str(pair.source.parent) not in json.dumps(config)
    assert str(pair.source.parent) not in (pair.folder / "generation_config.json").read_text()
    assert sorted(path.name for path in pair.folder.parent.iterdir()) == sorted(
        {"official", "converted", *(["clip"] if pair.prompt != "huatuo" else [])}
    )
    own, ours = (json.loads((f / "tokenizer.json").read_text()) for f in (pair.source, pair.folder))
    assert own["model"]["vocab"] == ours["model"]["vocab"]
    assert own["model"]["merges"] == [" ".join(merge) for merge in ours["model"]["merges"]]
    assert (own["normalizer"], own["pre_tokenizer"]) == (ours["normalizer"], ours["pre_tokenizer"])
    assert ours["added_tokens"][:-1] == own["added_tokens"]
    image = ours["added_tokens"][-1]
    assert (image["content"], image["lstrip"], image["rstrip"]) == ("<image>", False, False)
    assert image["id"] == len(own["model"]["vocab"]) + (3 if "qwen2" in str(pair.source) else 0)


def test_new_rows_are_never_generated(pair: Pair) -> None:
    rows = json.loads((pair.source / "config.json").read_text())["vocab_size"]
    config = pair.model.generation_config
    added = set(range(rows, pair.model.config.text_config.vocab_size)) | {pair.model.config.image_token_id}
    assert set(config.suppress_tokens) == added
    _, _, inputs = pair.both("one image")
    torch.manual_seed(0)
    # So hot that every row is nearly as likely as any other.
    tokens = pair.model.generate(**inputs, max_new_tokens=60, temperature=1e4, top_k=0, top_p=1.0, do_sample=True)
    new = set(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    assert len(new) > 20
    assert not new & added


def test_generation_defaults_are_the_official_ones(pair: Pair) -> None:
    values = json.loads((pair.folder / "generation_config.json").read_text())
    decoding = {key: values.get(key) for key in ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens")}
    assert decoding == {"do_sample": True, "temperature": 0.2, "top_k": 50, "top_p": 0.8, "max_new_tokens": 512}
    assert "repetition_penalty" not in values  # it would count the prompt too
    assert values.get("new_token_repetition_penalty") == (1.2 if pair.prompt == "huatuo" else None)
    eos = pair.original.tokenizer.eos_token_id
    assert (values["eos_token_id"], values["pad_token_id"]) == (eos, eos)


def test_an_answer_that_ends_the_conversation_ends_in_eos(pair: Pair) -> None:
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}]
    eos = pair.processor.tokenizer.eos_token
    assert pair.processor.apply_chat_template(said).endswith(eos)
    earlier = pair.processor.apply_chat_template([*said, {"role": "user", "content": "Why?"}])
    assert earlier.count(eos) == (0 if pair.prompt == "huatuo" else 1)


def test_weights_are_written_as_they_are_on_disk(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "official", dtype=torch.bfloat16)
    convert(str(source), tmp_path / "out")
    on_disk: dict[str, torch.Tensor] = {}
    for path in source.glob("*.safetensors"):
        on_disk |= load_file(path)
    written: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(path)
    assert len(written) == len(on_disk) - 1  # the rotary buffer
    for name, tensor in written.items():
        assert torch.equal(tensor, on_disk[conversion._official_name(name)]), name
        assert tensor.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys() == tensor_shapes(tmp_path / "out").keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["left_out"] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_the_tower_in_the_shards_wins_over_its_copy(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "official")
    convert(str(source), tmp_path / "out")
    copy = load_file(source / TOWER / "model.safetensors")["vision_model.embeddings.class_embedding"]
    inside = load_model(tmp_path / "out", dtype=torch.float32).model.vision_tower.embeddings.class_embedding
    assert not torch.allclose(copy, inside)


def test_a_tower_from_elsewhere_takes_the_checkpoints_precision(tmp_path: Path) -> None:
    write_tower(tmp_path / "clip", seed=7)
    source = write_checkpoint(tmp_path / "official", "llava_llama", tower=tmp_path / "clip", dtype=torch.float16)
    convert(str(source), tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    own = load_file(tmp_path / "clip/model.safetensors")["vision_model.embeddings.class_embedding"]
    assert torch.equal(model.model.vision_tower.embeddings.class_embedding, own.half())
    assert "clip" in (tmp_path / "out/conversion.json").read_text()


def test_another_tower_and_another_prompt_can_be_given(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "official", "llava_llama", blank="each")
    shutil.move(source / "vit", tmp_path / "vit")
    with pytest.raises(UserError, match="names its vision tower as ./vit/.*give one with --vision-tower"):
        convert(str(source), tmp_path / "out")
    tower = tmp_path / TOWER
    convert(str(source), tmp_path / "out", prompt="huatuo", vision_tower=str(tower))
    assert "<|user|>" in (tmp_path / "out/chat_template.jinja").read_text()
    write_tower(tmp_path / "clip", seed=7)
    source = write_checkpoint(tmp_path / "medical", "llava_mistral", tower=tmp_path / "clip")
    convert(str(source), tmp_path / "out2", prompt="llava-v1.5")
    assert "USER: " in (tmp_path / "out2/chat_template.jinja").read_text()


def test_square_images_are_not_padded_where_the_checkpoint_was_not(tmp_path: Path) -> None:
    write_tower(tmp_path / "clip", seed=7)
    for aspect, padded in (("square", False), (None, False), ("pad", True)):
        source = write_checkpoint(
            tmp_path / f"{aspect}", "llava_llama", tower=tmp_path / "clip", image_aspect_ratio=aspect
        )
        convert(str(source), tmp_path / f"{aspect}-out")
        values = json.loads((tmp_path / f"{aspect}-out/preprocessor_config.json").read_text())
        assert values["do_pad"] is padded
        assert values["size"] == {"shortest_edge": 28}


def test_a_template_that_cannot_agree_says_so(tmp_path: Path) -> None:
    """BPE without a pre-tokeniser can merge over the border of two turns: no template mends that."""
    write_llama_tokenizer(tmp_path, "each", bos=False)
    pipeline = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = pipeline["model"]["vocab"]
    for token in ("\n", "\n▁"):
        vocabulary.setdefault(token, len(vocabulary))
    pipeline["model"]["merges"].insert(0, "\n ▁")
    original = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(pipeline)), eos_token="</s>")
    with_image = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(pipeline)), eos_token="</s>")
    with_image.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fitted = fit_template(RELEASES["huatuo"], original, with_image)
    assert 0 < fitted.agreeing < len(TRIALS)
    assert "at token 15 of '<|user|>" in fitted.disagreement
    assert "warning: chat template" in conversion._said_template(fitted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("whole") / "official")


@pytest.fixture
def source(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "official"))


def refused(source: Path, match: str, **arguments: str) -> None:
    """Refused with these words, and nothing is left behind."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(UserError, match=match):
        convert(str(source), source.parent / "out", **arguments)
    assert sorted(source.parent.iterdir()) == before


def tensors_of(source: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(source.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_tensors_that_do_not_fit_are_named(source: Path) -> None:
    tensors = tensors_of(source)
    norm, query = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
    tower = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    write_shards(source, {name: t for name, t in tensors.items() if name not in (norm, tower)}, 2)
    refused(source, rf"2 missing \({norm}, {tower}\); the checkpoint is damaged")
    write_shards(source, tensors | {"model.image_newline": torch.zeros(4), query: torch.zeros(4, 4)}, 2)
    refused(source, rf"1 unexpected \(model.image_newline\), 1 of another shape \({query}\)")
    write_shards(source, tensors | {norm: tensors[norm].to(torch.int8)}, 2)
    refused(source, f"{norm} in .* is quantized")


def test_files_that_are_not_whole_are_named(source: Path) -> None:
    first, second, _ = sorted(source.glob("*.safetensors"))
    kept = second.read_bytes()
    second.unlink()
    refused(source, f"lacks 1 of the 3 files that its index lists \\({second.name}\\)")
    second.write_bytes(kept[:-100])
    refused(source, f"{second.name} is damaged or cut short")
    second.write_bytes(kept)
    tensors = load_file(second)
    name = sorted(tensors)[0]
    save_file({k: t for k, t in tensors.items() if k != name}, second, metadata={"format": "pt"})
    refused(source, rf"do not list the same tensors \({name}\)")
    save_file(tensors | {sorted(load_file(first))[0]: torch.zeros(1)}, second, metadata={"format": "pt"})
    refused(source, "which one counts")


def test_pickles_are_not_opened(source: Path, tmp_path: Path) -> None:
    for path in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    refused(source, "holds no safetensors; pickled weights are never opened: .* with --revision")
    tower = source / TOWER
    shutil.move(tower, tmp_path / "clip")
    (tmp_path / "clip/model.safetensors").unlink()
    other = write_checkpoint(tmp_path / "other", "llava_llama", tower=tmp_path / "clip")
    refused(other, "vision tower .* holds no safetensors; pickled weights .* --vision-tower-revision")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' and a mm_vision_tower; expected an original LLaVA"),
        ({"text_config": {}}, "in transformers' format already"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; expected 'mlp2x_gelu'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"num_hidden_layers": 3}, r"12 missing \(model.layers.2.input_layernorm.weight"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_kinds_are_refused(source: Path, changes: dict[str, object], match: str) -> None:
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    refused(source, match)


def test_settings_that_are_missing_or_wrong_are_refused(source: Path) -> None:
    config = (source / TOWER / "config.json").read_text()
    (source / TOWER / "config.json").write_text(config.replace('"clip"', '"siglip"'))
    refused(source, "has the model_type 'siglip'; expected a CLIP")
    (source / TOWER / "config.json").write_text(config)
    preprocessor = source / TOWER / "preprocessor_config.json"
    values = preprocessor.read_text()
    preprocessor.write_text(values.replace('"size": 28', '"size": 56'))
    refused(source, "takes 28 x 28 pixels but its preprocessor_config.json makes 28 or 56")
    preprocessor.unlink()
    refused(source, "has no preprocessor_config.json")
    (source / "tokenizer.json").unlink()
    refused(source, "no tokenizer.json can be read from")
    (source / "config.json").unlink()
    refused(source, "config.json cannot be read")
    refused(source, "--source .* is a folder, and only a Hub id has revisions", revision="main")


def test_a_full_disk_is_said_before_anything_is_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    refused(source, "GB are free at .*; make room")


def test_a_failure_half_way_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def fail_at_the_second(tensors: dict, path: Path, metadata: dict) -> None:
        if written:
            raise OSError("disk full")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(conversion, "save_file", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        convert(str(source), source.parent / "out")
    assert len(written) == 1
    assert [path.name for path in source.parent.iterdir()] == ["official"]


def test_the_command(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    out = source.parent / "out"
    monkeypatch.setattr(sys, "argv", ["convert", "--source", str(source), "--out", str(out), "--prompt", "huatuo"])
    with pytest.raises(SystemExit) as ended:
        run_command(command.main)
    assert ended.value.code == 0
    assert f"written to {out}" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(SystemExit) as ended:
        run_command(command.main)
    assert ended.value.code == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_on_a_hub_id(source: Path, tmp_path: Path) -> None:
    """Its main branch has pickles alone, as LLaVA-1.5's; the conversion that the Hub made is another revision."""
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    blobs = {name: Blob(content, large=name.endswith(".safetensors")) for name, content in files.items()}
    settings = {name: blob for name, blob in blobs.items() if not blob.large and "index" not in name}
    pickle = {"pytorch_model.bin": Blob(b"pickle", large=True)}
    out = tmp_path / "out"

    def run(hub: FakeHub, *arguments: str) -> subprocess.CompletedProcess:
        program = [sys.executable, "-m", "huatuo_vision.model.convert", "--source", "org/official", "--out", str(out)]
        environment = hub.environment(tmp_path / "home")
        return subprocess.run([*program, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)

    with FakeHub() as hub:
        repo = hub.repos["models", "org/official"] = Repo("org/official", private=False)
        repo.add_commit("main", "official", settings | pickle)
        converted = repo.add_commit("refs/pr/1", "safetensors", blobs | pickle)
        main, pull_request = run(hub), run(hub, "--revision", "refs/pr/1")
        assert not hub.sent(path="pytorch_model.bin")
    assert (main.returncode, main.stdout) == (2, "")
    assert "holds no safetensors; pickled weights are never opened" in main.stderr
    assert "Traceback" not in main.stderr
    assert pull_request.returncode == 0, pull_request.stderr
    for words in (
        "HuatuoGPT-Vision: 86 tensors in 3 files",
        "vision tower: weights from the shards",
        "on a row that the embedding has",
        f"the official token ids in {len(TRIALS)} of {len(TRIALS)} trial conversations",
        f"written to {out}",
    ):
        assert words in pull_request.stdout
    record = json.loads((out / "conversion.json").read_text())
    assert (record["source"], record["revision"]) == ("org/official", converted.id)


def test_an_existing_folder_is_left_alone(source: Path) -> None:
    (source.parent / "out").mkdir()
    refused(source, "out already exists; remove it or give another --out")


PEAK = """
import sys
from pathlib import Path
from huatuo_vision.model.conversion import convert

def peak() -> int:
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(status["VmHWM"].split()[0]) * 1024

before = peak()
convert(sys.argv[1], Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a gigabyte in five shards."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_key_value_heads": 4}
    return write_checkpoint(tmp_path_factory.mktemp("large") / "official", shards=5, sizes=sizes)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of the peak")
def test_memory_is_about_one_shard(large: Path, tmp_path: Path) -> None:
    source = large
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > 4 * largest > 400e6
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) < 1.4 * largest


@pytest.mark.slow
def test_a_stopped_command_leaves_nothing(large: Path, tmp_path: Path) -> None:
    program = [
        sys.executable,
        "-m",
        "huatuo_vision.model.convert",
        "--source",
        str(large),
        "--out",
        str(tmp_path / "o"),
    ]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".o.*/model-00001*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        said = process.stderr.read()
    assert process.returncode == 143
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


SENTENCEPIECE = """
import json, sys
from pathlib import Path
import sentencepiece
from transformers import AutoProcessor
from huatuo_vision.model.conversion import convert
from tests.model.official import TEXT, WORDS, write_checkpoint, write_tower

root, legacy = Path(sys.argv[1]), sys.argv[2] == "legacy"
write_tower(root / "clip", seed=7)
source = write_checkpoint(root / "official", "llava_llama", tower=root / "clip")
(source / "tokenizer.json").unlink()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(WORDS), model_prefix=str(source / "tokenizer"), model_type="bpe", vocab_size=419,
    byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    character_coverage=1.0, remove_extra_whitespaces=False,
)
spm = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
config = json.loads((source / "config.json").read_text())
path = source / "tokenizer_config.json"
path.write_text(json.dumps(json.loads(path.read_text()) | {"legacy": legacy}))
from safetensors.torch import load_file, save_file
for file in source.glob("*.safetensors"):
    tensors = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][: len(spm)].clone()
    save_file(tensors, file, metadata={"format": "pt"})
(source / "config.json").write_text(json.dumps(config | {"vocab_size": len(spm)}))
convert(str(source), root / "out")
processor = AutoProcessor.from_pretrained(root / "out")
messages = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which organ? 3"}]},
    {"role": "assistant", "content": "The left kidney."},
    {"role": "user", "content": "Is it shown?"},
]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
system = prompt.split("USER: ")[0].removeprefix("<s>").strip() + " "
# The slow tokenizer: SentencePiece on what stands between special tokens, its blank after </s> in legacy mode alone.
after = " The left kidney.</s>"
ids = [1, *spm.encode(system + "USER: "), "<image>", *spm.encode("\\nWhich organ? 3 ASSISTANT: The left kidney."), 2]
last = "USER: Is it shown? ASSISTANT:"
ids += spm.encode(last) if legacy else spm.encode("\\n" + last)[len(spm.encode("\\n")):]
image = processor.tokenizer.convert_tokens_to_ids("<image>")
ours = processor.tokenizer(prompt, add_special_tokens=False).input_ids
print(json.dumps([ours, [image if token == "<image>" else token for token in ids]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("legacy", ["legacy", "first"])
def test_a_sentencepiece_model_gives_the_slow_tokenizers_ids(tmp_path: Path, legacy: str) -> None:
    """LLaVA-1.5 was published with tokenizer.model alone."""
    python = python_with("sentencepiece", ("sentencepiece==0.2.3",))
    run = subprocess.run([python, "-c", SENTENCEPIECE, str(tmp_path), legacy], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    ours, slow = json.loads(run.stdout.splitlines()[-1])
    assert ours == slow
    assert "8 of 8 trial conversations" in run.stdout


def test_a_sentencepiece_model_without_its_package(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor_module, "is_sentencepiece_available", lambda: False)
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    refused(source, "SentencePiece model .* pip install sentencepiece")
