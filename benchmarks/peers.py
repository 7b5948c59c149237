"""The other trainers of `benchmarks.training_speed`, each as its users start it. Knows nothing of this package.

    python benchmarks/peers.py trl --model FOLDER --rows rows.json --images FOLDER --log log.jsonl ...

padded   transformers' Trainer, and a collator that pads the batch, as LLaVA's does; stock LlavaForConditionalGeneration
trl      TRL's SFTTrainer and its own collator for vision-language models

Rows are taken in the order of the file, a batch an optimizer step. Both run in full precision, without gradient
checkpointing and without truncation (TRL's defaults are bf16, checkpointing and 1,024 tokens), the encoder frozen, and
log every step to a file of JSON lines.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class StepLog(TrainerCallback):
    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Pictures(torch.utils.data.Dataset):
    """Rows with their pictures opened where an item is asked for."""

    def __init__(self, rows: list[dict[str, Any]], folder: Path):
        self.rows, self.folder = rows, folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"messages": row["messages"], "images": [Image.open(self.folder / name) for name in row["images"]]}


class PaddingCollator:
    """Rendering, tokenising, padding and the mask of what the assistant says, all by the processor."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.processor.apply_chat_template(
            [fill(with_parts(row["messages"]), row["images"]) for row in rows],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        spoken = torch.as_tensor(batch.pop("assistant_masks"), dtype=torch.bool)
        return dict(batch) | {"labels": batch["input_ids"].masked_fill(~spoken, -100)}


def with_parts(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The same messages, the place of each picture a content part of its own."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image"} if part == "<image>" else {"type": "text", "text": part}
                for part in re.split(r"(<image>)\n?", message["content"])
                if part
            ],
        }
        for message in messages
    ]


def fill(messages: list[dict[str, Any]], images: list[Image.Image]) -> list[dict[str, Any]]:
    remaining = iter(images)
    for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
        part["image"] = next(remaining)
    return messages


def trl_trainer(rows: list[dict[str, Any]], folder: Path, settings: dict[str, Any], **model: Any) -> Trainer:
    from datasets import Dataset, Image, List
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"messages": with_parts(row["messages"]), "images": [str(folder / name) for name in row["images"]]}
        for row in rows
    ]
    return SFTTrainer(
        args=SFTConfig(**settings, max_length=None, assistant_only_loss=True),
        train_dataset=Dataset.from_list(rows).cast_column("images", List(Image())),
        **model,
    )


def padded_trainer(rows: list[dict[str, Any]], folder: Path, settings: dict[str, Any], **model: Any) -> Trainer:
    return Trainer(
        args=TrainingArguments(**settings),
        train_dataset=Pictures(rows, folder),
        data_collator=PaddingCollator(model["processing_class"]),
        **model,
    )


PEERS = {"padded": padded_trainer, "trl": trl_trainer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("--model", type=Path, help="folder of weights and processor")
    parser.add_argument("--rows", type=Path, help="JSON list of rows: images, messages")
    parser.add_argument("--images", type=Path, help="folder that image names are relative to")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--imports-only", action="store_true", help="import what training needs and stop")
    arguments = parser.parse_args()
    if arguments.imports_only:
        from transformers.models.clip import modeling_clip  # noqa: F401
        from transformers.models.llama import modeling_llama  # noqa: F401

        if arguments.peer == "trl":
            from trl import SFTTrainer  # noqa: F401
        return
    processor = AutoProcessor.from_pretrained(arguments.model)
    processor.image_processor = LlavaImageProcessorPil.from_pretrained(arguments.model)
    model = LlavaForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    model.train()
    settings = {
        "output_dir": str(arguments.log.parent),
        "per_device_train_batch_size": arguments.batch_size,
        "num_train_epochs": 1,
        "learning_rate": arguments.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    rows = json.loads(arguments.rows.read_text())
    trainer = PEERS[arguments.peer](rows, arguments.images, settings, model=model, processing_class=processor)
    trainer.add_callback(StepLog(arguments.log))
    trainer.train()


if __name__ == "__main__":
    main()
