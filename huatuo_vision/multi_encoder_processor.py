"""The processor of a model with several vision encoders: one picture in, every encoder's pixels of it out.

Here and not with the model, because whoever makes inputs reads it and knows nothing of models.

Legend: N images, F pixels of one image for all encoders, 3 * H_i * H_i for each, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, BatchFeature, LlavaImageProcessorPil, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ImageInput, make_flat_list_of_images

from huatuo_vision.schema import IMAGE_PLACEHOLDER


class MultiEncoderImageProcessor(BaseImageProcessor):
    """`encoders`: each one's own image processing, as `LlavaImageProcessorPil.to_dict` has it, in the model's order."""

    model_input_names = ["pixel_values"]

    def __init__(self, encoders: Sequence[dict[str, Any]], tokens_per_image: int, **_: Any):
        super().__init__()
        self.encoders, self.tokens_per_image = list(encoders), tokens_per_image
        self._each = [LlavaImageProcessorPil.from_dict(values) for values in self.encoders]

    def __call__(self, images: ImageInput, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """pixel_values (N, F), of an image, a list of images, or a list of each text's; (0, F) of an empty list."""
        images = make_flat_list_of_images(images)
        sizes = [3 * own.crop_size["height"] * own.crop_size["width"] for own in self._each]
        pixels = np.empty((len(images), sum(sizes)), dtype=np.float32)
        starts = np.cumsum([0, *sizes])
        for own, start, end in zip(self._each, starts[:-1], starts[1:], strict=True):
            if images:
                made = own(images=images, return_tensors="np")["pixel_values"]  # (N, 3, H_i, H_i)
                pixels[:, start:end] = made.reshape(len(images), -1)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def preprocess(self, images: ImageInput, **kwargs: Any) -> BatchFeature:
        return self(images, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "image_processor_type": type(self).__name__,
            "encoders": self.encoders,
            "tokens_per_image": self.tokens_per_image,
        }


class MultiEncoderProcessor(ProcessorMixin):
    def __init__(
        self,
        image_processor: MultiEncoderImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        **_: Any,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = IMAGE_PLACEHOLDER

    @classmethod
    def from_pretrained(cls, location: Path | str, revision: str = "main", **_: Any) -> MultiEncoderProcessor:
        """Of a model folder or Hub id, whether or not the model's code is loaded."""
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision)
        image_processor = MultiEncoderImageProcessor.from_pretrained(location, revision=revision)
        return cls(image_processor, tokenizer, tokenizer.chat_template)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """pixel_values of all images, in the order of their placeholders in all texts; without images, none."""
        made: dict[str, Any] = {}
        if images is not None and not (isinstance(images, Sequence) and not images):
            made |= self.image_processor(images, return_tensors=return_tensors)
        if text is not None:
            repeated = self.image_token * self.image_processor.tokens_per_image
            texts = [text] if isinstance(text, str) else list(text)
            texts = [one.replace(self.image_token, repeated) for one in texts]
            made |= self.tokenizer(texts, return_tensors=return_tensors, **kwargs)
        return BatchFeature(made)
