"""Model folders: what is written to disk, under which names, and how it is loaded again.

A folder of one encoder is a plain `LlavaForConditionalGeneration` checkpoint that transformers 4.57 and 5.x, vLLM and
SGLang load without code of ours. Its tensors carry the names that all of those know; transformers 5
itself would save a composed vision tower under shorter names, which 4.x drops behind a warning.
A folder of several encoders (`model.multi_encoder`) is read by this package alone, and keeps the names in memory.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from huatuo_vision.model.llava import PackedLlava
from huatuo_vision.model.multi_encoder import MultiEncoderConfig, MultiEncoderLlava, PackedMultiEncoderLlava
from huatuo_vision.schema import UserError

# Everything of a model folder but its weights; each phase carries these files over from the one before.
PROCESSOR_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

MAX_SHARD_SIZE = "5GB"

# What is downloaded of a model on the Hub: never pickles, images or other frameworks' weights.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt")

# Names of modules in memory (transformers 5) and of tensors on disk.
_PREFIXES = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def saved_class(config: LlavaConfig | MultiEncoderConfig) -> type[PreTrainedModel]:
    """The class that a folder of this config is loaded as."""
    return MultiEncoderLlava if isinstance(config, MultiEncoderConfig) else LlavaForConditionalGeneration


def name_on_disk(module_name: str, config: LlavaConfig | MultiEncoderConfig) -> str:
    return module_name if isinstance(config, MultiEncoderConfig) else canonical_name(module_name)


def canonical_name(module_name: str) -> str:
    """LLaVA's name on disk of a tensor in memory. Raises ValueError for a name that no LLaVA model has."""
    for module_prefix, canonical_prefix in _PREFIXES:
        if module_name.startswith(module_prefix):
            return canonical_prefix + module_name.removeprefix(module_prefix)
    raise ValueError(f"{module_name} is not a parameter of LlavaForConditionalGeneration")


def module_name(canonical: str) -> str:
    """The inverse of `canonical_name`."""
    for module_prefix, canonical_prefix in _PREFIXES:
        if canonical.startswith(canonical_prefix):
            return module_prefix + canonical.removeprefix(canonical_prefix)
    raise ValueError(f"{canonical} is not the name of a tensor in a LLaVA checkpoint")


def find_model(
    model: str, flag: str = "--model", revision: str | None = None, patterns: Sequence[str] = MODEL_FILES
) -> Path:
    """The folder of a model: `model` itself, or a download of that Hub id. A UserError names the `flag`."""
    if Path(model).is_dir():
        if revision is not None:
            raise UserError(f"{flag} {model} is a folder, and only a Hub id has revisions; leave the revision out")
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        brief = str(error).strip().splitlines()[0]
        raise UserError(f"{flag} {model}: no folder of that name, and not to be had from the Hub ({brief})") from None


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends well, and vanishes when it does not."""
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_config(folder: Path, config: LlavaConfig | MultiEncoderConfig) -> None:
    """config.json as both transformers 4.57 and 5.x read it, whatever training switched in `config`."""
    values = json.loads(config.to_json_string())
    encoders = [values["vision_config"]] if "vision_config" in values else [e["config"] for e in values["encoders"]]
    for part in (values, values["text_config"], *encoders):
        for key in ("_name_or_path", "auto_map", "quantization_config"):
            part.pop(key, None)
        part["dtype"] = values["dtype"]
    values["architectures"] = [saved_class(config).__name__]
    text = values["text_config"]
    # Training switches the cache off, so that packed samples stay apart; a saved model generates with it.
    text["use_cache"] = True
    # 4.x knows no rope_parameters and would take its default base of 10000 without a word.
    rope = text["rope_parameters"]
    text["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_weights(folder: Path, state_dict: Mapping[str, Tensor], config: LlavaConfig) -> None:
    """Shards of safetensors (and their index), from tensors under their names in memory. A tied head is left out."""
    tied = config.tie_word_embeddings
    canonical = {
        name_on_disk(name, config): _own_storage(tensor)
        for name, tensor in state_dict.items()
        if not (tied and name == "lm_head.weight")
    }
    save_torch_state_dict(canonical, folder, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})


def _own_storage(tensor: Tensor) -> Tensor:
    """Weights gathered from FSDP can be views of a larger buffer, which safetensors refuses to save."""
    spans = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if spans else tensor.clone()


def save_model_folder(folder: Path, state_dict: Mapping[str, Tensor], config: LlavaConfig, source_folder: Path) -> None:
    """A whole model folder, complete or not there at all; what stood in its place is replaced.

    Processor, tokenizer and chat template are `source_folder`'s. Raises RuntimeError, and writes nothing,
    when the tensors are not exactly those that the config's model has.
    """
    config = copy.deepcopy(config)
    # With parts in different precisions the widest is named, so that loading loses nothing.
    config.dtype = max((t.dtype for t in state_dict.values() if t.is_floating_point()), key=lambda d: d.itemsize)
    with replacing(folder) as new:
        for name in PROCESSOR_FILES:
            shutil.copyfile(source_folder / name, new / name)
        write_config(new, config)
        save_weights(new, state_dict, config)
        check_weights(new)


def check_weights(folder: Path) -> None:
    """Raises RuntimeError unless the tensors on disk are, in name and shape, those of the config's model."""
    wrong = differences(expected_shapes(AutoConfig.from_pretrained(folder)), tensor_shapes(folder))
    if wrong:
        raise RuntimeError(f"{folder} does not hold the model that its config.json describes: {wrong}")


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Name on disk -> shape of all tensors that a folder of this config holds."""
    with torch.device("meta"):
        model = saved_class(config)(config)
    return {
        name_on_disk(name, config): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }


def differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with the tensors found, with the first names of each kind; empty when nothing is."""
    return _listing(
        {
            "missing": sorted(expected.keys() - found.keys()),
            "unexpected": sorted(found.keys() - expected.keys()),
            "of another shape": sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n]),
        }
    )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors in a folder's safetensors files, read from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes |= {name: header.shape for name, header in tensor_headers(path).items()}
    return shapes


