"""A LLaVA of a few thousand random weights, saved as train.py would save it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import huatuo_vision.model
from huatuo_vision.evaluation.rows import Row
from huatuo_vision.schema import ImageRef

TEMPLATE = Path(huatuo_vision.model.__file__).parent / "chat_templates" / "huatuo.jinja"


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    specials = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(specials + alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=["<image>"]
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).float()
    # Wider weights than the usual start, so that different prompts get different answers.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    # Settings that would change every answer if a checkpoint's own were used.
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, do_sample=True, temperature=2.0, repetition_penalty=1.8, max_new_tokens=3
    )
    images = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int, format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (28, 20)) -> ImageRef:
    """An image of noise in memory."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format=format)
    return ImageRef(data=file.getvalue(), sha256=hashlib.sha256(file.getvalue()).hexdigest())


ORGANS = ("left lung", "right lung", "liver", "heart", "spleen", "left kidney", "aorta")


def mixed_rows(n: int = 12) -> list[Row]:
    """Rows of unlike length with none, one or two images; every fifth is open, some share their image."""
    rows = []
    for i in range(n):
        options = None if i % 5 == 4 else tuple(ORGANS[(i + k) % len(ORGANS)] for k in range(2 + i % 4))
        rows.append(
            Row(
                benchmark="made-up",
                id=f"row {i}",
                question="Which organ is this" + ", please" * (i % 3) + "?",
                question_type="open" if options is None else "multiple-choice",
                options=options,
                answer=(ORGANS[i % 7], "an organ") if options is None else "AB"[i % 2],
                images=tuple(picture(k) for k in ((), (1,), (2, 3), (1,))[i % 4]),
                groups={"modality": ("CT", "MR")[i % 2]},
                extra={"case": f"case {i // 2}"} if i % 2 else {},
            )
        )
    return rows
