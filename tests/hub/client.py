"""The process that talks to the fake Hub: the client reads its settings at import, so it cannot be the test process.

Reads one JSON call `[name, keyword arguments]` per line and answers with one JSON line: the result, or the error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from huatuo_vision import hub

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ?.<>/"


def push(folder: str, repo_id: str, **options: Any) -> str:
    return hub.push_folder(Path(folder), repo_id, **options)


def try_push(folder: str, repo_id: str, **options: Any) -> dict[str, Any]:
    return dataclasses.asdict(hub.try_push(Path(folder), repo_id, **options))


def command(arguments: list[str]) -> str:
    """What `python -m huatuo_vision.hub` with these arguments writes to stdout."""
    with patch.object(sys, "argv", ["hub", *arguments]), redirect_stdout(StringIO()) as written:
        hub.main()
    return written.getvalue()


def set_token(token: str | None) -> None:
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token


def set_patience(seconds: float) -> None:
    hub.SILENCE_SECONDS = seconds


def make_model(folder: str) -> int:
    """A LLaVA with random weights and its processor, as a phase saves them; returns its number of parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.set_num_threads(1)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=1))
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<image>": 1, **{c: i for i, c in enumerate(CHARACTERS, 2)}}))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{{ messages[0]['content'] }}",
    )
    # Saved, loaded from a local path and saved again, as a phase does: nothing of that path may be published.
    for part in (model, processor):
        part.save_pretrained(folder + "-base")
    model = LlavaForConditionalGeneration.from_pretrained(folder + "-base")
    model.save_pretrained(folder)
    LlavaProcessor.from_pretrained(folder + "-base").save_pretrained(folder)
    return model.num_parameters()


def load_model(repo_id: str, revision: str, folder: str) -> dict[str, Any]:
    """Loads from the Hub what `folder` was pushed to, as a user would, and compares."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(repo_id, revision=revision)
    local = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(repo_id, revision=revision)
    inputs = processor(images=Image.new("RGB", (40, 30), "red"), text="<image>what is it?", return_tensors="pt")
    here, there = local.state_dict(), model.state_dict()
    return {
        "class": type(model).__name__,
        "equal": here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here),
        "template": processor.chat_template,
        "image_tokens": int((inputs["input_ids"] == model.config.image_token_id).sum()),
        "logits": list(model(**inputs).logits.shape),
    }


def push_and_load_dataset(repo_id: str) -> dict[str, Any]:
    from datasets import Dataset, load_dataset

    rows = {"question": ["what is it?", "which side?"], "answer": ["a lung", "left"]}
    Dataset.from_dict(rows).push_to_hub(repo_id, private=True)
    Dataset.from_dict(rows).push_to_hub(repo_id, "other", split="test", private=True)
    return {
        "equal": load_dataset(repo_id, split="train").to_dict() == rows,
        "other": load_dataset(repo_id, "other", split="test").to_dict() == rows,
        "streamed": [row["answer"] for row in load_dataset(repo_id, split="train", streaming=True)],
    }


def call(function: str, arguments: list[Any], options: dict[str, Any]) -> Any:
    """Any function of `huatuo_vision.hub` or method of the client's HfApi."""
    from huggingface_hub import HfApi

    owner = hub if function in vars(hub) else HfApi()
    result = getattr(owner, function)(*arguments, **options)
    return result if isinstance(result, str | dict | list) else repr(result)


def main() -> None:
    functions = (push, try_push, command, set_token, set_patience, make_model, load_model, push_and_load_dataset, call)
    calls = {function.__name__: function for function in functions}
    answers, sys.stdout = sys.stdout, sys.stderr
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the client waits seconds between its retries
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"result": calls[name](**arguments)}
        except Exception as error:  # noqa: BLE001 - whatever it is, the test process asserts on it
            answer = {
                "error": str(error),
                "type": type(error).__name__,
                "of": [c.__name__ for c in type(error).__mro__],
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
