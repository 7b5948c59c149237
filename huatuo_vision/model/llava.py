"""transformers' LLaVA with a forward for packed rows. What is saved is plain LlavaForConditionalGeneration.

Legend: S tokens of the row, N images in it, P features per image, V vision width, D language width,
T supervised tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration


class PackedLlava(LlavaForConditionalGeneration):
    """Takes one packed row (`inputs.rows.pack_row`) and returns the loss of each supervised token.

    Saved through `model.folder`, never through `save_pretrained`, so no checkpoint names this class.
    """

    def forward(
        self,
        input_ids: torch.Tensor,  # (1, S)
        position_ids: torch.Tensor,  # (1, S), restarting at every sample
        logits_to_keep: torch.Tensor,  # (T,) positions that predict a supervised token
        shift_labels: torch.Tensor,  # (T,) the tokens they predict
        cu_seq_lens: torch.Tensor,  # (samples + 1,) int32
        sample_lengths: tuple[int, ...],
        pixel_values: torch.Tensor | None = None,  # (N, 3, H, W), in the order of their placeholders
    ) -> torch.Tensor:  # (T,) fp32
        embeddings = self.get_input_embeddings()(input_ids)  # (1, S, D)
        # A row without images runs a blank one and adds nothing of it: every rank runs the same modules, so no
        # rank of DDP waits for a gradient, and none of FSDP or ZeRO-3 for a gather, that never comes.
        blank = pixel_values is None
        features, seen = self.see(
            input_ids, self.blank_image(embeddings.device) if blank else pixel_values, blank=blank
        )
        if blank:
            embeddings = embeddings + 0.0 * features.float().mean().to(embeddings.dtype)
        else:
            is_image = (input_ids == self.config.image_token_id).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(is_image, features.to(embeddings.dtype))

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
        logits = self.lm_head(hidden[logits_to_keep])  # (T, vocabulary): only where there is a label
        return F.cross_entropy(logits.float(), shift_labels, reduction="none")

    def blank_image(self, device: torch.device) -> torch.Tensor:
        """(1, 3, H, W)"""
        side = self.config.vision_config.image_size
        return torch.zeros(1, 3, side, side, device=device)

    def see(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, *, blank: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Features (N * P, D) for the image tokens, and what else of the images the language model's call takes."""
        features = self.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        return torch.cat(tuple(features)), {}


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
