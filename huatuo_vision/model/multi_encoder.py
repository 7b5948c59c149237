"""A LLaVA with several vision encoders, and, where its projector is an aggregator, blocks inside the language model.

Beside `LlavaForConditionalGeneration` and a subclass of it: other encoders and projector, the same language model,
packing, trainer and generation. With one encoder and the mlp projector it computes exactly what LLaVA does. Importing
this registers config and model with transformers' Auto classes; folders name no other code, but nothing except this
package can run them.

All encoders' pixels of an image stand side by side in one row of `pixel_values`, so that an image is one row
everywhere, as many encoders as there are.

Legend: B rows of a batch, S tokens of a row, N images, F pixels of one image for all encoders, P features per image,
D language width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaPreTrainedModel,
)

from huatuo_vision.model.encoders import GridEncoder
from huatuo_vision.model.llava import PackedLlava
from huatuo_vision.model.sva import (
    ImageContext,
    MlpProjector,
    SvaProjector,
    Windows,
    start_vectors,
    window_context,
)
from huatuo_vision.multi_encoder_processor import MultiEncoderProcessor
from huatuo_vision.schema import UserError


class MultiEncoderConfig(PreTrainedConfig):
    """`encoders`: a `GridEncoder.to_dict` each, in order. `sva`: side, depth, groups, width, heads, newline and in_llm
    of the aggregator; None: the mlp projector."""

    model_type = "multi_encoder_llava"
    sub_configs = {"text_config": AutoConfig}
    attribute_map = {"image_token_id": "image_token_index"}

    text_config: dict | PreTrainedConfig | None = None
    encoders: list | None = None
    sva: dict | None = None
    image_token_index: int = 32000
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            values = dict(self.text_config)
            self.text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        elif self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        self.encoders = self.encoders or []
        super().__post_init__(**kwargs)

    @property
    def grids(self) -> list[GridEncoder]:
        return [GridEncoder.from_dict(values) for values in self.encoders]

    @property
    def side(self) -> int:
        """Of the square of features that is handed on."""
        return self.sva["side"] if self.sva else self.encoders[0]["side"]

    @property
    def newline(self) -> bool:
        return bool(self.sva and self.sva["newline"])

    @property
    def tokens_per_image(self) -> int:
        """P."""
        return self.side * (self.side + self.newline)


def check_grids(encoders: Sequence[GridEncoder], sva_side: int | None) -> None:
    """Raises UserError where the encoders' grids do not go together. sva_side: queries on a side; None for mlp."""
    for encoder in encoders:
        here = f"vision encoder {encoder.name} gives {encoder.side} x {encoder.side} features"
        if sva_side is None and encoder.side != encoders[0].side:
            first = encoders[0]
            raise UserError(
                f"{here} and {first.name} {first.side} x {first.side}; projector mlp2x_gelu lays the grids on top of "
                f"each other, so give {encoder.name} side: {first.side}, or take projector: sva"
            )
        if sva_side is not None and encoder.side % sva_side:
            nearest = max(sva_side, round(encoder.side / sva_side) * sva_side)
            raise UserError(
                f"{here}, which {sva_side} x {sva_side} queries do not divide into equal windows; give it side: "
                f"{nearest}, or the aggregator another sva.side"
            )


class _Weights(LlavaPreTrainedModel):
    """How what is not loaded starts: linears and norms as transformers starts them, the aggregator as Cambrian-1."""

    config_class = MultiEncoderConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        start_vectors(module)


