"""The processor of a model folder, with the PIL image backend pinned."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoProcessor, LlavaImageProcessorPil, LlavaProcessor

from huatuo_vision.multi_encoder_processor import MultiEncoderProcessor


def load_processor(folder: Path | str) -> LlavaProcessor | MultiEncoderProcessor:
    """torchvision's resize, the default where it is installed, moves logits by 1e-2."""
    settings = Path(folder) / "processor_config.json"
    if settings.is_file() and json.loads(settings.read_text())["processor_class"] == MultiEncoderProcessor.__name__:
        return MultiEncoderProcessor.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = LlavaImageProcessorPil.from_pretrained(folder)
    return processor


def tokens_per_image(processor: LlavaProcessor | MultiEncoderProcessor) -> int:
    """How many image tokens stand for one image, as the model hands on features of it."""
    if isinstance(processor, MultiEncoderProcessor):
        return processor.image_processor.tokens_per_image
    size = processor.image_processor.crop_size or processor.image_processor.size
    patches = ((size.get("height") or size["shortest_edge"]) // processor.patch_size) ** 2
    class_token_dropped = processor.vision_feature_select_strategy == "default"
    return patches + processor.num_additional_image_tokens - int(class_token_dropped)
