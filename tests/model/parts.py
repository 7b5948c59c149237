"""Parts that a tiny LLaVA is composed of: configs, and encoders and language models as folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from huatuo_vision.recipe import ModelSpec

SIDE = 28
PATCHES = 4

TEXTS = [
    "Which organ is shown in the picture?",
    "The left kidney, with a cyst of 12 mm at the lower pole.",
    "Is there a fracture? No, the bones are intact.",
] * 20

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
}
CLIP = VISION | {"model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Not the default: a reader that loses it gives other logits.
    "rope_theta": 500000.0,
    "max_position_embeddings": 512,
}


def language_config(model_type: str, **changes: object) -> dict[str, object]:
    values = TEXT | {"model_type": model_type} | changes
    if model_type == "qwen2":
        del values["head_dim"]  # Qwen2 has none of its own
    return values


def model_spec(
    vision: dict[str, object] = CLIP,
    language: dict[str, object] | None = None,
    template: str = "huatuo",
    vocab_size: int | None = 300,
    **changes: object,
) -> ModelSpec:
    """`vision` and `language`: a config, or {"path": ...}; a language model from a config trains its tokenizer."""
    language = language or language_config("qwen2")
    if "model_type" in language:
        language = {"config": language} | ({"tokenizer": {"vocab_size": vocab_size}} if vocab_size else {})
    if "model_type" in vision:
        vision = {"config": vision}
    if str(vision.get("config", {}).get("model_type")).startswith("siglip"):
        changes = {"feature_strategy": "full"} | changes
    return ModelSpec.model_validate(
        {"vision_encoder": vision, "language_model": language, "chat_template": template} | changes
    )


def write_tokenizer(folder: Path, extra: Sequence[str] = (), bos: str | None = None, **named: str | None) -> int:
    """A byte-level tokenizer that adds a BOS, as Llama 3's does; the number of its ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    specials = [*([bos] if bos else []), "<|end|>", *extra]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    named = {"eos_token": "<|end|>"} | ({"bos_token": bos} if bos else {}) | named
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def write_language_model(
    folder: Path,
    model_type: str = "qwen2",
    spare_rows: int = 8,
    extra: Sequence[str] = (),
    bos: str | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    **named: str | None,
) -> AutoModelForCausalLM:
    """A tiny language model as a folder, its embedding `spare_rows` longer than its tokenizer."""
    ids = write_tokenizer(folder, extra, bos, **named)
    config = AutoConfig.for_model(**language_config(model_type, vocab_size=ids + spare_rows, tie_word_embeddings=tied))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    return model


def write_clip(folder: Path) -> CLIPModel:
    """A whole CLIP checkpoint, text tower and all, as on the Hub, with a mean colour of its own."""
    torch.manual_seed(2)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=32))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=[0.6, 0.4, 0.2]
    ).save_pretrained(folder)
    return model


def picture(width: int = 40, height: int = 28, seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())
