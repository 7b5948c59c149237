"""What is supervised is what the assistant says, in every turn; and training sees what inference sees."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from huatuo_vision.inputs.encode import Encoder
from huatuo_vision.inputs.processor import load_processor
from huatuo_vision.model.compose import compose_processor
from huatuo_vision.schema import BadSample, ImageRef, Message, Sample, UserError
from tests.model.parts import PATCHES, SIGLIP, model_spec, write_language_model
from tests.model.test_templates import SPECIALS, TEMPLATES

EOS = "<|end|>"
ENDS = {"huatuo": EOS, "vicuna": EOS, "mistral": EOS, "llama3": "<|eot_id|>", "chatml": "<|im_end|>"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encode")
    write_language_model(root / "lm", "llama", spare_rows=8, extra=SPECIALS, bos="<|begin|>")
    for name in TEMPLATES:
        compose_processor(model_spec(language={"path": str(root / "lm")}, template=name), root / name)
    return root


def sample(images: int = 2) -> Sample:
    refs = tuple(ImageRef(data=bytes([n])) for n in range(images))
    turns = (
        Message("user", "<image>\n" * images + "Which organ is shown?"),
        Message("assistant", "The left kidney, 12 µm."),
        Message("user", "Is there a fracture?"),
        Message("assistant", "No."),
    )
    return Sample("a", "s", refs, turns)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_assistant_turn_is_supervised_to_its_end_and_nothing_else(folders, template):
    encoder = Encoder(folders / template)
    encoded = encoder.encode(sample())
    said = encoder.decode(encoded.input_ids[encoded.supervised])
    end = ENDS[template]
    assert said.replace(" ", "") == f"Theleftkidney,12µm.{end}No.{end}"
    assert not encoded.supervised[0]
    assert int((encoded.input_ids == encoder.image_token_id).sum()) == 2 * PATCHES == 2 * encoder.tokens_per_image
    assert not encoded.supervised[encoded.input_ids == encoder.image_token_id].any()


@pytest.mark.parametrize("template", TEMPLATES)
def test_training_ids_are_those_of_the_processor(folders, template):
    encoder, processor = Encoder(folders / template), load_processor(folders / template)
    conversation = [{"role": m.role, "content": m.content} for m in sample().messages]
    pictures = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    text = processor.apply_chat_template(conversation, tokenize=False)
    expected = processor(text=text, images=pictures, add_special_tokens=False, return_tensors="np")
    assert np.array_equal(encoder.encode(sample()).input_ids, expected["input_ids"][0])
    assert np.array_equal(encoder.pixel_values(pictures), expected["pixel_values"])


def test_encoding_twice_is_equal_also_after_a_trip_to_another_process(folders):
    encoder = Encoder(folders / "huatuo")
    again = pickle.loads(pickle.dumps(encoder))
    a, b = encoder.encode(sample()), again.encode(sample())
    assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.supervised, b.supervised)
    assert again.fingerprint == encoder.fingerprint != Encoder(folders / "chatml").fingerprint


def test_pictures_are_padded_to_a_square_with_the_mean_colour(folders):
    encoder = Encoder(folders / "huatuo")
    (wide,) = torch.from_numpy(encoder.pixel_values([Image.new("RGB", (40, 10), "black")]))
    corner, middle = wide[:, 0, 0], wide[:, 14, 14]
    assert corner.abs().max() < 0.02  # the mean colour is zero after normalisation
    assert middle.max() < -1.4


def test_siglip_keeps_every_patch(tmp_path):
    folder = tmp_path / "siglip"
    compose_processor(model_spec(vision=SIGLIP), folder, iter(["Which organ is shown?"] * 30))
    assert Encoder(folder).tokens_per_image == PATCHES


def test_text_that_spells_the_placeholder_is_refused(folders):
    messages = (Message("user", "What does <image> mean?"), Message("assistant", "A place."))
    with pytest.raises(BadSample, match="1 image tokens after tokenisation for 0 images"):
        Encoder(folders / "huatuo").encode(Sample("a", "s", (), messages))


def test_an_empty_conversation_has_no_target(folders):
    with pytest.raises(BadSample, match="no token of it is supervised"):
        Encoder(folders / "huatuo").encode(Sample("a", "s", (), (Message("user", "Sure?"),)))


def test_a_template_whose_answer_starts_elsewhere_than_its_prompt_ends_is_refused(folders, tmp_path):
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(folders / "huatuo", folder)
    template = folder / "chat_template.jinja"
    text = template.read_text()
    assert "'<|assistant|>\\n'" in text
    template.write_text(text.replace("'<|assistant|>\\n'", "'<|assistant|>'", 1))
    with pytest.raises(UserError, match="do not fit"):
        Encoder(folder)
