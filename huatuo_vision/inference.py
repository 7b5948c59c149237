"""A model folder made ready to answer, and prompts made its inputs; what asking a benchmark and chatting share.

Legend: B prompts, S tokens of the longest with its images, N images of all prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from huatuo_vision.inputs.processor import load_processor, tokens_per_image
from huatuo_vision.model.folder import load_model
from huatuo_vision.schema import UserError


def precision_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_for_inference(folder: Path, device: torch.device) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model of a folder, an adapter's included, and its processor, which pads on the left.

    Raises UserError where the folder lacks a processor or a weight.
    """
    with _no_loading_bars():
        try:
            processor = load_processor(folder)
        except (OSError, ValueError) as error:
            brief = str(error).strip().splitlines()[0]
            raise UserError(f"--model {folder}: no processor can be loaded from it ({brief})") from None
        model = load_model(folder, dtype=precision_on(device))
    processor.tokenizer.padding_side = "left"
    if (folder / "adapter_config.json").is_file():
        # The model with the adapter in its layers: generate() reads its settings, not those of PEFT's wrapper.
        model = model.get_base_model()
    return model.to(device).eval(), processor


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def end_ids(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> list[int]:
    """The tokens that end an answer, by the checkpoint's generation config and by its tokenizer."""
    own = model.generation_config.eos_token_id
    return sorted({*(own if isinstance(own, list) else [own]), processor.tokenizer.eos_token_id} - {None})


def pad_id(processor: LlavaProcessor) -> int:
    tokenizer = processor.tokenizer
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def encode_prompts(
    processor: LlavaProcessor, prompts: Sequence[str], pixel_values: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (B, S) of prompts as the chat template rendered them, one `<image>` for each image.

    pixel_values: (N, 3, H, W), or (N, F) for several encoders, in the order of the placeholders; None without images.
    """
    if pixel_values is not None:
        image = processor.image_token * tokens_per_image(processor)
        prompts = [prompt.replace(processor.image_token, image) for prompt in prompts]
    # The template has written every special token already, the first one of the sequence included.
    # verbose: whoever asks says by himself that a prompt is too long.
    tokens = processor.tokenizer(
        list(prompts), padding=True, add_special_tokens=False, return_tensors="pt", verbose=False
    )
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