@dataclass(frozen=True, slots=True)
class TensorHeader:
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: none that weights are kept in


# As safetensors names them.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_headers(path: Path) -> dict[str, TensorHeader]:
    """Name -> shape and dtype of one safetensors file's tensors. Raises SafetensorError for a damaged file."""
    with safe_open(path, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {
            name: TensorHeader(tuple(tensor.get_shape()), _DTYPES.get(tensor.get_dtype()))
            for name, tensor in slices.items()
        }


def damaged_weights(location: Path | str, error: SafetensorError) -> UserError:
    """What to raise where loading a model met the error: it names the file, which the error itself does not."""
    damaged = str(location)
    for path in sorted(Path(location).glob("*.safetensors")):
        try:
            tensor_headers(path)
        except SafetensorError:
            damaged = str(path)
            break
    return UserError(f"{damaged} is damaged or cut short ({error}); put a whole copy back")


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | str,
    revision: str = "main",
    packed: bool = False,
    quantization_config: Any = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """The model of a folder, or the base model with a folder's adapter on it (a PeftModel, for inference).

    packed: the class that trains on packed rows, in place of the one that generates.
    Raises UserError naming the keys when a single tensor is missing, left over or of another shape:
    transformers by itself would go on with random weights.
    """
    adapter_config = Path(folder) / "adapter_config.json"
    if adapter_config.is_file():
        base = json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = load_model(
            base,
            dtype=dtype,
            packed=packed,
            quantization_config=quantization_config,
            device_map=device_map,
        )
        return _with_adapter(model, Path(folder))
    try:
        config = AutoConfig.from_pretrained(folder, revision=revision)
        several = isinstance(config, MultiEncoderConfig)
        trained_class = PackedMultiEncoderLlava if several else PackedLlava
        model, info = (trained_class if packed else saved_class(config)).from_pretrained(
            folder,
            revision=revision,
            dtype=dtype,
            quantization_config=quantization_config,
            device_map=device_map,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            # transformers renames for its own classes only, so a subclass would silently start with a random head.
            key_mapping=None if several else {f"^{canonical}": module for module, canonical in _PREFIXES},
        )
    except SafetensorError as error:
        raise damaged_weights(folder, error) from None
    except OSError as error:
        raise UserError(f"no model can be loaded from {folder}: {' '.join(str(error).split())}") from None
    check_loaded(f"{folder}", info)
    return model


def check_loaded(
    where: str, info: Mapping[str, Collection[str]], ignored: Callable[[str], bool] = lambda name: False
) -> None:
    """Raises UserError unless `from_pretrained`'s loading info says that every tensor found its place."""
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(name for name in info["unexpected_keys"] if not ignored(name)),
        "of another shape": sorted(str(name) for name in info["mismatched_keys"]),
    }
    if any(wrong.values()):
        raise UserError(
            f"the weights of {where} do not fit its config.json: {_listing(wrong)}; "
            "the checkpoint is damaged or of another kind, choose another"
        )


def _with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict

    adapted = PeftModel.from_pretrained(model, folder)
    expected, found = (
        get_peft_model_state_dict(adapted, save_embedding_layers=False).keys(),
        tensor_shapes(folder).keys(),
    )
    wrong = {"missing": sorted(expected - found), "unexpected": sorted(found - expected)}
    if any(wrong.values()):
        raise UserError(
            f"the adapter in {folder} does not fit its base model: {_listing(wrong)}; was it trained on it?"
        )
    return adapted


def _listing(problems: Mapping[str, list[str]], shown: int = 4) -> str:
    """`3 missing (a, b, c), 1 unexpected (d)`."""
    return ", ".join(
        f"{len(names)} {what} ({', '.join(names[:shown])}{', ...' if len(names) > shown else ''})"
        for what, names in problems.items()
        if names
    )
