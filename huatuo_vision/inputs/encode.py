"""Sample -> token ids and which of them are supervised. The only place where training text is rendered.

The whole conversation is rendered once by the chat template and tokenised once. The template marks what
the assistant says with `{% generation %}` (end-of-turn token included); those characters, in every turn,
are what the loss is taken over. Each image placeholder token is then repeated once per image feature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from huatuo_vision.inputs.processor import load_processor, tokens_per_image
from huatuo_vision.schema import IMAGE_PLACEHOLDER, BadSample, Message, Sample, UserError


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as tokens. S: tokens of the sample, image features included."""

    input_ids: np.ndarray  # (S,) int64
    supervised: np.ndarray  # (S,) bool

    @property
    def targets(self) -> int:
        """Supervised tokens that have a predecessor to predict them from."""
        return int(self.supervised[1:].sum())


class Encoder:
    """Encodes samples for one composed model. Cheap to send to another process: it travels as its folder."""

    def __init__(self, processor_folder: Path | str):
        self.folder = Path(processor_folder)
        processor = load_processor(self.folder)
        self._tokenizer = processor.tokenizer
        self._fast = self._tokenizer.backend_tokenizer
        self._image_processor = processor.image_processor
        self._template = processor.chat_template or self._tokenizer.chat_template
        self._special_tokens = self._tokenizer.special_tokens_map
        self.image_token_id = self._tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
        self.tokens_per_image = tokens_per_image(processor)
        parts = (self._fast.to_str(), self._template, str(self.tokens_per_image))
        self.fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        self._check_template()

    def __reduce__(self) -> tuple:
        return Encoder, (self.folder,)

    def encode(self, sample: Sample) -> Encoded:
        """Raises BadSample where nothing would be supervised."""
        ids, supervised = self._tokenise(sample.messages)
        is_image = ids == self.image_token_id
        if int(is_image.sum()) != len(sample.images):
            raise BadSample(
                sample.id,
                "placeholder_count",
                f"{int(is_image.sum())} image tokens after tokenisation for {len(sample.images)} images; "
                f"text must not spell {IMAGE_PLACEHOLDER} (escape it)",
            )
        repeats = np.where(is_image, self.tokens_per_image, 1)
        encoded = Encoded(np.repeat(ids, repeats), np.repeat(supervised & ~is_image, repeats))
        if encoded.targets == 0:
            raise BadSample(sample.id, "no_target", "no token of it is supervised; the assistant's answers are empty")
        return encoded

    def pixel_values(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(N, 3, H, W) float32, or (N, F) for several encoders, by the same image processor that inference uses."""
        return self._image_processor(images=list(images), return_tensors="np")["pixel_values"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        conversation = [{"role": m.role, "content": m.content} for m in messages]
        rendered, spans = render_jinja_template(
            conversations=[conversation],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=generation_prompt,
            **self._special_tokens,
        )
        return rendered[0], spans[0]

    def _tokenise(
        self, messages: Sequence[Message], *, generation_prompt: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids (S,) int64 and supervised (S,) bool, images still one token each."""
        text, spans = self._render(messages, generation_prompt=generation_prompt)
        tokens = self._fast.encode(text, add_special_tokens=False)
        starts, ends = np.asarray(tokens.offsets, dtype=np.int64).reshape(-1, 2).T
        supervised = np.zeros(len(starts), dtype=bool)
        for start, end in spans:
            supervised |= (starts >= start) & (ends <= end) & (ends > starts)
        return np.asarray(tokens.ids, dtype=np.int64), supervised

    def _check_template(self) -> None:
        """The tokens before an answer must be those of the generation prompt, or the model learns to answer
        after a prompt that it never sees at inference. Checked once, for this tokenizer and template."""
        question, answer = Message("user", "Which organ?"), Message("assistant", "The left kidney.")
        prompt, _ = self._tokenise([question], generation_prompt=True)
        ids, supervised = self._tokenise([question, answer])
        first = int(supervised.argmax())
        if not supervised.any() or first != len(prompt) or not np.array_equal(ids[:first], prompt):
            raise UserError(
                f"template and tokenizer in {self.folder} do not fit: the prompt ends in {self.decode(prompt[-4:])!r} "
                f"but in training the answer follows {self.decode(ids[:first][-4:])!r}; choose another chat_template"
            )
        if int(ids[supervised][-1]) not in self._tokenizer.added_tokens_decoder:
            raise UserError(f"chat template in {self.folder} supervises no end of turn; the model would never stop")
