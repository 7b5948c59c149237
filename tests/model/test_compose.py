"""What composing writes loads whole in stock transformers, and what cannot be composed is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipModel,
)

from huatuo_vision.model import compose
from huatuo_vision.model.compose import compose_processor, compose_weights, resolve_revision
from huatuo_vision.model.folder import save_model_folder
from huatuo_vision.recipe import LanguageModelSpec, ModelSpec, TokenizerSpec
from huatuo_vision.schema import UserError
from tests.model.parts import (
    CLIP,
    PATCHES,
    SIDE,
    SIGLIP,
    TEXTS,
    language_config,
    model_spec,
    picture,
    write_clip,
    write_language_model,
    write_tokenizer,
)

CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def composed(spec: ModelSpec, folder: Path, seed: int = 0) -> Path:
    compose_processor(spec, folder, iter(TEXTS))
    compose_weights(spec, folder, seed)
    return folder


def load_stock(folder: Path) -> LlavaForConditionalGeneration:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model) is LlavaForConditionalGeneration
    return model.eval()


@torch.no_grad()
def logits(model: LlavaForConditionalGeneration, folder: Path) -> torch.Tensor:
    inputs = AutoProcessor.from_pretrained(folder)(
        text="<image>\n<image>\nWhich organ?", images=[picture(seed=1), picture(28, 50, seed=2)], return_tensors="pt"
    )
    return model(**inputs.to(dtype=model.dtype)).logits


@pytest.mark.parametrize(
    ("vision", "language_model", "tied"),
    [
        (CLIP, "qwen2", False),
        (CLIP, "qwen2", True),
        (CLIP, "qwen3", True),
        (CLIP, "llama", False),
        (CLIP, "mistral", False),
        (SIGLIP, "llama", True),
    ],
)
def test_stock_transformers_loads_it_and_a_saved_copy_of_it(
    vision: dict, language_model: str, tied: bool, tmp_path: Path
) -> None:
    spec = model_spec(vision, language_config(language_model, tie_word_embeddings=tied))
    base = composed(spec, tmp_path / "base")
    model = load_stock(base)
    assert model.dtype == torch.float32
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    expected = logits(model, base)
    save_model_folder(tmp_path / "again", model.state_dict(), model.config, source_folder=base)
    assert torch.equal(logits(load_stock(tmp_path / "again"), tmp_path / "again"), expected)
    assert model.config.text_config.rope_parameters["rope_theta"] == 500000.0


def test_a_prompt_with_two_images_has_their_tokens_in_place(tmp_path: Path) -> None:
    for name, spec in {
        "clip": model_spec(),
        "clip with its class token": model_spec(feature_strategy="full"),
        "siglip": model_spec(SIGLIP),
    }.items():
        compose_processor(spec, tmp_path / name, iter(TEXTS))
        processor, config = AutoProcessor.from_pretrained(tmp_path / name), AutoConfig.from_pretrained(tmp_path / name)
        per_image = PATCHES + (name == "clip with its class token")
        inputs = processor(text="a<image>b<image>", images=[picture(), picture()])
        a, b, image = (processor.tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "<image>"))
        assert inputs["input_ids"][0] == [a, *[image] * per_image, b, *[image] * per_image]
        assert (config.image_token_index, config.image_seq_length) == (image, per_image)
    composed(model_spec(feature_strategy="full"), tmp_path / "full")
    assert logits(load_stock(tmp_path / "full"), tmp_path / "full").isfinite().all()


def test_image_takes_a_spare_row_and_changes_no_weight(tmp_path: Path) -> None:
    original = write_language_model(tmp_path / "lm", "qwen2", spare_rows=8, extra=["<|reserved_special_token_0|>"])
    ids = len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "lm"))
    model = load_stock(composed(model_spec(language={"path": str(tmp_path / "lm")}), tmp_path / "out"))
    assert model.config.image_token_index == ids
    assert model.config.text_config.vocab_size == ids + 8
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    for name, weight in original.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], weight), name


def test_image_takes_a_reserved_token_where_no_row_is_spare(tmp_path: Path) -> None:
    reserved = [f"<|reserved_special_token_{n}|>" for n in range(3)]
    original = write_language_model(tmp_path / "lm", "llama", 0, extra=reserved, bos="<|begin|>", pad_token=reserved[0])
    before = PreTrainedTokenizerFast.from_pretrained(tmp_path / "lm")
    out = composed(model_spec(language={"path": str(tmp_path / "lm")}), tmp_path / "out")
    model, after = load_stock(out), AutoTokenizer.from_pretrained(out)
    # The first reserved token is the pad token already.
    assert after.convert_tokens_to_ids("<image>") == before.convert_tokens_to_ids(reserved[1])
    assert len(after) == len(before) and reserved[1] not in after.get_vocab()
    assert after.pad_token == reserved[0]
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert after.decode(after.encode("a<image>b"), skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("tied", [False, True])
def test_else_the_embedding_grows_by_mean_rows(tied: bool, tmp_path: Path) -> None:
    original = write_language_model(tmp_path / "lm", "llama", spare_rows=0, tied=tied)
    old = original.get_input_embeddings().weight
    model = load_stock(composed(model_spec(language={"path": str(tmp_path / "lm")}), tmp_path / "out"))
    assert model.config.image_token_index == len(old)
    assert model.config.text_config.vocab_size == -(-(len(old) + 1) // 64) * 64
    for grown, small in (
        (model.get_input_embeddings().weight, old),
        (model.lm_head.weight, original.get_output_embeddings().weight),
    ):
        assert torch.equal(grown[: len(old)], small)
        mean = small.float().mean(0).to(small.dtype)
        assert all(torch.equal(row, mean) for row in grown[len(old) :])


def test_the_tokenizer_adds_nothing_of_its_own(tmp_path: Path) -> None:
    write_language_model(tmp_path / "lm", "llama", bos="<|begin|>")
    original = PreTrainedTokenizerFast.from_pretrained(tmp_path / "lm")
    config = json.loads((tmp_path / "lm/config.json").read_text())
    (tmp_path / "lm/config.json").write_text(json.dumps(config | {"pad_token_id": original.eos_token_id}))
    assert original("a").input_ids != original.encode("a", add_special_tokens=False)
    compose_processor(model_spec(language={"path": str(tmp_path / "lm")}), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a").input_ids == tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.bos_token == "<|begin|>"
    assert tokenizer.pad_token == tokenizer.eos_token
    # With the end of an answer as padding id, transformers would never train its embedding.
    assert AutoConfig.from_pretrained(tmp_path / "out").text_config.pad_token_id is None


@pytest.mark.parametrize(("template", "markers"), [("chatml", CHATML), ("llama3", LLAMA3), ("vicuna", ())])
def test_generation_stops_at_the_end_of_a_turn_and_at_eos(
    template: str, markers: tuple[str, ...], tmp_path: Path
) -> None:
    write_language_model(tmp_path / "lm", extra=markers)
    compose_processor(model_spec(language={"path": str(tmp_path / "lm")}, template=template), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    stop = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    end_of_turn = tokenizer.convert_tokens_to_ids(markers[-1]) if markers else None
    assert stop == ([end_of_turn, tokenizer.eos_token_id] if markers else tokenizer.eos_token_id)


def test_a_whole_clip_checkpoint_gives_its_vision_half_and_its_pixels(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip")
    folder = composed(model_spec({"path": str(tmp_path / "clip")}), tmp_path / "out")
    tower = load_stock(folder).model.vision_tower
    for name, weight in clip.vision_model.state_dict().items():
        assert torch.equal(tower.state_dict()[name], weight), name
    processor = AutoProcessor.from_pretrained(folder)
    assert list(processor.image_processor.image_mean) == [0.6, 0.4, 0.2]
    # A wide picture is padded to a square in the encoder's own mean colour, which is normalised to nearly nothing.
    pixels = processor(text="<image>", images=picture(56, 8), return_tensors="np")["pixel_values"][0]
    assert pixels.shape == (3, SIDE, SIDE)
    assert np.abs(pixels[:, :9]).max() < 0.02
    assert np.abs(pixels[:, SIDE // 2]).max() > 0.5


def test_siglip_is_resized_and_never_cropped(tmp_path: Path) -> None:
    compose_processor(model_spec(SIGLIP), tmp_path / "out", iter(TEXTS))
    image_processor = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    assert list(image_processor.image_mean) == [0.5, 0.5, 0.5]
    assert not image_processor.do_center_crop
    assert image_processor(picture(64, 40), return_tensors="np")["pixel_values"].shape == (1, 3, SIDE, SIDE)


def test_a_trained_tokenizer_keeps_to_its_size_and_is_the_same_every_time(tmp_path: Path) -> None:
    spec = model_spec(vocab_size=290)
    config = compose_processor(spec, tmp_path / "a", iter(TEXTS))
    compose_processor(spec, tmp_path / "b", iter(TEXTS))
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert 259 < len(tokenizer) <= 290
    assert config.text_config.vocab_size == 320
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|endoftext|>", "<|pad|>")
    text = "The left kidney: 12 mm, ünïcode."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_trained_tokenizer_knows_the_role_markers(tmp_path: Path) -> None:
    compose_processor(model_spec(vocab_size=330), tmp_path / "out", iter(TEXTS))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("<|user|>") == ["<|", "user", "|>"]
    assert tokenizer.tokenize("<|assistant|>") == ["<|", "assistant", "|>"]


def test_a_config_may_come_with_an_existing_tokenizer(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path / "tokenizer")
    language = {"config": language_config("llama"), "tokenizer": {"path": str(tmp_path / "tokenizer")}}
    config = compose_processor(model_spec(language=language), tmp_path / "out")
    assert config.text_config.vocab_size == -(-(ids + 1) // 64) * 64
    language["config"]["vocab_size"] = 512
    assert compose_processor(model_spec(language=language), tmp_path / "out").text_config.vocab_size == 512
    language["config"]["vocab_size"] = ids
    with pytest.raises(UserError, match=f"vocab_size is {ids} but the tokenizer has {ids + 1} ids"):
        compose_processor(model_spec(language=language), tmp_path / "out")


def test_the_seed_decides_the_weights_and_nothing_else_is_touched(tmp_path: Path) -> None:
    spec = model_spec()
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    one = composed(spec, tmp_path / "one", seed=1)
    assert torch.equal(torch.rand(1), expected_draw)
    same, other = composed(spec, tmp_path / "same", seed=1), composed(spec, tmp_path / "other", seed=2)
    assert (one / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    before, after = load_stock(one).state_dict(), load_stock(other).state_dict()
    for part in ("vision_tower.embeddings.patch_embedding", "multi_modal_projector.linear_1", "language_model.norm"):
        changed = not torch.equal(before[f"model.{part}.weight"], after[f"model.{part}.weight"])
        assert changed == (part != "language_model.norm"), part  # a norm starts at one whatever the seed
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_the_projector_is_fresh(tmp_path: Path) -> None:
    write_language_model(tmp_path / "lm")
    projector = load_stock(
        composed(model_spec(language={"path": str(tmp_path / "lm")}), tmp_path / "out")
    ).model.multi_modal_projector
    for layer in (projector.linear_1, projector.linear_2):
        assert 0.018 < layer.weight.float().std() < 0.022
        assert not layer.bias.any()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compose_processor(model_spec(), tmp_path / "out", iter(TEXTS))
    before = sorted(path.name for path in (tmp_path / "out").iterdir())

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(compose, "write_processor", fail)
    with pytest.raises(OSError, match="disk full"):
        compose_processor(model_spec(), tmp_path / "out", iter(TEXTS))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (lambda: model_spec(CLIP | {"model_type": "dinov2"}), "model_type 'dinov2'; expected one of clip, clip_vision"),
        (lambda: model_spec(CLIP | {"model_type": "siglip2_vision_model"}, feature_strategy="full"), "NaFlex SigLIP 2"),
        (lambda: model_spec(CLIP | {"num_hidden_layer": 3}), "'num_hidden_layer'; did you mean 'num_hidden_layers'"),
        (lambda: model_spec(CLIP | {"num_hidden_layers": "two"}), "model.vision_encoder.config: "),
        (lambda: model_spec(language=language_config("gemma3_text")), "expected one of llama, qwen2, qwen3, mistral"),
        (lambda: model_spec(SIGLIP, feature_strategy="default"), "set feature_strategy: full"),
        (lambda: model_spec(feature_layer=-4), "out of range: the vision encoder has 2 layers, so expected -3 to 2"),
        (lambda: model_spec(feature_layer=3), "out of range"),
        (lambda: model_spec(template="chatml"), "templates that fit it: huatuo, mistral, vicuna"),
        (lambda: model_spec(vocab_size=200), "vocab_size 200 is too small"),
        (lambda: model_spec({"path": "/nowhere"}), "path /nowhere is not a folder"),
    ],
)
def test_refusals(spec: Callable[[], ModelSpec], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        compose_processor(spec(), tmp_path / "out", iter(TEXTS))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not any(tmp_path.iterdir())


def test_feature_layers_at_both_ends_are_legal(tmp_path: Path) -> None:
    for layer in (-3, 2):
        folder = composed(model_spec(feature_layer=layer), tmp_path / str(layer))
        assert logits(load_stock(folder), folder).isfinite().all()


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    def refused(says: str, weights: bool = False) -> None:
        spec = model_spec({"path": str(clip)}, {"path": str(language_model)})
        with pytest.raises(UserError, match=says):
            compose_processor(spec, tmp_path / "out")
            if weights:
                compose_weights(spec, tmp_path / "out", seed=0)

    clip, language_model = tmp_path / "clip", tmp_path / "lm"
    write_clip(clip)
    write_language_model(language_model, "llama")

    preprocessor = clip / "preprocessor_config.json"
    text = preprocessor.read_text()
    preprocessor.write_text(text.replace("28", "24"))
    refused("takes 28 x 28 pixels but its preprocessor_config.json makes 24")
    preprocessor.unlink()
    refused("has no preprocessor_config.json")
    preprocessor.write_text(text)

    weights = language_model / "model.safetensors"
    config = language_model / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"num_hidden_layers": 3}))
    refused("9 missing .model.layers.2", weights=True)
    config.write_text(json.dumps(values | {"num_hidden_layers": 1}))
    refused("9 unexpected .model.layers.1", weights=True)
    config.write_text(json.dumps(values))
    weights.rename(language_model / "pytorch_model.bin")
    refused("pickled weights are never opened", weights=True)

    tokenizer_config = language_model / "tokenizer_config.json"
    values = json.loads(tokenizer_config.read_text())
    tokenizer_config.write_text(json.dumps({key: value for key, value in values.items() if key != "eos_token"}))
    refused("has no eos_token")
    (language_model / "tokenizer.json").unlink()
    refused("no tokenizer.json can be read")


def test_a_vision_tower_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip")
    clip.vision_model.encoder.layers = clip.vision_model.encoder.layers[:1]
    clip.save_pretrained(tmp_path / "half")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "half" / name).write_bytes((tmp_path / "clip" / name).read_bytes())
    with pytest.raises(UserError, match="16 missing .encoder.layers.1"):
        composed(model_spec({"path": str(tmp_path / "half")}), tmp_path / "out")


def test_a_siglip_checkpoint_gives_its_vision_half(tmp_path: Path) -> None:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "projection_size": 32}
    vision = {key: value for key, value in SIGLIP.items() if key != "model_type"}
    model = SiglipModel(SiglipModel.config_class(vision_config=vision, text_config=text))
    model.save_pretrained(tmp_path / "siglip")
    side = {"height": SIDE, "width": SIDE}
    SiglipImageProcessorPil(size=side).save_pretrained(tmp_path / "siglip")
    spec = model_spec({"path": str(tmp_path / "siglip")}, feature_strategy="full")
    tower = load_stock(composed(spec, tmp_path / "out")).model.vision_tower
    for name, weight in model.vision_model.state_dict().items():
        assert torch.equal(tower.state_dict()[name], weight), name


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "the Hub's own words")
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errors.GatedRepoError, "is gated: accept its terms on https://huggingface.co/some/model"),
        (errors.RepositoryNotFoundError, "some/model is not on the Hub"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (errors.RemoteEntryNotFoundError, "has no config.json"),
        (errors.LocalEntryNotFoundError, "not in the local cache and the Hub cannot be reached"),
        (errors.HFValidationError, "is not a Hub id"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_sentence(
    error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise hub_error(error)

    monkeypatch.setattr(compose, "hf_hub_download", fail)
    with pytest.raises(UserError) as refusal:
        resolve_revision(LanguageModelSpec(id="some/model", revision="v9"))
    assert says in str(refusal.value)


def test_a_revision_is_resolved_from_the_cache_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    write_language_model(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_revision(LanguageModelSpec(id="some/model")) == commit
    assert resolve_revision(TokenizerSpec(id="some/model", revision=commit)) == commit
    assert resolve_revision(LanguageModelSpec(path=str(snapshot))) is None
    with pytest.raises(UserError, match="some/other is not in the local cache"):
        resolve_revision(LanguageModelSpec(id="some/other"))


def llava_spec(folder: Path, **changes: object) -> ModelSpec:
    return ModelSpec.model_validate({"llava": {"path": str(folder)}} | changes)


@pytest.mark.parametrize(("vision", "layer"), [(CLIP, -1), (SIGLIP, -2)])
def test_a_llava_checkpoint_is_taken_over_whole(tmp_path, vision, layer):
    first = composed(model_spec(vision, feature_layer=layer), tmp_path / "first")
    again = composed(llava_spec(first), tmp_path / "again", seed=1)
    before, after = load_stock(first), load_stock(again)
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    assert after.config.vision_feature_layer == layer
    assert torch.equal(logits(before, first), logits(after, again))
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name


def test_a_llava_checkpoint_gets_the_recipes_template(tmp_path):
    first = composed(model_spec(), tmp_path / "first")
    again = composed(llava_spec(first, chat_template="vicuna"), tmp_path / "again")
    assert "USER: " in (again / "chat_template.jinja").read_text()
    with pytest.raises(UserError, match=r"chatml needs <\|im_start\|>"):
        compose_processor(llava_spec(first, chat_template="chatml"), tmp_path / "third")


def test_what_is_no_llava_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder; .*; train it first: .*--recipe recipes/r.yaml"):
        spec = {"llava": {"path": str(tmp_path / "none"), "made_by": "recipes/r.yaml"}}
        compose_processor(ModelSpec.model_validate(spec), tmp_path / "out")
    folder = composed(model_spec(), tmp_path / "first")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"image_token_index": 5}))
    with pytest.raises(UserError, match="reads images at id 5, but its tokenizer has <image> at"):
        compose_processor(llava_spec(folder), tmp_path / "out")
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "llava_qwen2"}))
    with pytest.raises(UserError, match="has the model_type 'llava_qwen2'.*model.convert"):
        compose_processor(llava_spec(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
