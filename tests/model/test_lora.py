"""LoRA and QLoRA: what trains, what is saved, and that merging gives the model that was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils import save_and_load
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from huatuo_vision.model import merge as merging
from huatuo_vision.model.folder import PROCESSOR_FILES, load_model, save_model_folder
from huatuo_vision.model.merge import merge, save_adapter
from huatuo_vision.model.trainable import apply_training, parameter_counts, parameter_groups, quantization_config
from huatuo_vision.recipe import TrainSpec
from huatuo_vision.schema import UserError
from tests.model.tiny import tiny_batch, tiny_llava


def lora_spec(**lora: object) -> TrainSpec:
    lora = {"r": 4, "alpha": 8} | lora
    return TrainSpec.model_validate({"projector": {"lr": 1e-2}, "language_model": {"lr": 1e-2, "lora": lora}})


def save(folder: Path, model: LlavaForConditionalGeneration) -> Path:
    processor = folder.with_name("processor")
    processor.mkdir(exist_ok=True)
    for name in PROCESSOR_FILES:
        (processor / name).write_text("{}")
    save_model_folder(folder, model.state_dict(), model.config, processor)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base", tiny_llava())


def load(folder: Path, **options: object) -> LlavaForConditionalGeneration:
    return load_model(folder, **({"dtype": torch.float32} | options))


def train_steps(model: nn.Module, train: TrainSpec, steps: int) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(parameter_groups(model, train, weight_decay=0.0))
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**tiny_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**tiny_batch()).logits


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return model.eval()(**tiny_batch()).loss.item()


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> tuple[Path, nn.Module]:
    """A trained adapter's folder, and the model it was saved from."""
    train = lora_spec()
    model = apply_training(load(base), train)
    train_steps(model, train, steps=3)
    save_adapter(model, tmp_path / "adapter", base)
    for name in ("recipe.yaml", "run.json"):
        (tmp_path / "adapter" / name).write_text(f"the run's {name}")
    return tmp_path / "adapter", model


