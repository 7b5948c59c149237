"""A folder of ours gives transformers 4.57 the same token ids, pixels and logits as it gives 5.x."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from huatuo_vision.model.compose import compose_processor, compose_weights
from huatuo_vision.model.conversion import convert
from huatuo_vision.recipe import ModelSpec
from tests.environments import python_with
from tests.model.official import write_checkpoint
from tests.model.parts import (
    CLIP,
    SIGLIP,
    TEXTS,
    language_config,
    model_spec,
    picture,
    write_clip,
    write_language_model,
)

# transformers 4.57 asks for huggingface_hub < 1 and tokenizers < 0.23.
PACKAGES = ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1")

CONVERSATION = [
    {
        "role": "user",
        "content": [
            {"type": "image", "path": "0.png"},
            {"type": "image", "path": "1.png"},
            {"type": "text", "text": "Which organ?"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "The left kidney."}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
]

OLD_CODE = """
import sys, torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

assert transformers.__version__ == "4.57.6", transformers.__version__
torch.set_num_threads(1)
conversation = {conversation!r}
for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    kept = {{name: inputs[name] for name in ("input_ids", "pixel_values")}}
    save_file(kept | {{"logits": logits, "answer": answer}}, folder + "/old.safetensors")
"""


@pytest.fixture(scope="session")
def old_python() -> Path:
    return python_with("4.57", PACKAGES)


def specs(tmp_path: Path) -> dict[str, ModelSpec]:
    write_language_model(tmp_path / "lm", "qwen2", extra=("<|im_start|>", "<|im_end|>"), tied=True)
    write_language_model(tmp_path / "lm-bos", "llama", spare_rows=0, bos="<|begin|>")
    write_clip(tmp_path / "clip")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 256}
    return {
        "clip-qwen2-tied": model_spec(
            {"path": str(tmp_path / "clip")}, {"path": str(tmp_path / "lm")}, template="chatml"
        ),
        "clip-llama-bos-grown": model_spec(language={"path": str(tmp_path / "lm-bos")}, template="vicuna"),
        "clip-qwen3": model_spec(CLIP, language_config("qwen3")),
        "clip-mistral-full": model_spec(
            CLIP, language_config("mistral"), template="mistral", feature_strategy="full", feature_layer=-1
        ),
        "siglip-llama-scaled-rope": model_spec(SIGLIP, language_config("llama", rope_scaling=scaling)),
    }


@pytest.mark.slow
def test_old_transformers_agrees(old_python: Path, tmp_path: Path) -> None:
    folders = []
    for name, spec in specs(tmp_path).items():
        folders.append(tmp_path / name)
        compose_processor(spec, folders[-1], iter(TEXTS))
        compose_weights(spec, folders[-1], seed=0)
    # Converted official checkpoints, whose tokenizer's pipeline is not ours.
    for name, model_type in (("converted-qwen2", "llava_qwen2"), ("converted-yi", "llava_llama")):
        write_checkpoint(tmp_path / "official" / name, model_type)
        folders.append(tmp_path / name)
        convert(str(tmp_path / "official" / name), folders[-1])
    picture(56, 40, seed=0).save(tmp_path / "0.png")
    picture(31, 90, seed=1).save(tmp_path / "1.png")
    code = OLD_CODE.format(conversation=CONVERSATION)
    run = subprocess.run(
        [old_python, "-c", code, *map(str, folders)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    assert run.returncode == 0, run.stderr

    conversation = [
        message
        | {
            "content": [
                part | ({"path": str(tmp_path / part["path"])} if "path" in part else {}) for part in message["content"]
            ]
        }
        for message in CONVERSATION
    ]
    for folder in folders:
        old = load_file(folder / "old.safetensors")
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        with torch.no_grad():
            logits = model(**inputs).logits
            answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(inputs["input_ids"], old["input_ids"]), folder.name
        assert torch.equal(inputs["pixel_values"], old["pixel_values"]), folder.name
        torch.testing.assert_close(logits, old["logits"], rtol=1e-5, atol=1e-6, msg=folder.name)
        assert torch.equal(answer, old["answer"]), folder.name
