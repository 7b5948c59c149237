"""The processor of a model folder, with the PIL image backend pinned."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoProcessor, LlavaImageProcessorPil, LlavaProcessor


def load_processor(folder: Path | str) -> LlavaProcessor:
    """torchvision's resize, the default where it is installed, moves logits by 1e-2."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = LlavaImageProcessorPil.from_pretrained(folder)
    return processor
