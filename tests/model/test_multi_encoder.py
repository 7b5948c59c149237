"""Several encoders and the aggregator: equal to LLaVA where they are one, and right wherever images stand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    GenerationConfig,
    LlamaConfig,
    SiglipVisionConfig,
)

from huatuo_vision.model.attention import PER_SAMPLE
from huatuo_vision.model.encoders import GridEncoder
from huatuo_vision.model.flops import ModelShape
from huatuo_vision.model.folder import load_model
from huatuo_vision.model.llava import PackedLlava, recompute, skip_unread_layers
from huatuo_vision.model.multi_encoder import MultiEncoderConfig, MultiEncoderLlava, check_grids
from huatuo_vision.model.trainable import (
    apply_training,
    fsdp_wrap_classes,
    parameter_counts,
    parameter_groups,
)
from huatuo_vision.recipe import TrainSpec
from huatuo_vision.schema import UserError
from tests.model import test_packing
from tests.model.test_packing import HostWaits, gradients, losses
from tests.model.tiny import IMAGE_TOKEN, VOCABULARY, tiny_config
from tests.model.tiny_multi import (
    ALL,
    CLIP,
    CONVNEXT,
    DINOV2,
    SIGLIP,
    SVA,
    multi_config,
    packed_multi,
    pixels_of,
    row,
    sample,
)

CONFIG = multi_config()
SAMPLES = [sample(CONFIG, seed, images) for seed, images in enumerate([1, 0, 2, 1])]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral"])
def model(request):
    return packed_multi(multi_config(text=request.param))


@pytest.fixture(scope="module")
def generating() -> MultiEncoderLlava:
    """The same weights, in the class that is loaded to answer."""
    model = MultiEncoderLlava(multi_config())
    model.load_state_dict(packed_multi().state_dict())
    return model.eval()


def batch(config: MultiEncoderConfig, *images: int, text: int = 6) -> dict[str, torch.Tensor]:
    """Rows with so many images each, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for count in images:
        words = torch.randint(4, VOCABULARY, (text + count,), generator=generator)
        image = torch.full((count * config.tokens_per_image,), IMAGE_TOKEN)
        rows.append(torch.cat([words[:2], image, words[2:]]))
    longest = max(len(ids) for ids in rows)
    padding = [torch.full((longest - len(ids),), 2) for ids in rows]
    input_ids = torch.stack([torch.cat([pad, ids]) for pad, ids in zip(padding, rows, strict=True)])
    mask = torch.stack(
        [torch.cat([torch.zeros_like(p), torch.ones_like(r)]) for p, r in zip(padding, rows, strict=True)]
    )
    pixels = torch.from_numpy(pixels_of(config, sum(images), seed=9))
    return {"input_ids": input_ids, "attention_mask": mask} | ({"pixel_values": pixels} if sum(images) else {})


# ---- one encoder and mlp is LLaVA ----


