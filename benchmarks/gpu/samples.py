"""What the models are fed: samples as long as PubMedVision's are assumed to be, one image each, in planned rows."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaProcessor

from benchmarks.gpu.models import IMAGE_TOKEN, Train
from huatuo_vision.inputs.assumed import draw_lengths
from huatuo_vision.inputs.encode import Encoded
from huatuo_vision.inputs.plan import StepPlan, plan_steps
from huatuo_vision.inputs.rows import pack_row
from huatuo_vision.model.flops import ModelShape, sample_cost
from huatuo_vision.model.processor import finished_tokenizer, llava_image_processor, with_image_token, write_processor
from huatuo_vision.schema import ImageRef, Message, Sample

DATA = "pubmedvision.instruction"
JPEG_SIDE = 512


@dataclass(frozen=True)
class Pool:
    """What training reads of `inputs.prepare.Pool`."""

    sources: tuple[str, ...]
    source: np.ndarray
    row: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    images: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, targets: np.ndarray) -> Pool:
        n = len(tokens)
        images = np.ones(n, dtype=np.int16)
        return cls(("drawn",), np.zeros(n, np.int16), np.arange(n), tokens, targets, images)


def drawn_pool(image_tokens: int, toy: bool) -> Pool:
    """Lengths of the samples with one image among those drawn."""
    tokens, targets, images = draw_lengths(DATA, image_tokens)
    tokens, targets = tokens[images == 1], targets[images == 1]
    if toy:
        tokens, targets = (12 + tokens % 20)[:600], (2 + targets % 6)[:600]
    return Pool.of(tokens, targets)


def plan_rows(
    pool: Pool,
    shape: ModelShape,
    train: Train,
    *,
    row_tokens: int,
    rows_per_step: int,
    steps: int,
    multiple_of: int = 1,
) -> StepPlan:
    """The project's plan with as many samples a step, a multiple of that number, as `rows_per_step` rows hold."""
    cost = sample_cost(shape, train, pool.tokens, pool.targets, pool.images)
    most = int(row_tokens * rows_per_step / pool.tokens.mean())
    for samples in range(most // multiple_of * multiple_of, 0, -multiple_of):
        few = slice(0, samples * steps)
        plan = plan_steps(
            pool.tokens[few],
            pool.images[few],
            pool.targets[few],
            cost[few],
            global_batch_size=samples,
            world_size=1,
            epochs=1,
            max_row_tokens=row_tokens,
            max_row_images=64,
            seed=0,
        )
        if plan.accumulation == rows_per_step:
            return plan
    raise AssertionError(f"no number of samples fills {rows_per_step} rows of {row_tokens} tokens")


class DrawnRows(torch.utils.data.Dataset):
    """The planned rows with random tokens and pixels, on the device from the start: what is timed is the step."""

    def __init__(self, plan: StepPlan, pool: Pool, config: LlavaConfig, device: torch.device):
        self.plan, self.pool = plan, pool
        side = config.vision_config.image_size
        pixels = np.random.default_rng(0).standard_normal((64, 3, side, side), dtype=np.float32)
        self.samples = [[drawn_sample(int(n), pool, config) for n in plan.row(index)] for index in range(plan.rows)]
        self._rows = [
            to_device(
                pack_row(
                    samples,
                    [0] * len(samples),
                    np.take(pixels, np.arange(len(samples)) + index, axis=0, mode="wrap"),
                    int(plan.step_targets[index // plan.rows_per_step]),
                    IMAGE_TOKEN,
                ),
                device,
            )
            for index, samples in enumerate(self.samples)
        ]

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


def drawn_sample(position: int, pool: Pool, config: LlavaConfig) -> Encoded:
    """An image, a question, and the answer that is supervised."""
    tokens, targets = int(pool.tokens[position]), int(pool.targets[position])
    generator = np.random.default_rng(position)
    ids = generator.integers(IMAGE_TOKEN + 1, config.text_config.vocab_size, tokens)
    ids[1 : 1 + config.image_seq_length] = IMAGE_TOKEN
    return Encoded(ids, np.arange(tokens) >= tokens - targets)


def to_device(row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in row.items()}


# ---- pictures on disk, and the words about them ----


def _words() -> list[str]:
    letters = random.Random(0)
    syllables = [a + b for a in "bcdfglmnprst" for b in "aeiou"]
    return ["".join(letters.choices(syllables, k=letters.randint(2, 4))) for _ in range(800)]


def write_processor_folder(folder: Path, config: LlavaConfig) -> None:
    """A processor for the config's image size, with a tokenizer trained on the words that the samples use."""
    folder.mkdir(parents=True)
    vision = config.vision_config
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [" ".join(_words())] * 2 + ["<|user|>\n<|assistant|>\n"] * 2,
        trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=["<|endoftext|>", "<|pad|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = with_image_token(tokenizer, None, keep=frozenset())
    side = vision.image_size
    own = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        image_processor=llava_image_processor(own, side, "the benchmark's encoder"),
        tokenizer=finished_tokenizer(tokenizer, {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}, 8192),
        patch_size=vision.patch_size,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=files("huatuo_vision").joinpath("model/chat_templates/huatuo.jinja").read_text(encoding="utf-8"),
    )
    write_processor(folder, processor)


def write_jpegs(folder: Path, count: int, workers: int) -> list[Path]:
    """Pictures of smooth shapes under grain, as radiographs are: about 60 KB each, so that decoding costs as usual."""
    folder.mkdir(parents=True)

    def write(index: int) -> Path:
        generator = np.random.default_rng(index)
        coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((JPEG_SIDE, JPEG_SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = generator.normal(0, 8, (JPEG_SIDE, JPEG_SIDE, 1)).astype(np.float32)
        path = folder / f"{index}.jpg"
        Image.fromarray(np.clip(picture + grain, 0, 255).astype(np.uint8)).save(path, quality=90)
        return path

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(write, range(count)))


class TextSource:
    """What training reads of `inputs.sources.Source`: a sample by its row, its picture still in its file."""

    def __init__(self, pictures: list[Path], pool: Pool, image_tokens: int, count: int):
        words = _words()
        generator = random.Random(1)
        self._samples = [
            (
                " ".join(generator.choices(words, k=max(1, int(tokens - targets - image_tokens)))),
                " ".join(generator.choices(words, k=int(targets))),
            )
            for tokens, targets in zip(pool.tokens[:count], pool.targets[:count], strict=True)
        ]
        self._pictures = pictures

    def sample(self, row: int) -> Sample:
        question, answer = self._samples[row]
        picture = ImageRef(path=str(self._pictures[row % len(self._pictures)]))
        messages = (Message("user", f"<image>\n{question}"), Message("assistant", answer))
        return Sample(f"row {row}", "drawn", (picture,), messages)
