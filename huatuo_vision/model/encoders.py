"""Vision encoders: pixels in, a square grid of features out.

LLaVA takes CLIP and SigLIP; a model of several encoders (`model.multi_encoder`) takes DINOv2 and ConvNeXt beside them.

Legend: N images, H pixels on a side, S features on a side, C channels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from huatuo_vision.schema import UserError

# ConvNeXt's first stage is 4 times smaller than the picture, and each later one 2 times smaller than the one before.
_CONVNEXT_REDUCTION = 32


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    image_processor: type[Any]
    class_tokens: int
    any_size: bool = False  # reads other sizes than its config's


_CLIP = EncoderFamily(CLIPVisionConfig, CLIPVisionModel, CLIPImageProcessorPil, class_tokens=1)
_SIGLIP = EncoderFamily(SiglipVisionConfig, SiglipVisionModel, SiglipImageProcessorPil, class_tokens=0)
_DINOV2 = EncoderFamily(Dinov2Config, Dinov2Model, BitImageProcessorPil, class_tokens=1, any_size=True)
_CONVNEXT = EncoderFamily(ConvNextConfig, ConvNextModel, ConvNextImageProcessorPil, class_tokens=0, any_size=True)

# By the model_type of a checkpoint: a whole CLIP or SigLIP, or its vision half alone.
LLAVA_ENCODERS = {"clip": _CLIP, "clip_vision_model": _CLIP, "siglip": _SIGLIP, "siglip_vision_model": _SIGLIP}
ENCODERS = LLAVA_ENCODERS | {"dinov2": _DINOV2, "convnext": _CONVNEXT}


@dataclass(frozen=True, slots=True)
class GridEncoder:
    """One encoder of several: the pixels that it takes, and which of its features are handed on, as which grid."""

    name: str
    config: PreTrainedConfig
    image_size: int  # H
    feature_layer: int | None  # of the hidden states; None: what the encoder itself gives out last
    side: int  # S; where it is not the encoder's own, features are resized bilinearly

    @classmethod
    def of(
        cls,
        name: str,
        config: PreTrainedConfig,
        image_size: int | None = None,
        feature_layer: int | None = None,
        side: int | None = None,
    ) -> GridEncoder:
        """What is left out is the encoder's own. Raises UserError for what the encoder cannot give."""
        own_size = config.image_size
        size = own_size if image_size is None else image_size
        if size != own_size and not ENCODERS[config.model_type].any_size:
            raise UserError(
                f"vision encoder {name} takes {own_size} x {own_size} pixels, and image_size says {size}; leave it out"
            )
        patch = _CONVNEXT_REDUCTION if config.model_type == "convnext" else config.patch_size
        if size % patch and ENCODERS[config.model_type].any_size:
            raise UserError(
                f"vision encoder {name}: image_size {size} is no multiple of its {patch} pixels for each feature; "
                f"take {size // patch * patch or patch}"
            )
        if config.model_type == "convnext":
            if feature_layer is not None:
                raise UserError(
                    f"vision encoder {name} is a ConvNeXt, whose stages are all handed on; remove feature_layer"
                )
        elif feature_layer is not None and not -config.num_hidden_layers <= feature_layer <= config.num_hidden_layers:
            raise UserError(
                f"vision encoder {name}: feature_layer {feature_layer} is out of range; it has "
                f"{config.num_hidden_layers} layers, so expected {-config.num_hidden_layers} to "
                f"{config.num_hidden_layers}"
            )
        return cls(name, config, size, feature_layer, size // patch if side is None else side)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GridEncoder:
        """The inverse of `to_dict`."""
        config = dict(values["config"])
        return cls(**values | {"config": AutoConfig.for_model(config.pop("model_type"), **config)})

    def to_dict(self) -> dict[str, Any]:
        values = {key: value for key, value in asdict(self).items() if key != "config"}
        return values | {"config": self.config.to_dict()}

    @property
    def channels(self) -> int:
        """C."""
        return sum(self.config.hidden_sizes) if self.config.model_type == "convnext" else self.config.hidden_size

    @property
    def pixels(self) -> int:
        """Numbers that it reads of one image."""
        return self.config.num_channels * self.image_size**2

    @property
    def layers_read(self) -> int | None:
        """How many of its layers stand before the features; None: all of it counts, its last norm too."""
        if self.config.model_type == "convnext" or self.feature_layer is None:
            return None
        return self.feature_layer if self.feature_layer >= 0 else self.config.num_hidden_layers + 1 + self.feature_layer

    def features(self, encoder: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, H) -> (N, S, S, C), by the module `encoder`."""
        # As CLIP does by itself, and ConvNeXt does not.
        out = encoder(pixel_values=pixels.to(encoder.dtype), output_hidden_states=True, return_dict=True)
        if self.config.model_type == "convnext":
            stages = out.hidden_states[-self.config.num_stages :]  # (N, C_i, S_i, S_i) each
            return torch.cat([self._resized(stage) for stage in stages], dim=1).permute(0, 2, 3, 1)
        states = out.last_hidden_state if self.feature_layer is None else out.hidden_states[self.feature_layer]
        states = states[:, ENCODERS[self.config.model_type].class_tokens :]
        own = self.image_size // self.config.patch_size
        grid = states.unflatten(1, (own, own))
        if own == self.side:
            return grid
        return self._resized(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _resized(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, C, s, s) -> (N, C, S, S)."""
        if maps.shape[-1] == self.side:
            return maps
        size = (self.side, self.side)
        return F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False).to(maps.dtype)
