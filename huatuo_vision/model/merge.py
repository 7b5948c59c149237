"""LoRA adapters as folders: saved beside their projector, and merged into a plain checkpoint.

`python -m huatuo_vision.model.merge --adapter runs/X/instruct/model --out runs/X/merged`
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huatuo_vision.cli import run_command
from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
RUN_FILES = ("recipe.yaml", "run.json")


def save_adapter(
    model: PeftModel, folder: Path, source_folder: Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the adapter with its trained projector, and the processor's files of the base model in `source_folder`.

    `state_dict` is the model's own, gathered, where the weights are sharded over processes.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from huatuo_vision.model.folder import PROCESSOR_FILES, saved_class

    folder.mkdir(parents=True, exist_ok=True)
    # "auto" would ask the Hub about the base model's vocabulary.
    weights = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    save_file(
        {name: weight.detach().cpu().contiguous() for name, weight in weights.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path = str(source_folder.resolve())
    config.inference_mode = True
    # PEFT's own save would name the training class, which nobody else has.
    config.save_pretrained(
        str(folder),
        auto_mapping_dict={"base_model_class": saved_class(model.config).__name__, "parent_library": "transformers"},
    )
    for name in PROCESSOR_FILES:
        shutil.copyfile(source_folder / name, folder / name)


def merge(adapter: Path, out: Path, base: Path | None = None) -> None:
    """Writes base model + adapter as a plain checkpoint folder, each tensor in the base model's dtype.

    The base model is the one that the adapter names, unless given. Raises UserError where a folder is not what it
    should be, where the adapter does not fit the base model, or where `out` exists.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / name).is_file():
            raise UserError(
                f"{adapter} is not an adapter folder: it has no {name}; give the model folder of a LoRA phase"
            )
    if out.exists():
        raise UserError(f"{out} already exists; remove it or give another --out")
    if base is None:
        base = Path(json.loads((adapter / ADAPTER_CONFIG).read_text())["base_model_name_or_path"])
    if not (base / "config.json").is_file():
        raise UserError(
            f"the base model of adapter {adapter} is not at {base} (no config.json there); "
            "give the folder that the LoRA phase started from with --base"
        )

    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from huatuo_vision.model.folder import load_model, name_on_disk, replacing, save_model_folder, tensor_headers

    model = load_model(base, dtype=AutoConfig.from_pretrained(base).dtype)
    adapted = get_peft_model(model, LoraConfig.from_pretrained(str(adapter)))
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name in sorted(weights.keys() | expected.keys()):
        here, there = (tuple(side[name].shape) if name in side else None for side in (weights, expected))
        if here != there:
            raise UserError(
                f"adapter {adapter} does not fit the base model {base}: {name} has the shape {here or 'missing'} in "
                f"the adapter and {there or 'missing'} by the base model; give the one it was trained on with --base"
            )
    set_peft_model_state_dict(adapted, weights)
    merged = adapted.merge_and_unload(safe_merge=True)
    # Where they differ, a model is loaded in the widest, and would be saved larger.
    on_disk = {
        name: header.dtype for path in base.glob("*.safetensors") for name, header in tensor_headers(path).items()
    }
    state_dict = {
        name: weight.to(on_disk.get(name_on_disk(name, merged.config), weight.dtype))
        for name, weight in merged.state_dict().items()
    }
    with replacing(out) as new:
        save_model_folder(new, state_dict, merged.config, source_folder=adapter)
        for name in RUN_FILES:
            if (adapter / name).is_file():
                shutil.copy2(adapter / name, new / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m huatuo_vision.model.merge", description="Merge a LoRA adapter into a plain checkpoint folder."
    )
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="model folder of a LoRA phase")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, must not exist")
    parser.add_argument("--base", type=Path, metavar="DIR", help="base model, if not where the adapter says it is")
    arguments = parser.parse_args()
    merge(arguments.adapter, arguments.out, arguments.base)


if __name__ == "__main__":
    run_command(main)
