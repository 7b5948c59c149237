"""Asking a model: greedy, in left-padded batches, each finished batch on disk before the next begins."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from huatuo_vision.evaluation.benchmarks import Row
from huatuo_vision.evaluation.protocols import Decoding, Protocol
from huatuo_vision.evaluation.responses import Response, append
from huatuo_vision.inputs.images import load_image
from huatuo_vision.inputs.processor import load_processor
from huatuo_vision.model.folder import load_model
from huatuo_vision.schema import BadSample, UserError, escape_placeholder

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt"]


def precision_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def find_model(model: str) -> Path:
    """The folder of a model: `model` itself, or a download of that Hub id."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"--model {model}: no folder of that name, and not to be had from the Hub ({_brief(error)})"
        ) from None


def _brief(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


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


def check_images(rows: Sequence[Row]) -> None:
    """Raises UserError with the list of the images that can't be read, before any question is asked."""
    broken: list[str] = []
    converted: Counter[str] = Counter()
    for row in rows:
        for ref in row.images:
            try:
                converted.update(load_image(ref, row.id).notes)
            except BadSample as error:
                broken.append(str(error))
    if broken:
        raise UserError(f"{len(broken)} images of the benchmark can't be read: {'; '.join(broken)}")
    if converted:
        said = ", ".join(f"{note} {count}" for note, count in sorted(converted.items()))
        Console(stderr=True).print(f"images converted to RGB: {said}", highlight=False, soft_wrap=True)


def render_prompt(processor: LlavaProcessor, protocol: Protocol, row: Row, *, blind: bool) -> str:
    """The row's question as one user turn, its images before its text, ending where the answer begins."""
    images = [] if blind else [{"type": "image"}] * len(row.images)
    text = {"type": "text", "text": escape_placeholder(protocol.render(row))}
    turn = {"role": "user", "content": [*images, text]}
    return processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)


def in_batches(rows: Sequence[Row], prompts: Sequence[str], batch_size: int, *, blind: bool) -> Iterator[list[int]]:
    """Positions of rows that go through the model together: alike in images and length, the longest first."""

    def cost(position: int) -> tuple[int, int]:
        return 0 if blind else len(rows[position].images), len(prompts[position])

    order = sorted(range(len(rows)), key=cost, reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


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
    try:
        processor = load_processor(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: no processor can be loaded from it ({_brief(error)})") from None
    processor.tokenizer.padding_side = "left"
    model = load_model(folder, dtype=precision_on(world.device))
    if (folder / "adapter_config.json").is_file():
        # The model with the adapter in its layers: generate() reads its settings, not those of PEFT's wrapper.
        model = model.get_base_model()
    model = model.to(world.device).eval()
    model.generation_config = _generation_config(protocol.decoding, model, processor)

    share = rows[world.process_index :: world.num_processes]
    prompts = [render_prompt(processor, protocol, row, blind=blind) for row in share]
    path = out / f"responses.rank{world.process_index}.jsonl"
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not world.is_main_process) as progress:
        task = progress.add_task("rows", total=len(share))
        for batch in in_batches(share, prompts, batch_size, blind=blind):
            asked = [share[position] for position in batch]
            replies = _generate(model, processor, asked, [prompts[position] for position in batch], blind=blind)
            append(path, [_response(row, reply) for row, reply in zip(asked, replies, strict=True)])
            progress.advance(task, len(batch))


@torch.inference_mode()
def _generate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: Sequence[Row],
    prompts: list[str],
    *,
    blind: bool,
) -> list[str]:
    images = [] if blind else [load_image(ref, row.id).image for row in rows for ref in row.images]
    # The template has written every special token already, the first one of the sequence included.
    inputs = processor(
        images=images or None, text=prompts, padding=True, add_special_tokens=False, return_tensors="pt"
    ).to(model.device, dtype=model.dtype)
    length = inputs["input_ids"].shape[1]
    room = model.config.get_text_config().max_position_embeddings - model.generation_config.max_new_tokens
    if length > room:
        longest = int(inputs["attention_mask"].sum(dim=1).argmax())
        raise UserError(
            f"row {rows[longest].id!r} has {length} tokens with its images, but the model has room for {room}"
        )
    try:
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **({"pixel_values": inputs["pixel_values"]} if images else {}),
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory with {len(rows)} rows at once; run the same command with a smaller --batch-size, "
            "finished answers are kept"
        ) from None
    return processor.batch_decode(tokens[:, length:], skip_special_tokens=True)


def _generation_config(
    decoding: Decoding, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> GenerationConfig:
    # generate() fills what it is not given from the checkpoint's own settings (temperature, repetition penalty),
    # so these replace them as a whole; only where an answer ends is the checkpoint's knowledge.
    tokenizer = processor.tokenizer
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(**asdict(decoding), eos_token_id=sorted(ends), pad_token_id=pad, use_cache=True)


def _response(row: Row, reply: str) -> Response:
    return {
        "benchmark": row.benchmark,
        "id": row.id,
        "question_type": "multiple-choice",
        "question": row.question,
        "options": list(row.options),
        "answer": row.answer,
        "response": reply,
        "groups": dict(row.groups),
        "image_sha256": [ref.sha256 for ref in row.images],
    }
