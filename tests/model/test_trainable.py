"""Exactly the parts that a recipe names train: by requires_grad, by gradient, and by optimizer group."""

from __future__ import annotations

import itertools

import pytest
import torch

from huatuo_vision.model import trainable
from huatuo_vision.model.trainable import (
    apply_training,
    freeze,
    fsdp_wrap_classes,
    parameter_counts,
    parameter_groups,
    part_of,
    quantization_config,
)
from huatuo_vision.recipe import PARTS, TrainSpec
from huatuo_vision.schema import UserError
from tests.model.tiny import tiny_batch, tiny_llava

MODULES = {
    "vision_encoder": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
}
ALL = {"vision_encoder": {"lr": 1e-6}, "projector": {"lr": 1e-3}, "language_model": {"lr": 2e-5}}
LORA = {"projector": {"lr": 1e-3}, "language_model": {"lr": 2e-4, "lora": {"r": 4, "alpha": 8, "dropout": 0.25}}}
SUBSETS = [parts for n in (1, 2, 3) for parts in itertools.combinations(PARTS, n)]


def train_spec(*parts: str) -> TrainSpec:
    return TrainSpec.model_validate({part: ALL[part] for part in parts})


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_with_gradient(model: torch.nn.Module) -> set[str]:
    model.zero_grad(set_to_none=True)
    model(**tiny_batch()).loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "vision_encoder"),
        ("model.multi_modal_projector.linear_1.bias", "projector"),
        ("model.language_model.embed_tokens.weight", "language_model"),
        ("lm_head.weight", "language_model"),
        ("module._orig_mod.model.vision_tower.head.probe", "vision_encoder"),
        ("_orig_mod.module.lm_head.weight", "language_model"),
        ("model.language_model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight", "language_model"),
        ("base_model.model.model.multi_modal_projector.modules_to_save.default.linear_1.weight", "projector"),
        ("module.base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.default.weight", "language_model"),
    ],
)
def test_part_of_sees_through_wrappers(name: str, part: str):
    assert part_of(name) == part


def test_part_of_refuses_a_name_of_no_part():
    with pytest.raises(ValueError, match="audio_tower"):
        part_of("model.audio_tower.weight")


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_exactly_the_named_parts_get_gradients(parts: tuple[str, ...], vision: str):
    model = tiny_llava(vision=vision)
    freeze(model, train_spec(*parts))
    trained = trained_names(model)
    assert names_with_gradient(model) == trained
    prefixes = tuple(prefix for part in parts for prefix in MODULES[part])
    named = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    unread = ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.", "vision_tower.head.")
    never_read = {name for name in named if any(module in name for module in unread)}
    assert trained == named - never_read
    assert (len(never_read) > 0) == ("vision_encoder" in parts)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("feature_layer", "layers_read"),
    [(-1, 3), (-2, 2), (-4, 0), (1, 1), (3, 3), ([-2, 1], 2), ([1, -3], 1), ([0, -1], 3)],
    ids=str,
)
def test_what_the_feature_layer_never_reads_stays_frozen(vision: str, feature_layer: int | list[int], layers_read: int):
    model = tiny_llava(vision=vision, feature_layer=feature_layer)
    freeze(model, train_spec(*PARTS))
    trained = trained_names(model)
    layers = {name.split("layers.")[1][0] for name in trained if "vision_tower.encoder.layers." in name}
    assert layers == {str(i) for i in range(layers_read)}
    # Equal sets: nothing trainable is left without a gradient (DDP would wait for it), nothing that gets one is frozen.
    assert names_with_gradient(model) == trained
    every = tiny_llava(vision=vision, feature_layer=feature_layer)
    assert names_with_gradient(every) == trained


def test_freezing_again_for_the_next_phase_undoes_the_last():
    model = tiny_llava()
    freeze(model, train_spec("projector"))
    freeze(model, train_spec("language_model"))
    assert {part_of(name) for name in trained_names(model)} == {"language_model"}


