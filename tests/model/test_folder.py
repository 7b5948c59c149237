"""Model folders: canonical names, nothing lost or left over, and no trace of this project in the config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from huatuo_vision.model import folder as model_folder
from huatuo_vision.model.compose import compose_processor, compose_weights
from huatuo_vision.model.folder import (
    PROCESSOR_FILES,
    canonical_name,
    load_model,
    module_name,
    save_model_folder,
    tensor_shapes,
    write_config,
)
from huatuo_vision.model.llava import PackedLlava
from huatuo_vision.schema import UserError
from tests.model.parts import TEXTS, language_config, model_spec

CANONICAL_NAMES = (Path(__file__).parent / "canonical_names.txt").read_text().split()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and Qwen2 of two layers each, untied, fp32."""
    folder = tmp_path_factory.mktemp("folder") / "base"
    compose_processor(model_spec(), folder, iter(TEXTS))
    compose_weights(model_spec(), folder, seed=0)
    return folder


def test_the_names_on_disk_are_those_that_other_loaders_know(base: Path) -> None:
    assert sorted(tensor_shapes(base)) == CANONICAL_NAMES


def test_names_go_there_and_back(base: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    assert sorted(canonical_name(name) for name in model.state_dict()) == CANONICAL_NAMES
    assert {module_name(name) for name in CANONICAL_NAMES} == set(model.state_dict())
    for wrong in (canonical_name, module_name):
        with pytest.raises(ValueError, match="base_model.model.x"):
            wrong("base_model.model.x")


def test_a_trained_model_is_saved_as_plain_llava(base: Path, tmp_path: Path) -> None:
    model = load_model(base, dtype=torch.float32, packed=True)
    assert type(model) is PackedLlava
    # What training does to the config must not reach the disk.
    model.config.text_config.use_cache = False
    model.config.architectures = ["PackedLlava"]
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_model_folder(tmp_path / "model", weights, model.config, source_folder=base)

    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["model_type"] == "llava"
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}
    assert config["text_config"]["use_cache"] is True
    assert config["text_config"]["rope_theta"] == 500000.0
    assert config["transformers_version"]
    text = (tmp_path / "model/config.json").read_text()
    for foreign in ("huatuo", "Packed", "auto_map", "_name_or_path", "attn_implementation", str(base.parent)):
        assert foreign not in text
    for name in PROCESSOR_FILES:
        assert (tmp_path / "model" / name).read_bytes() == (base / name).read_bytes()
    tokenizer_config = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "image_processor" not in json.loads((tmp_path / "model/processor_config.json").read_text())
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items())
    # The config in memory is the run's own, and training goes on with it.
    assert model.config.text_config.use_cache is False
    assert model.config.dtype == torch.float32


def test_the_widest_precision_is_the_one_that_is_named(base: Path, tmp_path: Path) -> None:
    model = load_model(base, dtype=torch.bfloat16)
    weights = model.state_dict()
    projector = "model.multi_modal_projector.linear_1.weight"
    weights[projector] = weights[projector].float() + 1e-5
    save_model_folder(tmp_path / "model", weights, model.config, source_folder=base)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert torch.equal(again.state_dict()[projector], weights[projector])


def test_a_scaled_rope_is_written_for_both_generations(base: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 256}
    spec = model_spec(language=language_config("llama", rope_scaling=scaling))
    recipe_values = spec.model_dump_json()
    config = compose_processor(spec, tmp_path / "out", iter(TEXTS))
    assert spec.model_dump_json() == recipe_values
    text = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (500000.0, scaling)
    again = AutoConfig.from_pretrained(tmp_path / "out")
    assert again.text_config.rope_parameters == config.text_config.rope_parameters
    write_config(tmp_path, again)
    assert (tmp_path / "config.json").read_bytes() == (tmp_path / "out/config.json").read_bytes()


def test_large_weights_are_sharded_with_an_index(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "MAX_SHARD_SIZE", "100KB")
    model = load_model(base, dtype=torch.float32)
    save_model_folder(tmp_path / "model", model.state_dict(), model.config, source_folder=base)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert sorted(index["weight_map"]) == CANONICAL_NAMES
    again = load_model(tmp_path / "model", dtype=torch.float32)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())


