"""The models that are timed: real shapes, random weights, made where they run.

The recipe's own classes need pydantic, which the machine with the card need not have. `Phase` and `Train` have the
fields that `huatuo_vision.training` reads, under the same names; a test compares them with the recipe's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from huatuo_vision.model import trainable
from huatuo_vision.model.llava import PackedLlava
from huatuo_vision.training.phase import prepare_model

IMAGE_TOKEN = 3

CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
LANGUAGE_MODELS = {
    "Llama-3-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "Qwen2.5-3B": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-1.5B": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
# For runs without a card: every part runs, no figure means anything.
TOY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOY_LANGUAGE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TOY_LANGUAGE |= {"num_key_value_heads": 2, "vocab_size": 2048}


@dataclass(frozen=True)
class Lora:
    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    quantize: None = None


@dataclass(frozen=True)
class Part:
    lr: float
    sva_lr: float | None = None
    lora: Lora | None = None


@dataclass(frozen=True)
class Train:
    vision_encoder: Part | None = None
    projector: Part | None = None
    language_model: Part | None = None

    @property
    def lora(self) -> Lora | None:
        return self.language_model.lora if self.language_model else None

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in ("vision_encoder", "projector", "language_model") if getattr(self, part))


PHASE_1 = Train(projector=Part(1e-3))
PHASE_2 = Train(projector=Part(2e-5), language_model=Part(2e-5))
LORA = Train(projector=Part(2e-5), language_model=Part(2e-4, lora=Lora()))


@dataclass(frozen=True)
class Optimizer:
    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Schedule:
    name: str = "constant"
    warmup_ratio: float = 0.0


@dataclass(frozen=True)
class Phase:
    train: Train
    recompute: Literal["none", "all"] | int = "none"
    compile: bool = False
    precision: str = "bf16"
    attention: str = "auto"
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    log_every: int = 10**6
    save_every: int = 10**6
    keep_checkpoints: int = 1


def llava_config(language: str, toy: bool) -> LlavaConfig:
    """CLIP-L/336, two projector layers and the language model of this name; every size small in a toy."""
    values: dict[str, Any] = dict(LANGUAGE_MODELS[language])
    text = {"llama": LlamaConfig, "qwen2": Qwen2Config}[values.pop("model_type")]
    values |= (TOY_LANGUAGE if toy else {}) | {"use_cache": False, "max_position_embeddings": 8192, "pad_token_id": 0}
    vision = TOY_VISION if toy else CLIP_L_336
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=text(**values),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text(**values).tie_word_embeddings,
    )


def random_llava(
    config: LlavaConfig,
    device: torch.device,
    dtype: torch.dtype,
    model_class: type[LlavaForConditionalGeneration] = PackedLlava,
) -> LlavaForConditionalGeneration:
    """The same weights on every call on a device, whatever the class."""
    torch.manual_seed(0)
    with device:
        # A config of its own, because a model switches its attention there.
        return model_class._from_config(copy.deepcopy(config), dtype=dtype).train()


def ready_model(config: LlavaConfig, phase: Phase, device: torch.device, *, bf16_state: bool = False) -> nn.Module:
    """The model as `train.py` would have it after loading.

    bf16_state: what trains stays in bf16, and so do its gradients and AdamW's states; train.py keeps fp32 masters.
    """
    model = prepare_model(random_llava(config, device, torch.bfloat16), phase, device)
    if bf16_state:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def weights_in_billions(model: nn.Module) -> tuple[float, float]:
    """(trained, all)"""
    counts = trainable.parameter_counts(model).values()
    return sum(trained for trained, _ in counts) / 1e9, sum(total for _, total in counts) / 1e9