class MultiEncoderModel(_Weights):
    def __init__(self, config: MultiEncoderConfig):
        super().__init__(config)
        self.grids = config.grids
        self.vision_tower = nn.ModuleDict({grid.name: AutoModel.from_config(grid.config) for grid in self.grids})
        self.multi_modal_projector = projector(config, self.grids)
        self.language_model = AutoModel.from_config(config.text_config)
        for layer in config.sva["in_llm"] if config.sva else ():
            # A hook of the layer, not code around it: it is there under FSDP, recompute, LoRA and in every copy.
            self.language_model.layers[layer].register_forward_hook(partial(window_context, layer), with_kwargs=True)
        self.post_init()

    def see(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, Windows | None]:
        """pixel_values (N, F) -> features (N, P, D), and what blocks inside the language model look at."""
        sizes = [grid.pixels for grid in self.grids]
        if pixel_values.dim() != 2 or pixel_values.shape[1] != sum(sizes):
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; expected (images, {sum(sizes)}), as the "
                f"model's own image processor makes them for {', '.join(grid.name for grid in self.grids)}"
            )
        grids = []
        for grid, pixels in zip(self.grids, pixel_values.split(sizes, dim=1), strict=True):
            pixels = pixels.unflatten(1, (-1, grid.image_size, grid.image_size))  # (N, 3, H, H)
            grids.append(grid.features(self.vision_tower[grid.name], pixels))
        return self.multi_modal_projector(grids)

    def image_context(self, windows: Windows | None, image_positions: torch.Tensor | None) -> dict[str, ImageContext]:
        """The keyword for the language model; none where no block is inside it.

        image_positions: (N * P,) among all tokens of the call, newlines too; None: no image at all, but a blank one."""
        if windows is None or not len(self.multi_modal_projector.in_llm):
            return {}
        side, images = self.config.side, len(windows.context)
        if image_positions is None:
            positions = torch.zeros(images * side**2, dtype=torch.long, device=windows.context.device)
        else:
            positions = image_positions.view(images, side, -1)[:, :, :side].flatten()
        blocks = self.multi_modal_projector.in_llm
        return {"image_context": ImageContext(blocks, positions, windows, blank=image_positions is None)}

    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # (B, S)
        pixel_values: torch.Tensor | None = None,  # (N, F), in the order of their placeholders
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        features = None
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and len(pixel_values):
            if input_ids is None:
                raise ValueError("images are placed by their tokens; give input_ids with pixel_values")
            features, windows = self.see(pixel_values)
            is_image = input_ids == self.config.image_token_id
            expected, found = features.shape[0] * features.shape[1], int(is_image.sum())
            if found != expected:
                raise ValueError(
                    f"{found} image tokens for {len(pixel_values)} images of {features.shape[1]} features each, which "
                    f"need {expected}; whoever makes input_ids must repeat each image's token"
                )
            inputs_embeds = inputs_embeds.masked_scatter(is_image.unsqueeze(-1), features.to(inputs_embeds.dtype))
            kwargs |= self.image_context(windows, is_image.flatten().nonzero().flatten())
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )


class MultiEncoderLlava(_Weights, LlavaForConditionalGeneration):
    def __init__(self, config: MultiEncoderConfig):
        LlavaPreTrainedModel.__init__(self, config)  # LLaVA's own would build a LlavaModel
        self.model = MultiEncoderModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *_: Any, **__: Any) -> None:
        """Of the language model alone: each encoder keeps what it can run (a ConvNeXt has no attention)."""
        several = isinstance(attn_implementation, dict)
        language_model = attn_implementation["text_config"] if several else attn_implementation
        self.model.language_model.set_attn_implementation(language_model)

    def get_image_features(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        features, _windows = self.model.see(pixel_values)
        return BaseModelOutputWithPooling(pooler_output=tuple(features))

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """For beams and several answers: each row's images as often as the row. transformers repeats image by image,
        which deals two images of a row out to its copies."""
        rows, expanded = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if pixel_values is not None and expand_size > 1:
            images = (input_ids == self.config.image_token_id).sum(dim=1) // self.config.tokens_per_image
            of_rows = pixel_values.split(images.tolist())
            pixel_values = torch.cat([own.repeat(expand_size, 1) for own in of_rows])
        return rows, expanded if pixel_values is None else expanded | {"pixel_values": pixel_values}

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


class PackedMultiEncoderLlava(PackedLlava, MultiEncoderLlava):
    """`PackedLlava` with several encoders: takes one packed row and returns the loss of each supervised token."""

    config_class = MultiEncoderConfig

    def blank_image(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(1, sum(grid.pixels for grid in self.model.grids), device=device)

    def see(
        self, pixel_values: torch.Tensor, image_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        features, windows = self.model.see(pixel_values)
        return features.flatten(0, 1), self.model.image_context(windows, image_positions)


def projector(config: MultiEncoderConfig, encoders: Sequence[GridEncoder]) -> SvaProjector | MlpProjector:
    channels, hidden = [encoder.channels for encoder in encoders], config.text_config.hidden_size
    if config.sva is None:
        return MlpProjector(channels, hidden)
    return SvaProjector(channels, [encoder.side for encoder in encoders], hidden, **config.sva)


AutoConfig.register(MultiEncoderConfig.model_type, MultiEncoderConfig)
AutoModel.register(MultiEncoderConfig, MultiEncoderModel)
AutoModelForImageTextToText.register(MultiEncoderConfig, MultiEncoderLlava)
AutoProcessor.register(MultiEncoderConfig, MultiEncoderProcessor)
