"""transformers' LLaVA with a forward for packed rows. What is saved is plain LlavaForConditionalGeneration.

Legend: S tokens of the row, N images in it, P features per image, V vision width, D language width,
T supervised tokens, in G groups (the sources they come from).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from huatuo_vision.model.flops import vision_layers_read

# 256 rows of logits at a time stay in the cache, and their gradients are taken before they leave it: on a CPU in fp32
# a quarter to a third less time for head and loss than whole logits. Absent before torch 2.13; in bf16 its sum is off.
_CHUNKED = (
    torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=256)
    if hasattr(torch.nn, "LinearCrossEntropyOptions")
    else None
)


class PackedLlava(LlavaForConditionalGeneration):
    """Takes one packed row (`inputs.rows.pack_row`) and returns the summed loss of each source's targets.

    Saved through `model.folder`, never through `save_pretrained`, so no checkpoint names this class.
    """

    def forward(
        self,
        input_ids: torch.Tensor,  # (1, S)
        position_ids: torch.Tensor,  # (1, S), restarting at every sample
        logits_to_keep: torch.Tensor,  # (T,) positions that predict a supervised token
        shift_labels: torch.Tensor,  # (T,) the tokens they predict
        target_counts: tuple[int, ...],  # (G,) how many of them belong together, one group after the other
        cu_seq_lens: torch.Tensor,  # (samples + 1,) int32
        sample_lengths: tuple[int, ...],
        pixel_values: torch.Tensor | None = None,  # (N, 3, H, W), in the order of their placeholders
        image_positions: torch.Tensor | None = None,  # (N * P,) where their features go, with pixel_values only
    ) -> torch.Tensor:  # (G,) fp32
        embeddings = self.get_input_embeddings()(input_ids)  # (1, S, D)
        # A row without images runs a blank one and adds nothing of it: every rank runs the same modules, so no
        # rank of DDP waits for a gradient, and none of FSDP or ZeRO-3 for a gather, that never comes.
        blank = pixel_values is None
        features, seen = self.see(self.blank_image(embeddings.device) if blank else pixel_values, image_positions)
        features = features.to(embeddings.dtype)
        if blank:
            embeddings = embeddings + 0.0 * features.float().mean().to(embeddings.dtype)
        else:
            embeddings = embeddings.index_copy(1, image_positions, features[None])

        longest = max(sample_lengths)
        hidden = self.model.language_model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            use_cache=False,  # a cache switches off the detection of packed rows
            cu_seq_lens_q=cu_seq_lens,
            cu_seq_lens_k=cu_seq_lens,
            max_length_q=longest,
            max_length_k=longest,
            sample_lengths=sample_lengths,
            **seen,
        ).last_hidden_state[0]  # (S, D)
        kept = hidden.index_select(0, logits_to_keep)  # (T, D): logits only where there is a label
        return torch.stack(self._summed_losses(kept, shift_labels, target_counts))

    def blank_image(self, device: torch.device) -> torch.Tensor:
        """(1, 3, H, W)"""
        side = self.config.vision_config.image_size
        return torch.zeros(1, 3, side, side, device=device)

    def see(
        self, pixel_values: torch.Tensor, image_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Features (N * P, D) for the image positions, and what else of the images the language model's call takes."""
        features = self.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        return torch.cat(tuple(features)), {}

    def _summed_losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, target_counts: tuple[int, ...]
    ) -> list[torch.Tensor]:
        """hidden: (T, D), labels: (T,). Cross-entropy in fp32, summed over each group."""
        groups = labels.split(target_counts)
        # FSDP gathers the head when it is called, not when its weight is looked at; ZeRO-3 when `lm_head.weight` is
        # looked at too, and keeps it for the rest of the step.
        weight = next(self.lm_head.parameters())
        in_fp32 = hidden.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
        sharded = hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")
        if _CHUNKED is not None and hidden.device.type == "cpu" and in_fp32 and not sharded:
            return [
                F.linear_cross_entropy(part, weight, targets, reduction="sum", options=_CHUNKED)
                for part, targets in zip(hidden.split(target_counts), groups, strict=True)
            ]
        # Called once: rows of different ranks have different numbers of groups, and ZeRO-3 gathers at every call.
        logits = self.lm_head(hidden).split(target_counts)
        return [
            F.cross_entropy(part.float(), targets, reduction="sum")
            for part, targets in zip(logits, groups, strict=True)
        ]


def skip_unread_layers(model: PackedLlava) -> None:
    """Encoder layers behind the last state that the projector reads hand their input on, and keep their weights."""
    tower = model.model.vision_tower
    if isinstance(tower, nn.ModuleDict):
        read = {grid.name: grid.layers_read for grid in model.config.grids}
    else:
        tower, read = {"": tower}, {"": vision_layers_read(model.config)}
    for name, encoder in tower.items():
        if read[name] is not None:
            layers = encoder.encoder.layer if hasattr(encoder.encoder, "layer") else encoder.encoder.layers
            for layer in layers[read[name] :]:
                layer.forward = _pass_on


def _pass_on(hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return hidden


def recompute(model: PackedLlava, every: int, vision: bool = False) -> None:
    """Recompute activations of every n-th decoder layer (and encoder layer, where it trains) in the backward."""
    encoders = model.model.vision_tower
    # Several encoders are a ModuleDict of them.
    encoders = list(encoders.values()) if isinstance(encoders, nn.ModuleDict) else [encoders]
    # A ConvNeXt keeps its own.
    able = [encoder for encoder in encoders if vision and encoder.supports_gradient_checkpointing]
    for tower in (model.model.language_model, *able):
        # transformers 5.17 knows the older name only.
        enable = getattr(tower, "activation_checkpointing_enable", tower.gradient_checkpointing_enable)
        enable({"use_reentrant": False}, every_n_layers=every)
