"""Asking a model: left-padded batches of similar rows, each finished batch on disk before the next begins.

A row's answer depends on that row alone: not on the rows beside it, the number of processes, or where a killed run
went on. Legend: B rows of a batch, S tokens of its longest prompt with images, N images of the batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from huatuo_vision.evaluation.answers import progress_bar, response_of
from huatuo_vision.evaluation.protocols import Decoding, Protocol
from huatuo_vision.evaluation.responses import append
from huatuo_vision.evaluation.rows import Row
from huatuo_vision.inference import encode_prompts, end_ids, load_for_inference, pad_id
from huatuo_vision.inputs.images import load_image
from huatuo_vision.schema import UserError, escape_placeholder

Item = TypeVar("Item")
Result = TypeVar("Result")


def weights_fingerprint(folder: Path) -> str:
    """16 hex digits over the configuration files and the beginning of every tensor.

    Two checkpoints of one run differ in no name and no size, only in values; reading 4 KiB of each tensor finds
    that in a second where a checksum of the whole files takes minutes.
    """
    digest = hashlib.sha256()
    for pattern in ("*config.json", "tokenizer.json", "*.jinja"):
        for path in sorted(folder.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"--model {folder}: no *.safetensors file in it; expected a model folder as train.py writes it")
    for path in weights:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = file.read(header_size)
            digest.update(path.name.encode() + header)
            for name, tensor in json.loads(header).items():
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    file.seek(8 + header_size + begin)
                    digest.update(file.read(min(end - begin, 4096)))
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Asked:
    """A model that is ready to be asked; `model.generation_config` holds the protocol's decoding."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    protocol: Protocol
    blind: bool


def load(folder: Path, protocol: Protocol, device: torch.device, *, blind: bool) -> Asked:
    """Raises UserError where the folder lacks a processor or a weight."""
    model, processor = load_for_inference(folder, device)
    model.generation_config = _generation_config(protocol.decoding, model, processor)
    return Asked(model, processor, protocol, blind)


def answer(
    rows: Sequence[Row],
    folder: Path,
    protocol: Protocol,
    world: PartialState,
    out: Path,
    *,
    blind: bool,
    batch_size: int,
) -> None:
    """Append the answers to this process's share of `rows` to its file in `out`, batch by batch."""
    asked = load(folder, protocol, world.device, blind=blind)
    share = share_of(rows, protocol, world, blind=blind)
    path = out / f"responses.rank{world.process_index}.jsonl"
    answer_rows(asked, share, path, batch_size=batch_size, hidden=not world.is_main_process)


def answer_rows(asked: Asked, rows: Sequence[Row], path: Path, *, batch_size: int, hidden: bool = False) -> None:
    """Append the answers to `rows` to `path`. hidden: no progress bar."""
    with progress_bar("answering", hidden=hidden) as progress:
        task = progress.add_task("rows", total=len(rows))
        for batch in ahead(lambda batch: prepare(asked, batch), in_batches(rows, batch_size)):
            replies = _generate(asked, batch)
            append(
                path,
                [
                    response_of(row, text, new_tokens=new_tokens)
                    for row, (text, new_tokens) in zip(batch.rows, replies, strict=True)
                ],
            )
            progress.advance(task, len(batch.rows))


def share_of(rows: Sequence[Row], protocol: Protocol, world: PartialState, *, blind: bool) -> list[Row]:
    """This process's rows, the longest first, so that rows of a batch are alike and the processes' work is too."""

    def cost(row: Row) -> tuple[int, int]:
        return 0 if blind else len(row.images), len(protocol.render(row))

    return sorted(rows, key=cost, reverse=True)[world.process_index :: world.num_processes]


def in_batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    for start in range(0, len(rows), batch_size):
        yield list(rows[start : start + batch_size])


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) for each item in order, the next one being computed while the caller uses this one."""
    # A second thread with a pool of OpenMP threads of its own would slow the model's down by a third on the CPU.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = None
        for item in items:
            following = pool.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


@dataclass(frozen=True, slots=True)
class Batch:
    rows: list[Row]
    prompts: list[str]  # as the chat template renders them, one placeholder for each image
    input_ids: torch.Tensor  # (B, S), padded on the left, one placeholder for each image feature
    attention_mask: torch.Tensor  # (B, S)
    pixel_values: torch.Tensor | None  # (N, 3, H, W) in the order of the placeholders; None without images

    def inputs(self, model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
        tensors = {
            "input_ids": self.input_ids.to(model.device),
            "attention_mask": self.attention_mask.to(model.device),
        }
        if self.pixel_values is not None:
            tensors["pixel_values"] = self.pixel_values.to(model.device, model.dtype)
        return tensors


def prepare(asked: Asked, rows: list[Row]) -> Batch:
    """What the processor makes of the rows, but an image that several of them show is decoded and resized once."""
    processor = asked.processor
    prompts = [render_prompt(processor, asked.protocol, row, blind=asked.blind) for row in rows]
    pixel_values = None
    shown = [] if asked.blind else [(ref, row.id) for row in rows for ref in row.images]
    if shown:
        ids = {ref: row_id for ref, row_id in reversed(shown)}
        pictures = [load_image(ref, row_id).image for ref, row_id in ids.items()]
        unique = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        place = {ref: position for position, ref in enumerate(ids)}
        pixel_values = unique[[place[ref] for ref, _ in shown]]
    tokens = encode_prompts(processor, prompts, pixel_values)
    return Batch(rows, prompts, tokens["input_ids"], tokens["attention_mask"], pixel_values)


def render_prompt(processor: LlavaProcessor, protocol: Protocol, row: Row, *, blind: bool) -> str:
    """The row's question as one user turn, its images before its text, ending where the answer begins."""
    return processor.apply_chat_template(
        [user_turn(protocol, row, blind=blind)], add_generation_prompt=True, tokenize=False
    )


