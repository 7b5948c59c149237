"""LLaVAs small enough to train in a test, from configs alone."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

IMAGE_TOKEN = 3
VOCABULARY = 128
IMAGE_SIZE = 28
PATCHES = 4

TEXT_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}


def tiny_config(
    text: str = "qwen2",
    vision: str = "clip",
    vision_layers: int = 3,
    feature_layer: int | list[int] = -2,
    tied: bool = False,
    **text_changes: object,
) -> LlavaConfig:
    vision_sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 14,
    }
    text_sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if text == "qwen3":
        text_sizes["head_dim"] = 32
    return LlavaConfig(
        vision_config=(CLIPVisionConfig if vision == "clip" else SiglipVisionConfig)(**vision_sizes),
        text_config=TEXT_CONFIGS[text](**(text_sizes | text_changes)),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        tie_word_embeddings=tied,
    )


def tiny_llava(**changes: object) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(tiny_config(**changes)).eval()


def tiny_batch(text_tokens: int = 12) -> dict[str, torch.Tensor]:
    """One image and some text, every text token a target; the same on every call."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(4, VOCABULARY, (1, text_tokens), generator=generator)
    input_ids = torch.cat([torch.full((1, PATCHES), IMAGE_TOKEN), text], dim=1)
    labels = input_ids.masked_fill(input_ids == IMAGE_TOKEN, -100)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels}