@pytest.mark.parametrize("text", ["llama", "qwen2", "qwen3", "mistral"])
def test_only_the_adapter_and_the_projector_train(text: str):
    model = apply_training(tiny_llava(text=text).bfloat16(), lora_spec(dropout=0.25)).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {f"layers.{i}.self_attn.{k}_proj" for i in range(2) for k in "qkvo"}
    layers |= {f"layers.{i}.mlp.{k}_proj" for i in range(2) for k in ("gate", "up", "down")}
    prefix = "base_model.model.model"
    expected = {f"{prefix}.language_model.{k}.lora_{ab}.default.weight" for k in layers for ab in "AB"}
    projector = f"{prefix}.multi_modal_projector.modules_to_save.default"
    expected |= {f"{projector}.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert trained == expected

    with torch.autocast("cpu", torch.bfloat16):
        model(**tiny_batch()).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16), name
    dropouts = [module.p for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
    assert dropouts == [0.25] * 14


def test_lora_groups_are_the_adapter_and_the_projector():
    train = lora_spec()
    groups = parameter_groups(apply_training(tiny_llava(), train), train, weight_decay=0.1)
    assert [group["name"] for group in groups] == ["projector", "projector/no_decay", "language_model"]
    assert len(groups[-1]["params"]) == 2 * 14


def test_an_adapter_reloads_exactly(adapter: tuple[Path, nn.Module], base: Path):
    folder, model = adapter
    reloaded = PeftModel.from_pretrained(load(base), folder)
    assert (logits(reloaded) - logits(model)).abs().max() == 0
    assert (logits(reloaded) - logits(load(base))).abs().max() > 1e-2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["inference_mode"]
    assert config["auto_mapping"]["base_model_class"] == "LlavaForConditionalGeneration"
    assert "huatuo" not in json.dumps(config["auto_mapping"])
    assert not model.peft_config["default"].inference_mode
    assert {name.split(".")[3] for name in load_file(folder / "adapter_model.safetensors")} == {
        "language_model",
        "multi_modal_projector",
    }


def test_an_adapter_folder_holds_the_processor_and_no_base_weights(adapter: tuple[Path, nn.Module]):
    files = {path.name for path in adapter[0].iterdir()}
    run = {"recipe.yaml", "run.json"}
    assert files == {"adapter_model.safetensors", "adapter_config.json", *PROCESSOR_FILES, *run}


def test_saving_from_gathered_weights_is_the_same(adapter: tuple[Path, nn.Module], base: Path, tmp_path: Path):
    folder, model = adapter
    gathered = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save_adapter(model, tmp_path / "gathered", base, state_dict=gathered)
    first, second = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "gathered"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saving_asks_the_hub_nothing(
    adapter: tuple[Path, nn.Module], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def asked(*_: object) -> bool:
        raise AssertionError("saving an adapter asked the Hub about its base model")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", asked)
    adapter[1].peft_config["default"].base_model_name_or_path = "someone/base"
    save_adapter(adapter[1], tmp_path / "offline", base)


def test_merged_is_a_plain_checkpoint_of_the_trained_model(adapter: tuple[Path, nn.Module], tmp_path: Path):
    folder, model = adapter
    merge(folder, tmp_path / "merged")
    merged, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert (logits(merged) - logits(model)).abs().max() < 1e-4
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert not [name for name in files if name.startswith("adapter")]
    assert files >= {"config.json", *PROCESSOR_FILES}
    for name in ("recipe.yaml", "run.json"):
        assert (tmp_path / "merged" / name).read_text() == f"the run's {name}"
    assert (tmp_path / "merged" / "config.json").read_text().count("LlavaForConditionalGeneration") == 1


def test_a_merge_that_breaks_off_leaves_no_folder_without_its_record(
    adapter: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = adapter
    (folder / "run.json").write_text("{}")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging.shutil, "copy2", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_keeps_the_dtypes_of_the_base(adapter: tuple[Path, nn.Module], tmp_path: Path):
    model = load(tmp_path / "base", dtype=torch.bfloat16)
    model.model.multi_modal_projector.float()
    save(tmp_path / "mixed", model)
    merge(adapter[0], tmp_path / "merged", base=tmp_path / "mixed")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name for name, weight in stored.items() if weight.dtype == torch.float32} == {
        f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert {weight.dtype for weight in stored.values()} == {torch.float32, torch.bfloat16}
    assert abs(loss(load(tmp_path / "merged")) - loss(adapter[1])) < 0.05


def test_a_tied_head_stays_tied_through_merging(tmp_path: Path):
    base = save(tmp_path / "base", tiny_llava(tied=True))
    train = lora_spec()
    model = apply_training(load(base), train)
    train_steps(model, train, steps=2)
    save_adapter(model, tmp_path / "adapter", base)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.lm_head.weight is merged.model.language_model.embed_tokens.weight
    assert (logits(merged) - logits(model)).abs().max() < 1e-4


def test_the_command_refuses_in_one_sentence(base: Path, tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "huatuo_vision.model.merge",
        "--adapter",
        str(base),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not an adapter folder" in done.stderr


def test_merge_says_what_is_wrong(adapter: tuple[Path, nn.Module], base: Path, tmp_path: Path):
    folder, out = adapter[0], tmp_path / "merged"
    with pytest.raises(UserError, match="already exists"):
        merge(folder, tmp_path)
    with pytest.raises(UserError, match="is not an adapter folder"):
        merge(base, out)
    with pytest.raises(UserError, match="nowhere.*--base"):
        merge(folder, out, base=tmp_path / "nowhere")
    (base / "config.json").rename(base / "hidden.json")
    with pytest.raises(UserError, match="base model of adapter"):
        merge(folder, out)
    assert not out.exists()


@pytest.mark.parametrize(
    "changes", [{"intermediate_size": 192}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}], ids=str
)
def test_merge_refuses_another_base(adapter: tuple[Path, nn.Module], tmp_path: Path, changes: dict[str, int]):
    other = save(tmp_path / "other", tiny_llava(**changes))
    with pytest.raises(UserError, match="does not fit the base model"):
        merge(adapter[0], tmp_path / "merged", base=other)
    assert not (tmp_path / "merged").exists()


def test_qlora_trains_on_4_bits_and_merges(base: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    train = lora_spec(quantize="nf4")
    plain_counts = parameter_counts(load(base))
    model = load(base, quantization_config=quantization_config(train, torch.float32))
    assert {part: n for part, (_, n) in parameter_counts(model).items()} == {p: n for p, (_, n) in plain_counts.items()}
    quantized = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantized) == 14
    assert all(name.startswith("model.language_model.layers.") for name in quantized)

    model = apply_training(model, train)
    counts = parameter_counts(model)
    adapter_weights = counts["language_model"][0]
    assert counts["language_model"][1] == plain_counts["language_model"][1] + adapter_weights
    losses = train_steps(model, train, steps=8)
    assert losses[-1] < losses[0] - 0.5
    save_adapter(model, tmp_path / "adapter", base)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())
    assert abs(loss(merged) - loss(model)) < 0.05