def user_turn(protocol: Protocol, row: Row, *, blind: bool) -> dict[str, object]:
    images = [] if blind else [{"type": "image"}] * len(row.images)
    return {"role": "user", "content": [*images, {"type": "text", "text": escape_placeholder(protocol.render(row))}]}


def check_length(asked: Asked, batch: Batch, new_tokens: int) -> None:
    """Raises UserError naming the longest row where its prompt and `new_tokens` exceed the model's positions."""
    length = batch.input_ids.shape[1]
    room = asked.model.config.get_text_config().max_position_embeddings - new_tokens
    if length > room:
        longest = int(batch.attention_mask.sum(dim=1).argmax())
        raise UserError(
            f"row {batch.rows[longest].id!r} has {length} tokens with its images, but the model has room for {room}"
        )


@contextmanager
def memory_error_explained(rows: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory with {rows} rows at once; run the same command with a smaller --batch-size, "
            "finished answers are kept"
        ) from None


@torch.inference_mode()
def _generate(asked: Asked, batch: Batch) -> list[tuple[str, int]]:
    """The text of each row's reply, and how many tokens it took, its end token included."""
    model, tokenizer = asked.model, asked.processor.tokenizer
    check_length(asked, batch, model.generation_config.max_new_tokens)
    length = batch.input_ids.shape[1]
    with memory_error_explained(len(batch.rows)):
        tokens = model.generate(
            **batch.inputs(model),
            logits_processor=_logits_processors(asked.protocol.decoding, batch.rows, length, model.device),
        )
    ends = model.generation_config.eos_token_id
    replies = []
    for row in tokens[:, length:].tolist():
        end = next((position for position, token in enumerate(row) if token in ends), None)
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        replies.append((text, len(row) if end is None else end + 1))
    return replies


def _generation_config(
    decoding: Decoding, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> GenerationConfig:
    # generate() fills what it is not given from the checkpoint's own settings (temperature, repetition penalty),
    # so these replace them as a whole; only where an answer ends, and which ids are no tokens, is its knowledge.
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,  # sampling is `RowNoise` and argmax
        eos_token_id=end_ids(model, processor),
        pad_token_id=pad_id(processor),
        suppress_tokens=model.generation_config.suppress_tokens,
        use_cache=True,
    )


def _logits_processors(
    decoding: Decoding, rows: Sequence[Row], prompt_length: int, device: torch.device
) -> LogitsProcessorList:
    """Penalty, temperature, draw: the order in which transformers' own sampling applies them."""
    processors = LogitsProcessorList()
    if decoding.repetition_penalty != 1.0:
        # Prompts are padded on the left, so every row's new tokens begin at the same place.
        processors.append(
            RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty, prompt_ignore_length=prompt_length)
        )
    if decoding.temperature > 0:
        processors.append(TemperatureLogitsWarper(decoding.temperature))
        processors.append(RowNoise(decoding.seed, rows, device))
    return processors


class RowNoise(LogitsProcessor):
    """Gumbel noise on the scores, for each row from a random stream of its own.

    The argmax of scores + noise is a draw from softmax(scores) (the Gumbel-max trick, Gumbel 1954), so a row's
    draws depend on the seed, the row's name and its scores, and on nothing that happens to other rows. A stream is
    the device type's: the CPU and CUDA draw different answers.
    """

    def __init__(self, seed: int, rows: Sequence[Row], device: torch.device):
        self._streams = [torch.Generator(device).manual_seed(_stream_seed(seed, row)) for row in rows]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:  # (B, V)
        # In single precision one draw in 2**24 is exactly 0, and its token would win whatever its score.
        draws = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        for row, stream in zip(draws, self._streams, strict=True):
            row.exponential_(generator=stream)
        return scores - draws.log_().to(scores.dtype)


def _stream_seed(seed: int, row: Row) -> int:
    name = json.dumps([seed, row.benchmark, row.id])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