def test_one_encoder_and_mlp_is_llava_exactly():
    torch.manual_seed(0)
    llava = PackedLlava(tiny_config())
    llava.set_attn_implementation({"text_config": PER_SAMPLE, "vision_config": "sdpa"})
    one = packed_multi(multi_config([GridEncoder.of("clip", llava.config.vision_config, feature_layer=-2)], sva=None))
    renamed = {k.replace("vision_tower.", "vision_tower.clip."): v for k, v in llava.state_dict().items()}
    one.load_state_dict(renamed, strict=True)
    for samples in (test_packing.SAMPLES, test_packing.SAMPLES[1:2]):
        flat = [(encoded, pixels.reshape(len(pixels), 3 * 28 * 28)) for encoded, pixels in samples]
        expected, got = losses(llava.train(), test_packing.row(*samples)), losses(one, row(*flat))
        assert torch.equal(got, expected)
        expected.sum().backward()
        got.sum().backward()
        wanted = {k.replace("vision_tower.", "vision_tower.clip."): g for k, g in gradients(llava).items()}
        found = gradients(one)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_composed_with_the_same_seed_it_starts_from_the_same_weights(tmp_path):
    from huatuo_vision.model.compose import compose_processor, compose_weights
    from huatuo_vision.recipe import ModelSpec
    from tests.model.parts import CLIP as PLAIN
    from tests.model.parts import TEXTS, model_spec, picture

    plain = model_spec()
    values = plain.model_dump(mode="json", exclude_none=True)
    one = values | {"vision_encoders": [{"name": "clip", "feature_layer": -2, "config": PLAIN}]}
    for key in ("vision_encoder", "feature_layer", "feature_strategy"):
        del one[key]
    found = {}
    for name, spec in (("llava", plain), ("several", ModelSpec.model_validate(one))):
        compose_processor(spec, tmp_path / name, iter(TEXTS))
        compose_weights(spec, tmp_path / name, seed=3)
        from huatuo_vision.inputs.encode import Encoder

        encoder = Encoder(tmp_path / name)
        found[name] = load_model(tmp_path / name, dtype=torch.float32), encoder
    llava, several = (model.state_dict() for model, _ in found.values())
    assert {k.replace("vision_tower.", "vision_tower.clip.") for k in llava} == several.keys()
    for name, weight in llava.items():
        assert torch.equal(weight, several[name.replace("vision_tower.", "vision_tower.clip.")]), name
    pictures = [picture(seed=1), picture(20, 50, seed=2)]
    pixels = [encoder.pixel_values(pictures) for _, encoder in found.values()]
    assert np.array_equal(pixels[0].reshape(2, -1), pixels[1])
    assert found["llava"][1].tokens_per_image == found["several"][1].tokens_per_image


# ---- sizes ----


def cambrian_8b(in_llm: list[int]) -> MultiEncoderConfig:
    siglip = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    dinov2 = Dinov2Config(
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        use_swiglu_ffn=True,
        image_size=518,
        patch_size=14,
    )
    convnext = ConvNextConfig(hidden_sizes=[384, 768, 1536, 3072], depths=[3, 4, 30, 3], image_size=256)
    encoders = (
        GridEncoder.of("siglip", siglip, side=24),
        GridEncoder.of("clip", clip, feature_layer=-2),
        GridEncoder.of("dinov2", dinov2, image_size=378, side=24),
        GridEncoder.of("convnext", convnext, image_size=1024, side=96),
    )
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    sva = {"side": 24, "depth": 3, "groups": 1, "width": 1024, "heads": 16, "newline": True, "in_llm": in_llm}
    return MultiEncoderConfig(
        text_config=text, encoders=[e.to_dict() for e in encoders], sva=sva, image_token_index=128002
    )


def test_sizes_are_the_published_ones():
    config = cambrian_8b(list(range(0, 30, 3)))
    assert config.tokens_per_image == 600
    assert [grid.side**2 for grid in config.grids] == [576, 576, 576, 9216]
    assert config.grids[3].channels == 5760
    with torch.device("meta"):
        model = MultiEncoderLlava(config)
    projector = model.model.multi_modal_projector
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert [count(block) for block in projector.groups[0]] == [15_765_504] * 3
    assert {count(block) for block in projector.in_llm.values()} == {22_056_960}
    assert count(projector.in_llm) == 220_569_600
    assert count(projector.encoders) == 13_910_016
    assert count(projector.linear_1) + count(projector.linear_2) == 20_979_712
    assert projector.query.numel() + projector.newline.numel() == 5_120
    assert count(projector) == 302_760_960
    assert count(projector) - count(projector.in_llm) == 82_191_360, "connector only"
    stage_1 = TrainSpec(projector={"lr": 1e-3})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name)
    assert parameter_counts(model)["projector"] == (302_760_960, 302_760_960)
    # What plans are made with, biases and norms apart.
    shape = ModelShape.from_config(config)
    for part, (_, total) in parameter_counts(model).items():
        assert shape.weights[part] == pytest.approx(total, rel=7e-3), part
    assert [group["name"] for group in parameter_groups(model, stage_1, 0.0)] == ["projector", "projector/no_decay"]


