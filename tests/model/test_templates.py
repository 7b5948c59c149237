"""Each chat template: the exact text, what of it the assistant says, and where generation begins."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
import transformers
from packaging.version import Version
from transformers import AutoProcessor, LlavaProcessor

from huatuo_vision.model.compose import CHAT_TEMPLATES, compose_processor
from tests.model.parts import PATCHES, model_spec, picture, write_language_model

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

CONVERSATION = [
    {"role": "user", "content": "<image>\n<image>\nWhich side? "},
    {"role": "assistant", "content": " The left one."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
SYSTEM = {"role": "system", "content": "Be short."}

# Two images, then two turns; what the assistant says stands between ‹ and ›.
EXPECTED = {
    "huatuo": (
        "<|user|>\n<image>\n<image>\nWhich side?\n<|assistant|>\n‹The left one.<|end|>›"
        "<|user|>\nSure?\n<|assistant|>\n‹Yes.<|end|>›"
    ),
    "vicuna": (
        f"<|begin|>{VICUNA_SYSTEM} USER: <image>\n<image>\nWhich side? ASSISTANT:‹ The left one.<|end|>›"
        "USER: Sure? ASSISTANT:‹ Yes.<|end|>›"
    ),
    "llama3": (
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\n<image>\n<image>\nWhich side?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n‹The left one.<|eot_id|>›"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n‹Yes.<|eot_id|>›"
    ),
    "chatml": (
        "<|im_start|>user\n<image>\n<image>\nWhich side?<|im_end|>\n<|im_start|>assistant\n‹The left one.<|im_end|>›\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n‹Yes.<|im_end|>›\n"
    ),
    "mistral": (
        "<|begin|>[INST] <image>\n<image>\nWhich side? [/INST]‹ The left one.<|end|>›[INST] Sure? [/INST]‹ Yes.<|end|>›"
    ),
}

WITH_SYSTEM = {
    "huatuo": "<|user|>\nBe short.\n\nSure?\n<|assistant|>\n",
    "vicuna": "<|begin|>Be short. USER: Sure? ASSISTANT:",
    "llama3": (
        "<|begin|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "chatml": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<|begin|>[INST] Be short.\n\nSure? [/INST]",
}

TEMPLATES = sorted(EXPECTED)


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LlavaProcessor]:
    """One for each template, on a tokenizer that has the markers of all."""
    folder = tmp_path_factory.mktemp("templates")
    write_language_model(folder / "lm", "llama", spare_rows=8, extra=SPECIALS, bos="<|begin|>")
    for name in TEMPLATES:
        compose_processor(model_spec(language={"path": str(folder / "lm")}, template=name), folder / name)
    return {name: AutoProcessor.from_pretrained(folder / name) for name in TEMPLATES}


def as_parts(message: dict[str, str]) -> dict[str, object]:
    """The message with its images as parts, as transformers and OpenAI clients send them."""
    images = message["content"].count("<image>\n")
    text = {"type": "text", "text": message["content"].replace("<image>\n", "")}
    pictures = [{"type": "image", "image": picture(seed=n)} for n in range(images)]
    return {"role": message["role"], "content": [*pictures, text]}


def test_every_template_file_is_tested() -> None:
    assert sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja")) == TEMPLATES


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_of_a_conversation(name: str, processors: dict[str, LlavaProcessor]) -> None:
    expected = EXPECTED[name].replace("‹", "").replace("›", "")
    assert processors[name].apply_chat_template(CONVERSATION) == expected
    assert processors[name].apply_chat_template([as_parts(message) for message in CONVERSATION]) == expected
    assert processors[name].tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_starts_where_the_answer_does(name: str, processors: dict[str, LlavaProcessor]) -> None:
    render = processors[name].apply_chat_template
    before_the_answer = EXPECTED[name].replace("›", "").split("‹")[0]
    assert render(CONVERSATION[:1], add_generation_prompt=True) == before_the_answer
    assert render([SYSTEM, CONVERSATION[2]], add_generation_prompt=True) == WITH_SYSTEM[name]
    tokenizer = processors[name].tokenizer
    whole = EXPECTED[name].replace("‹", "").replace("›", "")
    prompt_ids = tokenizer(before_the_answer).input_ids
    assert tokenizer(whole).input_ids[: len(prompt_ids)] == prompt_ids


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="its masks are empty before 5.18")
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_is_what_the_assistant_says(name: str, processors: dict[str, LlavaProcessor]) -> None:
    inputs = processors[name].apply_chat_template(
        [as_parts(message) for message in CONVERSATION],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0]
    tokenizer = processors[name].tokenizer
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 2 * PATCHES
    said = tokenizer.decode([token for token, by_assistant in zip(ids, mask, strict=True) if by_assistant])
    assert said == "".join(part.split("›")[0] for part in EXPECTED[name].split("‹")[1:])


@pytest.mark.parametrize("name", TEMPLATES)
def test_unknown_roles_and_parts_are_refused(name: str, processors: dict[str, LlavaProcessor]) -> None:
    render = processors[name].apply_chat_template
    with pytest.raises(jinja2.TemplateError, match="not tool"):
        render([CONVERSATION[2], {"role": "tool", "content": "x"}])
    with pytest.raises(jinja2.TemplateError, match="text or image, not video"):
        render([{"role": "user", "content": [{"type": "video", "video": "x"}]}])


def test_template_files_say_nothing_outside_their_blocks() -> None:
    for path in sorted(Path(CHAT_TEMPLATES).glob("*.jinja")):
        outside = jinja2.Environment(extensions=[]).lex(path.read_text().replace("generation", "block x"))
        assert not [text for _, kind, text in outside if kind == "data" and text.strip()], path.name