def test_a_tied_head_trains_with_the_embeddings_and_counts_once():
    model = tiny_llava(tied=True)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model = apply_training(model, train_spec("projector"))
    assert not model.lm_head.weight.requires_grad
    model = apply_training(model.bfloat16(), train_spec("language_model"))
    assert model.lm_head.weight.requires_grad
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    groups = parameter_groups(model, train_spec("language_model"), 0.1)
    assert sum(p is model.lm_head.weight for group in groups for p in group["params"]) == 1
    untied = parameter_counts(tiny_llava())["language_model"][1]
    assert untied - parameter_counts(model)["language_model"][1] == model.lm_head.weight.numel()


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_parts_that_train_are_fp32_and_frozen_ones_keep_their_dtype(parts: tuple[str, ...]):
    model = apply_training(tiny_llava().bfloat16(), train_spec(*parts))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if part_of(name) in parts else torch.bfloat16), name
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**tiny_batch()).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_optimizer_groups_cover_what_trains_exactly_once(parts: tuple[str, ...]):
    train = train_spec(*parts)
    model = apply_training(tiny_llava(vision="siglip"), train)
    groups = parameter_groups(model, train, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trained_names(model)
    # Qwen2 has biases, so each part has both kinds.
    assert [group["name"] for group in groups] == [f"{part}{kind}" for part in parts for kind in ("", "/no_decay")]
    for group in groups:
        part, _, no_decay = group["name"].partition("/")
        assert set(group) == {"params", "lr", "weight_decay", "name"}
        assert group["lr"] == ALL[part]["lr"]
        assert group["weight_decay"] == (0.0 if no_decay else 0.1)
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert part_of(name) == part
            assert (parameter.ndim == 1 or name.endswith("bias")) == bool(no_decay)
    torch.optim.AdamW(groups)


def test_a_group_without_parameters_is_left_out():
    train = train_spec("projector", "language_model")
    model = apply_training(tiny_llava(text="llama"), train)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "language_model" in name:
            parameter.requires_grad_(False)
    names = [group["name"] for group in parameter_groups(model, train, 0.1)]
    assert names == ["projector", "projector/no_decay", "language_model"]


def test_a_trained_parameter_outside_the_recipe_is_refused():
    model = tiny_llava()
    with pytest.raises(AssertionError, match="the recipe freezes the"):
        parameter_groups(model, train_spec("projector"), 0.1)


def test_zero3_placeholders_are_judged_by_their_true_shape():
    model = apply_training(tiny_llava(), train_spec("projector"))
    full = parameter_counts(model)
    for parameter in model.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.data = torch.empty(0)
    assert parameter_counts(model) == full
    decayed, undecayed = parameter_groups(model, train_spec("projector"), 0.1)
    assert (len(decayed["params"]), len(undecayed["params"])) == (2, 2)


def test_parameter_counts_by_part():
    model = apply_training(tiny_llava(), train_spec("projector"))
    counts = parameter_counts(model)
    assert tuple(counts) == PARTS
    assert counts["projector"] == (32 * 64 + 64 + 64 * 64 + 64,) * 2
    assert counts["vision_encoder"][0] == counts["language_model"][0] == 0
    assert sum(total for _, total in counts.values()) == model.num_parameters()


def test_parameter_counts_under_lora_leave_out_the_unused_copy_of_the_projector():
    train = TrainSpec.model_validate(LORA)
    plain = parameter_counts(tiny_llava())
    counts = parameter_counts(apply_training(tiny_llava(), train))
    adapter = counts["language_model"][0]
    assert adapter == 4 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert counts["language_model"][1] == plain["language_model"][1] + adapter
    assert counts["projector"] == (plain["projector"][1],) * 2
    assert counts["vision_encoder"] == (0, plain["vision_encoder"][1])


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("llama", "LlamaDecoderLayer"),
        ("qwen2", "Qwen2DecoderLayer"),
        ("qwen3", "Qwen3DecoderLayer"),
        ("mistral", "MistralDecoderLayer"),
    ],
)
def test_fsdp_wraps_the_layers_of_what_is_there(text: str, layer: str):
    model = tiny_llava(text=text)
    assert fsdp_wrap_classes(model, train_spec("projector")) == [layer]
    assert fsdp_wrap_classes(model, train_spec(*PARTS)) == sorted([layer, "CLIPEncoderLayer"])
    siglip = tiny_llava(text=text, vision="siglip")
    assert fsdp_wrap_classes(siglip, train_spec(*PARTS)) == sorted([layer, "SiglipEncoderLayer"])
    lora = TrainSpec.model_validate(LORA)
    assert fsdp_wrap_classes(apply_training(model, lora), lora) == [layer]


def test_nothing_is_quantized_unless_the_recipe_says_so():
    assert quantization_config(train_spec("projector"), torch.bfloat16) is None
    assert quantization_config(TrainSpec.model_validate(LORA), torch.bfloat16) is None


def test_quantizing_without_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trainable, "find_spec", lambda name: None)
    train = TrainSpec.model_validate(
        {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-4, "lora": {"quantize": "nf4"}}}
    )
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        quantization_config(train, torch.bfloat16)
