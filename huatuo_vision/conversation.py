"""A conversation with a model: turns, their images, and answers that are shown while they are made.

Decoding is the checkpoint's generation config's, unless told otherwise; where an answer ends is always its knowledge.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TextStreamer,
)

from huatuo_vision.inference import encode_prompts, end_ids, load_for_inference, pad_id
from huatuo_vision.inputs.images import load_image
from huatuo_vision.schema import BadSample, ImageRef, UserError, escape_placeholder

DEFAULT_NEW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Decoding:
    """What is asked for in place of the checkpoint's own; None leaves it."""

    temperature: float | None = None  # 0: greedy
    max_new_tokens: int | None = None
    repetition_penalty: float | None = (
        None  # over the answer's own tokens: over the prompt it would punish the question
    )


@dataclass(slots=True)
class Conversation:
    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    decoding: GenerationConfig
    repetition_penalty: float
    messages: list[dict[str, Any]] = field(default_factory=list)
    pixel_values: list[torch.Tensor] = field(default_factory=list)  # (1, 3, H, W) each, in the order of the questions
    pending: list[torch.Tensor] = field(default_factory=list)  # the same of images for the next question

    def add_image(self, path: Path) -> tuple[str, ...]:
        """Shows an image with the next question; what was converted on the way. Raises UserError for a bad one."""
        if not path.is_file():
            raise UserError(f"there is no image {path}; check the path")
        try:
            loaded = load_image(ImageRef(path=str(path)), path.name)
        except BadSample as error:
            raise UserError(error.explanation) from None
        self.pending.append(self.processor.image_processor(images=loaded.image, return_tensors="pt")["pixel_values"])
        return loaded.notes

    def clear(self) -> None:
        """Forgets turns and images, those for the next question too."""
        self.messages.clear()
        self.pixel_values.clear()
        self.pending.clear()

    def ask(self, question: str, show: Callable[[str], None]) -> str:
        """The answer, shown piece by piece. An answer that KeyboardInterrupt stops counts as far as it came.

        Raises UserError where the model has no room left for an answer; the question is then as if never asked.
        """
        turn = {
            "role": "user",
            "content": [{"type": "image"}] * len(self.pending)
            + [{"type": "text", "text": escape_placeholder(question)}],
        }
        pixel_values = [*self.pixel_values, *self.pending]
        prompt = self.processor.apply_chat_template([*self.messages, turn], add_generation_prompt=True, tokenize=False)
        answer = self._answer(prompt, torch.cat(pixel_values) if pixel_values else None, show)
        self.messages += [turn, {"role": "assistant", "content": escape_placeholder(answer)}]
        self.pixel_values = pixel_values
        self.pending = []
        return answer

    @torch.inference_mode()
    def _answer(self, prompt: str, pixel_values: torch.Tensor | None, show: Callable[[str], None]) -> str:
        inputs = encode_prompts(self.processor, [prompt], pixel_values)
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values.to(self.model.dtype)
        length = inputs["input_ids"].shape[1]
        room = self.model.config.get_text_config().max_position_embeddings - length
        if room <= 0:
            raise UserError(
                f"the conversation has {length:,} tokens with its images, and the model reads at most "
                f"{length + room:,}; start over, or ask with fewer images"
            )
        decoding = copy.copy(self.decoding)
        decoding.max_new_tokens = min(decoding.max_new_tokens, room)
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty, prompt_ignore_length=length))
        stream = _Stream(self.processor, show)
        try:
            tokens = self.model.generate(
                **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
                generation_config=decoding,
                logits_processor=processors,
                streamer=stream,
            )
        except KeyboardInterrupt:
            stream.end()
            return stream.shown
        except torch.OutOfMemoryError:
            raise UserError("out of memory; start over, or ask with fewer images") from None
        return self.processor.tokenizer.decode(tokens[0, length:], skip_special_tokens=True)


class _Stream(TextStreamer):
    """Hands over words as they are finished, and keeps them."""

    def __init__(self, processor: LlavaProcessor, show: Callable[[str], None]):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self.shown = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.shown += text
        self._show(text)


def start(folder: Path, device: torch.device, wanted: Decoding) -> Conversation:
    """Loads a model folder. Raises UserError where it lacks a processor or a weight."""
    model, processor = load_for_inference(folder, device)
    own = model.generation_config
    penalty = wanted.repetition_penalty
    if penalty is None:
        # Written by model.convert; transformers' own key would count the prompt.
        penalty = getattr(own, "new_token_repetition_penalty", 1.0)
    sampled = own.do_sample if wanted.temperature is None else wanted.temperature > 0
    temperature = own.temperature if wanted.temperature is None else wanted.temperature
    decoding = GenerationConfig(
        max_new_tokens=wanted.max_new_tokens or own.max_new_tokens or DEFAULT_NEW_TOKENS,
        min_new_tokens=own.min_new_tokens,
        repetition_penalty=own.repetition_penalty if wanted.repetition_penalty is None else None,
        do_sample=bool(sampled),
        **({"temperature": temperature, "top_k": own.top_k, "top_p": own.top_p} if sampled else {}),
        suppress_tokens=own.suppress_tokens,
        eos_token_id=end_ids(model, processor),
        pad_token_id=pad_id(processor),
    )
    # generate() takes what it is not given from here.
    model.generation_config = decoding
    return Conversation(model, processor, decoding, penalty)


def described(conversation: Conversation) -> str:
    """The decoding in words."""
    decoding = conversation.decoding
    words = ["the likeliest token each time"]
    if decoding.do_sample:
        words = [f"sampling at temperature {decoding.temperature if decoding.temperature is not None else 1.0:g}"]
        words += [f"top-{name} {value:g}" for name, value in (("k", decoding.top_k), ("p", decoding.top_p)) if value]
    if conversation.repetition_penalty != 1.0:
        words.append(f"repetition penalty {conversation.repetition_penalty:g} over the answer")
    if decoding.repetition_penalty not in (None, 1.0):
        words.append(f"repetition penalty {decoding.repetition_penalty:g} over prompt and answer")
    return ", ".join([*words, f"at most {decoding.max_new_tokens} new tokens"])