def test_flops_are_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from huatuo_vision.model.flops import forward_flops

    config = multi_config()
    model = MultiEncoderLlava(config).eval()
    shape = ModelShape.from_config(config)
    projector = model.model.multi_modal_projector
    grids = [torch.zeros(3, g.side, g.side, g.channels) for g in config.grids]
    with FlopCounterMode(display=False) as counter:
        _, windows = projector(grids)
        projector.in_llm["0"](torch.zeros(3 * 4, config.text_config.hidden_size), windows)
    forward = forward_flops(shape, tokens=0, squared_lengths=0, targets=0, images=3)
    # torch does not count this SDPA kernel: two matmuls over each feature, in five blocks.
    attention = 3 * 5 * 4 * SVA["width"] * sum(g.side**2 for g in config.grids)
    assert forward["projector"] == counter.get_total_flops() + attention


# ---- training on packed rows ----


def test_packed_equals_one_sample_per_row(model):
    packed = losses(model, row(*SAMPLES))
    packed.sum().backward()
    together = gradients(model)
    alone = torch.cat([losses(model, row(s)) for s in SAMPLES])
    alone.sum().backward()
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, atol=5e-5, rtol=1e-3, msg=name)


def test_images_go_to_their_own_placeholders_also_inside_the_language_model():
    """Without features at the image tokens, all that tells two pictures apart is the hook."""
    model = packed_multi()
    torch.nn.init.zeros_(model.model.multi_modal_projector.linear_2.weight)
    (first, pixels_a), (second, pixels_b) = SAMPLES[0], SAMPLES[3]
    right = losses(model, row((first, pixels_a), (second, pixels_b)))
    other = losses(model, row((first, pixels_a), (second, pixels_a)))
    torch.testing.assert_close(right[0], other[0], atol=1e-5, rtol=0)
    assert not torch.allclose(right[1], other[1], atol=1e-4)


def test_a_row_without_images_reaches_every_weight_that_trains(model):
    train = TrainSpec(vision_encoder={"lr": 1e-4}, projector={"lr": 1e-3}, language_model={"lr": 1e-3})
    trained = apply_training(copy.deepcopy(model), train)
    expected = {name for name, p in trained.named_parameters() if p.requires_grad}
    losses(trained, row(SAMPLES[1])).sum().backward()
    blank = gradients(trained)
    assert blank.keys() == expected
    assert all((g == 0).all() for name, g in blank.items() if "vision_tower" in name or "multi_modal" in name)
    losses(trained, row(SAMPLES[0])).sum().backward()
    seen = gradients(trained)
    assert seen.keys() == expected
    silent = {name for name, g in seen.items() if (g == 0).all()}
    assert not silent, silent


@pytest.mark.parametrize("images", [True, False])
def test_no_operation_of_forward_and_backward_waits_for_the_device(images):
    model = packed_multi()
    with HostWaits() as waits:
        losses(model, row(*SAMPLES) if images else row(SAMPLES[1])).sum().backward()
    assert not waits.found


def test_layers_that_nothing_reads_change_nothing():
    whole = packed_multi()
    cut = copy.deepcopy(whole)
    skip_unread_layers(cut)
    assert torch.equal(losses(whole, row(*SAMPLES)), losses(cut, row(*SAMPLES)))
    skipped = [name for name, module in cut.named_modules() if module.__dict__.get("forward") is not None]
    assert skipped == ["model.vision_tower.clip.encoder.layers.2"], "the others hand their last output on"


def test_recomputing_activations_changes_nothing(model):
    packed = row(*SAMPLES)
    losses(model, packed).sum().backward()
    plain = gradients(model)
    again = copy.deepcopy(model)
    recompute(again, 1, vision=True)
    losses(again, packed).sum().backward()
    found = gradients(again)
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5, msg=name)


