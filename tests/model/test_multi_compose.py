"""From a recipe's list of encoders to a folder and its processor; what does not fit is refused in one sentence."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel, AutoProcessor

from huatuo_vision.inference import encode_prompts, load_for_inference
from huatuo_vision.inputs.encode import Encoder
from huatuo_vision.inputs.processor import load_processor, tokens_per_image
from huatuo_vision.model.backbones import known_shape
from huatuo_vision.model.compose import compose_processor, compose_weights
from huatuo_vision.model.flops import ModelShape
from huatuo_vision.model.folder import load_model
from huatuo_vision.multi_encoder_processor import MultiEncoderProcessor
from huatuo_vision.recipe import ModelSpec, Recipe, TrainSpec, first_sentence, load_recipe
from huatuo_vision.schema import Message, Sample, UserError
from tests.model.parts import CLIP, SIGLIP, TEXTS, language_config, picture
from tests.model.test_cambrian import write_encoders
from tests.training.conftest import weights as weights_of

RECIPES = Path(__file__).parents[2] / "recipes"
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [4, 8, 8, 16], "depths": [1, 1, 1, 1], "image_size": 64}
DINOV2 = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "mlp_ratio": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
SVA = {"side": 2, "depth": 1, "width": 32, "heads": 4, "in_llm": [1]}


def spec(*encoders: dict, **changes: object) -> ModelSpec:
    values = {
        "vision_encoders": encoders
        or [
            {"name": "clip", "config": CLIP, "feature_layer": -2},
            {"name": "siglip", "config": SIGLIP},
            {"name": "dinov2", "config": DINOV2, "image_size": 56},
            {"name": "convnext", "config": CONVNEXT, "side": 8},
        ],
        "language_model": {"config": language_config("qwen2"), "tokenizer": {"vocab_size": 300}},
        "projector": "sva",
        "sva": SVA,
    }
    return ModelSpec.model_validate({k: v for k, v in (values | changes).items() if v is not None})


@pytest.fixture(scope="module")
def composed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "base"
    compose_processor(spec(), folder, iter(TEXTS))
    compose_weights(spec(), folder, seed=1)
    return folder


def test_a_folder_of_four_encoders_loads_and_sees(composed):
    model, processor = load_for_inference(composed, torch.device("cpu"))
    assert list(model.model.vision_tower) == ["clip", "siglip", "dinov2", "convnext"]
    assert tokens_per_image(processor) == 2 * 3
    pixels = processor.image_processor(images=[picture(), picture(seed=1)], return_tensors="pt")["pixel_values"]
    inputs = encode_prompts(processor, ["a <image> b", "<image> longer text"], pixels)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs, pixel_values=pixels).logits).all()
    assert ModelShape.from_config(model.config) == known_shape(
        spec(language_model={"config": language_config("qwen2", vocab_size=model.config.text_config.vocab_size),
                             "tokenizer": {"vocab_size": 300}})
    )  # fmt: skip


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(composed, tmp_path):
    for seed in (1, 2):
        compose_processor(spec(), tmp_path / str(seed), iter(TEXTS))
        compose_weights(spec(), tmp_path / str(seed), seed=seed)
    first, same, other = (
        load_model(folder, dtype=torch.float32).state_dict() for folder in (composed, tmp_path / "1", tmp_path / "2")
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.multi_modal_projector.query"], other["model.multi_modal_projector.query"])


def test_each_encoder_has_its_own_pixels_of_one_picture(composed):
    processor = load_processor(composed)
    assert isinstance(processor, MultiEncoderProcessor)
    sizes = [3 * side**2 for side in (28, 28, 56, 64)]
    grey = picture(60, 30)
    pixels = processor.image_processor(images=grey)["pixel_values"]
    assert pixels.shape == (1, sum(sizes)) and pixels.dtype == np.float32
    padding = [part.reshape(3, side, side)[:, 0, 0] for part, side in
               zip(np.split(pixels[0], np.cumsum(sizes)[:-1]), (28, 28, 56, 64), strict=True)]  # fmt: skip
    # Each pads in its own mean colour, which its own normalisation makes zero, up to a rounded grey value.
    assert all(np.abs(corner).max() < 0.02 for corner in padding)
    assert processor.image_processor(images=[])["pixel_values"].shape == (0, sum(sizes))
    together = processor.image_processor(images=[grey, picture(seed=3)])["pixel_values"]
    assert np.array_equal(together[0], pixels[0])


def test_the_processor_is_transformers_own_way_too(composed):
    processor = AutoProcessor.from_pretrained(composed)
    assert type(processor) is MultiEncoderProcessor
    inputs = processor(images=picture(), text="<image> Which organ?", return_tensors="pt")
    assert (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 6
    assert len(inputs["pixel_values"]) == 1
    first, second, third = (picture(seed=seed) for seed in range(3))
    of_texts = processor(images=[[first], [second, third]], text=["<image> a", "<image><image> b"])
    flat = processor(images=[first, second, third], text=["<image> a", "<image><image> b"])
    assert np.array_equal(of_texts["pixel_values"], flat["pixel_values"])
    assert "pixel_values" not in processor(images=[], text="no picture", return_tensors="pt")


def test_encoding_counts_the_newlines_and_travels(composed):
    encoder = pickle.loads(pickle.dumps(Encoder(composed)))
    sample = Sample("a", "s", (), (Message("user", "Which organ?"), Message("assistant", "The left kidney.")), {})
    assert encoder.tokens_per_image == 6
    assert encoder.encode(sample).targets > 0


def test_encoders_from_checkpoints_keep_their_weights(tmp_path):
    towers = write_encoders(tmp_path)
    encoders = [
        {"name": "siglip", "path": towers["siglip"]},
        {"name": "clip", "path": towers["clip"], "feature_layer": -2},
        {"name": "dinov2", "path": towers["dinov2"], "image_size": 42, "side": 2},
    ]
    compose_processor(spec(*encoders), tmp_path / "out", iter(TEXTS))
    compose_weights(spec(*encoders), tmp_path / "out", seed=0)
    found = weights_of(tmp_path / "out")
    for name in ("siglip", "clip", "dinov2"):
        for key, tensor in AutoModel.from_pretrained(towers[name]).state_dict().items():
            assert torch.equal(tensor, found[f"model.vision_tower.{name}.{key}"]), key


def test_a_finished_model_is_taken_over(composed, tmp_path):
    again = ModelSpec.model_validate({"llava": {"path": str(composed)}})
    compose_processor(again, tmp_path / "again")
    compose_weights(again, tmp_path / "again", seed=9)
    left, right = (load_model(folder, dtype=torch.float32).state_dict() for folder in (composed, tmp_path / "again"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert np.array_equal(
        Encoder(tmp_path / "again").pixel_values([picture()]), Encoder(composed).pixel_values([picture()])
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vision_encoders": []}, "at least 1 item"),
        ({"vision_encoders": [{"name": "a", "config": CLIP}, {"name": "a", "config": CLIP}]}, "has a name twice: a, a"),
        ({"vision_encoder": {"config": CLIP}}, "give vision_encoder or vision_encoders, not both"),
        ({"language_model": None}, "language_model missing"),
        ({"sva": None}, "projector: sva and the key sva .* go together"),
        ({"projector": "mlp2x_gelu"}, "projector: sva and the key sva .* go together"),
        ({"feature_layer": -2}, "feature_layer go with one vision_encoder"),
        ({"sva": SVA | {"width": 30}}, "width 30 is not divisible by 4 heads"),
        ({"sva": SVA | {"in_llm": [1, 0]}}, r"in_llm \[1, 0\] must rise"),
        ({"sva": SVA | {"depht": 1}}, "unknown key 'depht'; did you mean 'depth'"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(changes, sentence):
    with pytest.raises(ValidationError) as refused:
        spec(**changes)
    assert re.search(sentence, first_sentence(refused.value)), first_sentence(refused.value)


@pytest.mark.parametrize(
    ("encoders", "changes", "sentence"),
    [
        ([{"name": "conv", "config": CONVNEXT, "side": 5}], {}, "conv gives 5 x 5 features, which 2 x 2 queries"),
        ([{"name": "a", "config": CLIP}, {"name": "b", "config": CONVNEXT, "side": 4}],
         {"projector": "mlp2x_gelu", "sva": None}, "b gives 4 x 4 features and a 2 x 2"),
        ([{"name": "a", "config": CLIP}], {"sva": SVA | {"in_llm": [2]}}, "layer 2, but the language model has 2"),
        ([{"name": "a", "config": {"model_type": "vit"}}], {}, "has the model_type 'vit'; expected one of"),
        ([{"name": "a", "config": CLIP | {"hiden_size": 3}}], {}, r"encoders \(a\).config: unknown key 'hiden_size'"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(encoders, changes, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        compose_processor(spec(*encoders, **changes), tmp_path / "out", iter(TEXTS))
    assert not (tmp_path / "out").exists()


def test_dinov2_alone_is_no_llavas_encoder(tmp_path):
    alone = ModelSpec.model_validate(
        {"vision_encoder": {"config": DINOV2}, "language_model": spec().language_model.model_dump(exclude_none=True)}
    )
    with pytest.raises(UserError, match="'dinov2'; expected one of .*; more are taken in vision_encoders, a list"):
        compose_processor(alone, tmp_path / "out", iter(TEXTS))


def test_a_rate_for_an_aggregator_that_is_not_there_is_refused():
    recipe = load_recipe(RECIPES / "mini" / "tiny.yaml").model_dump(mode="json", exclude_none=True)
    recipe["phases"]["align"]["train"] = {"projector": {"lr": 1e-3, "sva_lr": 1e-4}}
    with pytest.raises(ValidationError, match="sva_lr is for projector: sva, which the model lacks"):
        Recipe.model_validate(recipe)


def test_keys_of_several_encoders_leave_other_recipes_as_they_were():
    recipe = load_recipe(RECIPES / "mini" / "tiny.yaml")
    keys = recipe.learning_keys()
    assert not [key for key in keys if "vision_encoders" in key or "sva" in key]
    assert TrainSpec(projector={"lr": 1e-3}).model_dump(mode="json")["projector"] == {"lr": 1e-3}
    several = load_recipe(RECIPES / "mini" / "tiny-two-encoders.yaml").learning_keys()
    assert [e["name"] for e in several["model.vision_encoders"]] == ["clip", "convnext"]
    assert several["phases.align.train.projector.sva_lr"] == 1e-4