def test_a_tied_head_is_left_out_and_comes_back(tmp_path: Path) -> None:
    spec = model_spec(language=language_config("qwen3", tie_word_embeddings=True))
    compose_processor(spec, tmp_path / "tied", iter(TEXTS))
    compose_weights(spec, tmp_path / "tied", seed=0)
    assert "language_model.lm_head.weight" not in tensor_shapes(tmp_path / "tied")
    model = load_model(tmp_path / "tied", dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_views_and_transposed_tensors_are_saved_as_they_read(base: Path, tmp_path: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    weights = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in model.state_dict().items()}
    assert not all(tensor.is_contiguous() for tensor in weights.values())
    save_model_folder(tmp_path / "model", weights, model.config, source_folder=base)
    again = load_model(tmp_path / "model", dtype=torch.float32)
    assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items())


def test_a_save_that_is_not_whole_fails_and_keeps_what_was_there(base: Path, tmp_path: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    save_model_folder(tmp_path / "model", model.state_dict(), model.config, source_folder=base)
    before = (tmp_path / "model/model.safetensors").read_bytes()
    weights = model.state_dict()
    del weights["lm_head.weight"]
    weights["model.vision_tower.extra.weight"] = torch.zeros(2)
    weights["model.multi_modal_projector.linear_2.bias"] = torch.zeros(3)
    with pytest.raises(RuntimeError) as failure:
        save_model_folder(tmp_path / "model", weights, model.config, source_folder=base)
    for part in (
        "1 missing (language_model.lm_head.weight)",
        "1 unexpected (vision_tower.vision_model.extra.weight)",
        "1 of another shape (multi_modal_projector.linear_2.bias)",
    ):
        assert part in str(failure.value)
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_weights_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    def damaged(tensors: dict[str, torch.Tensor]) -> Path:
        for name in ("config.json", *PROCESSOR_FILES):
            (tmp_path / name).write_bytes((base / name).read_bytes())
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    weights = load_file(base / "model.safetensors")
    bias = "multi_modal_projector.linear_1.bias"
    without = {name: tensor for name, tensor in weights.items() if name != bias}
    with pytest.raises(UserError, match=r"1 missing \(model.multi_modal_projector.linear_1.bias\)"):
        load_model(damaged(without), dtype=torch.float32)
    with pytest.raises(UserError, match=r"1 unexpected \(.*more"):
        load_model(damaged(weights | {"more": torch.zeros(1)}), dtype=torch.float32)
    with pytest.raises(UserError, match=r"1 of another shape \(.*linear_1.bias"):
        load_model(damaged(weights | {bias: torch.zeros(5)}), dtype=torch.float32)
    with pytest.raises(UserError, match="no model can be loaded from"):
        load_model(tmp_path / "nothing", dtype=torch.float32)
    file = damaged(weights) / "model.safetensors"
    for content in (file.read_bytes()[:-100], b"", b"x" * 100):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short"):
            load_model(tmp_path, dtype=torch.float32)


def test_an_adapter_folder_loads_on_its_base_model(base: Path, tmp_path: Path) -> None:
    lora = LoraConfig(
        r=2,
        target_modules=r".*language_model\.layers\.\d+\.self_attn\.q_proj",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    trained = get_peft_model(load_model(base, dtype=torch.float32), lora)
    trained.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        expected = trained.eval()(**inputs).logits
        plain = load_model(base, dtype=torch.float32).eval()(**inputs).logits
        loaded = load_model(tmp_path, dtype=torch.float32).eval()(**inputs).logits
    assert torch.equal(loaded, expected)
    assert not torch.allclose(loaded, plain)

    adapter = load_file(tmp_path / "adapter_model.safetensors")
    name = sorted(adapter)[0]
    save_file({k: t for k, t in adapter.items() if k != name}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit its base model: 1 missing"):
        load_model(tmp_path, dtype=torch.float32)


def test_the_tokenizer_of_a_folder_is_read_from_its_file_alone(base: Path) -> None:
    # transformers picks a tokenizer by the config's model_type for some models, and would add tokens to this one.
    tokenizer = AutoTokenizer.from_pretrained(base)
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(tokenizer) == len(vocabulary)
    assert tokenizer.chat_template == (base / "chat_template.jinja").read_text()