def test_a_copy_looks_with_its_own_blocks():
    model = packed_multi()
    copied = copy.deepcopy(model)
    before = losses(model, row(SAMPLES[0]))
    with torch.no_grad():
        for block in copied.model.multi_modal_projector.in_llm.values():
            block.linear_2.weight.mul_(3)
    assert torch.equal(losses(model, row(SAMPLES[0])), before)
    assert not torch.equal(losses(copied, row(SAMPLES[0])), before)


def test_the_aggregator_can_have_a_rate_of_its_own():
    model = packed_multi()
    groups = parameter_groups(
        apply_training(model, TrainSpec(projector={"lr": 1e-3, "sva_lr": 1e-4})),
        TrainSpec(projector={"lr": 1e-3, "sva_lr": 1e-4}),
        weight_decay=0.0,
    )
    names = {id(p): name for name, p in model.named_parameters()}
    of = {g["name"]: {names[id(p)].removeprefix("model.multi_modal_projector.") for p in g["params"]} for g in groups}
    rates = {g["name"]: g["lr"] for g in groups}
    assert rates == {"projector": 1e-3, "projector/no_decay": 1e-3, "sva": 1e-4, "sva/no_decay": 1e-4}
    steps = {name.split(".")[0] for part in ("sva", "sva/no_decay") for name in of[part]}
    assert steps == {"query", "groups", "in_llm"}
    rest = {name.split(".")[0] for part in ("projector", "projector/no_decay") for name in of[part]}
    assert rest == {"encoders", "linear_1", "linear_2", "newline"}


def test_lora_trains_the_projectors_copy_and_its_blocks():
    model = packed_multi()
    train = TrainSpec(projector={"lr": 1e-3}, language_model={"lr": 1e-3, "lora": {"r": 2}})
    adapted = apply_training(model, train)
    losses(adapted, row(*SAMPLES)).sum().backward()
    with_gradient = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("modules_to_save.default.in_llm" in name for name in with_gradient)


def test_fsdp_shards_the_layers_of_what_trains():
    model = packed_multi()
    language_model = TrainSpec(projector={"lr": 1e-3}, language_model={"lr": 1e-3})
    assert fsdp_wrap_classes(model, language_model) == ["Qwen2DecoderLayer"]
    everything = language_model.model_copy(update={"vision_encoder": language_model.projector})
    assert fsdp_wrap_classes(model, everything) == [
        "CLIPEncoderLayer",
        "ConvNextStage",
        "Dinov2Layer",
        "Qwen2DecoderLayer",
        "SiglipEncoderLayer",
    ]


# ---- answering ----


