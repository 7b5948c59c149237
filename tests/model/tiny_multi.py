"""Models of several encoders small enough for a test, and rows for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import CLIPVisionConfig, ConvNextConfig, Dinov2Config, SiglipVisionConfig

from huatuo_vision.inputs.encode import Encoded
from huatuo_vision.inputs.rows import pack_row
from huatuo_vision.model.attention import PER_SAMPLE
from huatuo_vision.model.encoders import GridEncoder
from huatuo_vision.model.multi_encoder import MultiEncoderConfig, PackedMultiEncoderLlava
from tests.model.tiny import IMAGE_TOKEN, VOCABULARY, tiny_config

SIDE = 2
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
CLIP = GridEncoder.of("clip", CLIPVisionConfig(**SIZES, intermediate_size=64), feature_layer=-2)
SIGLIP = GridEncoder.of("siglip", SiglipVisionConfig(**SIZES | {"image_size": 42}, intermediate_size=64), side=2)
DINOV2 = GridEncoder.of("dinov2", Dinov2Config(**SIZES, mlp_ratio=2), image_size=56)
CONVNEXT = GridEncoder.of(
    "convnext",
    ConvNextConfig(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1], image_size=32, layer_scale_init_value=1.0),
    image_size=64,
    side=8,
)
ALL = (CLIP, SIGLIP, DINOV2, CONVNEXT)
SVA = {"side": SIDE, "depth": 2, "groups": 2, "width": 32, "heads": 4, "newline": True, "in_llm": [0]}


def multi_config(
    encoders: Sequence[GridEncoder] = ALL, sva: dict | None = SVA, text: str = "qwen2", **text_changes: object
) -> MultiEncoderConfig:
    return MultiEncoderConfig(
        text_config=tiny_config(text=text, **text_changes).text_config,
        encoders=[encoder.to_dict() for encoder in encoders],
        sva=sva,
        image_token_index=IMAGE_TOKEN,
    )


def packed_multi(config: MultiEncoderConfig | None = None) -> PackedMultiEncoderLlava:
    torch.manual_seed(0)
    model = PackedMultiEncoderLlava(config or multi_config())
    model.set_attn_implementation(PER_SAMPLE)
    # As transformers starts them, what blocks inside the language model add is too little to be seen in a loss.
    for name, parameter in model.named_parameters():
        if "in_llm" in name and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def pixels_of(config: MultiEncoderConfig, images: int, seed: int) -> np.ndarray:
    size = sum(grid.pixels for grid in config.grids)
    return np.random.default_rng(seed).standard_normal((images, size)).astype(np.float32)


def sample(config: MultiEncoderConfig, seed: int, images: int) -> tuple[Encoded, np.ndarray]:
    """Some text, then the images, then text again; the last tokens are supervised."""
    rng = np.random.default_rng(seed)
    before, after = (rng.integers(4, VOCABULARY, rng.integers(3, 9)) for _ in range(2))
    image = np.full(config.tokens_per_image * images, IMAGE_TOKEN)
    ids = np.concatenate([before, image, after]).astype(np.int64)
    supervised = np.zeros(len(ids), dtype=bool)
    supervised[-3:] = True
    return Encoded(ids, supervised), pixels_of(config, images, seed)


def row(*samples: tuple[Encoded, np.ndarray]) -> dict:
    pixels = np.concatenate([pixels for _, pixels in samples])
    return pack_row(
        [e for e, _ in samples],
        list(range(len(samples))),
        pixels if len(pixels) else None,
        step_targets=1,
        image_token_id=IMAGE_TOKEN,
    )