def hidden_after_block(model: MultiEncoderLlava, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, D) after decoder layer 0, as the next layer gets it, with the block and without."""
    caught = []
    hook = model.model.language_model.layers[1].register_forward_pre_hook(
        lambda _, arguments: caught.append(arguments[0].detach())
    )
    block = model.model.multi_modal_projector.in_llm["0"]
    weight = block.linear_2.weight.detach().clone()
    with torch.no_grad():
        model(**inputs)
        block.linear_2.weight.zero_()
        model(**inputs)
        block.linear_2.weight.copy_(weight)
    hook.remove()
    return caught[0], caught[1]


@pytest.mark.parametrize("images", [(1,), (2, 1), (1, 0, 2), (0, 1)])
def test_blocks_update_the_image_positions_and_no_other(generating, images):
    inputs = batch(generating.config, *images)
    updated, plain = hidden_after_block(generating, inputs)
    changed = (updated != plain).any(dim=-1)
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    place = is_image.cumsum(dim=1) - 1
    newline = is_image & (place % (SVA["side"] + 1) == SVA["side"])  # the last of each row of the grid
    assert torch.equal(changed, is_image & ~newline)


def test_left_padding_and_batches_change_no_answer(generating):
    config = generating.config
    together = batch(config, 2, 1, 0)
    with torch.no_grad():
        positions = (together["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = generating(**together, position_ids=positions).logits[:, -1]
        images = 0
        for index, count in enumerate((2, 1, 0)):
            kept = together["attention_mask"][index].bool()
            alone = {"input_ids": together["input_ids"][index][kept][None]}
            if count:
                alone["pixel_values"] = together["pixel_values"][images : images + count]
            images += count
            torch.testing.assert_close(generating(**alone).logits[0, -1], logits[index], atol=2e-5, rtol=0)


def test_generation_is_the_same_with_and_without_a_cache(generating):
    inputs = batch(generating.config, 1, 2, 0)
    answers = [
        generating.generate(
            **inputs,
            generation_config=GenerationConfig(max_new_tokens=6, use_cache=cache, pad_token_id=2, do_sample=False),
        )
        for cache in (True, False)
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("images", [(2,), (2, 0, 1)])
def test_several_answers_to_a_row_see_all_its_images_each(generating, images):
    inputs = batch(generating.config, *images)

    def answers(**settings):
        config = GenerationConfig(max_new_tokens=6, use_cache=True, pad_token_id=2, **settings)
        return generating.generate(**inputs, generation_config=config)

    one = answers(do_sample=False)
    sampled = answers(do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(sampled, one.repeat_interleave(3, dim=0))


def test_pictures_come_in_any_precision():
    model = MultiEncoderLlava(multi_config()).eval().to(torch.bfloat16)
    with torch.no_grad():
        assert model(**batch(model.config, 1)).logits.dtype == torch.bfloat16


def test_a_text_only_call_after_an_image_call_is_as_if_there_had_been_none(generating):
    text = batch(generating.config, 0, 0)
    with torch.no_grad():
        fresh = generating(**text).logits
        before = {k: v for k, v in vars(generating.model).items() if not k.startswith("_")}
        generating(**batch(generating.config, 1, 2))
        assert torch.equal(generating(**text).logits, fresh)
        assert {k: v for k, v in vars(generating.model).items() if not k.startswith("_")} == before
        empty = text | {"pixel_values": torch.empty(0, sum(g.pixels for g in generating.config.grids))}
        assert torch.equal(generating(**empty).logits, fresh)


def test_images_and_tokens_must_be_as_many(generating):
    inputs = batch(generating.config, 1)
    two = torch.cat([inputs["pixel_values"]] * 2)
    with pytest.raises(ValueError, match=r"6 image tokens for 2 images of 6 features each, which need 12"):
        generating(**inputs | {"pixel_values": two})
    with pytest.raises(ValueError, match=r"pixel_values has the shape \(1, 3, 28, 28\); expected \(images, \d+\)"):
        generating(**inputs | {"pixel_values": torch.zeros(1, 3, 28, 28)})


# ---- folders ----


def test_saved_and_loaded_back_with_the_auto_classes(generating, tmp_path):
    generating.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MultiEncoderLlava
    assert not any(info.values())
    assert type(AutoConfig.from_pretrained(tmp_path)) is MultiEncoderConfig
    inputs = batch(generating.config, 1, 2)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, generating(**inputs).logits)


# ---- what does not fit ----


def test_grids_that_do_not_divide_are_refused():
    three = GridEncoder.of("siglip", SIGLIP.config)
    assert three.side == 3
    with pytest.raises(UserError, match=r"siglip gives 3 x 3 features, which 2 x 2 queries do not divide .* side: 4"):
        check_grids([CLIP, three], sva_side=2)
    with pytest.raises(UserError, match=r"siglip gives 3 x 3 features and clip 2 x 2; .* give siglip side: 2"):
        check_grids([CLIP, three], sva_side=None)
    check_grids(ALL, sva_side=2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: GridEncoder.of("clip", CLIP.config, image_size=56),
            "clip takes 28 x 28 pixels, and image_size says 56",
        ),
        (
            lambda: GridEncoder.of("dinov2", DINOV2.config, image_size=60),
            "60 is no multiple of its 14 pixels .*take 56",
        ),
        (lambda: GridEncoder.of("convnext", CONVNEXT.config, feature_layer=-1), "is a ConvNeXt, whose stages are all"),
        (lambda: GridEncoder.of("clip", CLIP.config, feature_layer=9), "feature_layer 9 is out of range"),
    ],
)
def test_what_an_encoder_cannot_give_is_refused(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()
