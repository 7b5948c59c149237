"""Official checkpoints in the original LLaVA format, written as plain transformers LLaVA folders.

Reads HuatuoGPT-Vision (`llava_qwen2`, `llava_llama`), LLaVA-1.5 (`llava`, `llava_llama`) and LLaVA-Med v1.5
(`llava_mistral`). Every tensor is accounted for before a byte is written, and is written as it is on disk; one shard
is in memory at a time; the folder appears when it is whole. README.md beside this file has the table of names and
what is guaranteed.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from huatuo_vision.model.compose import TEXT_TOWER
from huatuo_vision.model.folder import (
    MODEL_FILES,
    TensorHeader,
    check_weights,
    differences,
    expected_shapes,
    find_model,
    replacing,
    tensor_headers,
    write_config,
)
from huatuo_vision.model.official import RELEASES, TRIALS, FittedTemplate, Release, fit_template
from huatuo_vision.model.processor import (
    finished_tokenizer,
    llava_image_processor,
    named_tokens,
    one_line,
    read_tokenizer,
    rows_needed,
    with_image_token,
    write_processor,
)
from huatuo_vision.schema import IMAGE_PLACEHOLDER, UserError

# Official model type -> language model's type and class, as engines name it.
_LANGUAGE_MODELS = {
    "llava_qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "llava_llama": ("llama", "LlamaForCausalLM"),
    "llava": ("llama", "LlamaForCausalLM"),
    "llava_mistral": ("mistral", "MistralForCausalLM"),
}

# Canonical names and the official ones; the first prefix that fits counts.
_PREFIXES = (
    ("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_TOWER, _TOWER_OFFICIAL = _PREFIXES[0]

# Constants that old versions of transformers saved; today's compute them.
_BUFFERS = (".rotary_emb.inv_freq", ".embeddings.position_ids")

_GROWING = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")

_PICKLES = (
    "pickled weights are never opened: give the revision of the Hub's safetensors conversion with {flag} (refs/pr/N, "
    "under Community), or a local copy that was saved as safetensors"
)


@dataclass(frozen=True, slots=True)
class _Tower:
    """A folder with a CLIP's settings, and its weights where the checkpoint has none."""

    name: str  # as the checkpoint or the user names it
    folder: Path


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor of the source and where it goes."""

    path: Path
    name: str
    target: str
    header: TensorHeader


def convert(
    source: str,
    out: Path,
    *,
    revision: str | None = None,
    prompt: str | None = None,
    vision_tower: str | None = None,
    vision_tower_revision: str | None = None,
) -> None:
    """Writes `out`, a model folder, from an official checkpoint: a folder or a Hub id.

    prompt: a name of RELEASES, where the checkpoint does not show whose it is. vision_tower: a CLIP folder or Hub id
    to use in place of the one that the checkpoint names. Raises UserError, and writes nothing, where the checkpoint is
    broken or of another kind.
    """
    if out.exists():
        raise UserError(f"{out} already exists; remove it or give another --out")
    console = Console(highlight=False, soft_wrap=True)
    folder = find_model(source, "--source", revision)
    values = _official_config(folder)
    release = _release(values, prompt)

    found = _official_tensors(folder)
    has_tower = any(name.startswith(_TOWER_OFFICIAL) for name in found)
    tower = _find_tower(values, folder, vision_tower, vision_tower_revision, with_weights=not has_tower)
    config = _config(values, _tower_config(tower))
    expected = {
        _official_name(name): shape
        for name, shape in expected_shapes(config).items()
        if has_tower or not name.startswith(_TOWER)
    }
    placed, dropped = _place(found, expected, tied=config.tie_word_embeddings, folder=folder)
    if not has_tower:
        placed += _place_tower(tower, config)
    rows_on_disk = config.text_config.vocab_size
    original, tokenizer = _tokenizers(folder, rows_on_disk, config.text_config.max_position_embeddings)
    template = fit_template(release, original, tokenizer)
    _complete(config, tokenizer, placed)
    _check_space(out, placed)

    console.print(f"{release.title}: {_said(placed, config)}")
    console.print(f"vision tower: weights from {'the shards' if has_tower else tower.name}, settings from {tower.name}")
    console.print(_said_image_token(config, rows_on_disk))
    console.print(_said_template(template))
    with replacing(out) as new:
        write_config(new, config)
        _generation_config(release, folder, config, tokenizer, rows_on_disk).save_pretrained(new)
        write_processor(new, _processor(release, values, config, tower, tokenizer, template))
        _write_weights(new, placed, config, console)
        record = {
            # A folder's name alone: where it stood on this machine is nobody's business.
            "source": folder.name if Path(source).is_dir() else source,
            "revision": None if Path(source).is_dir() else folder.name,
            "release": release.title,
            "vision_tower": {"weights": "shards" if has_tower else tower.name, "settings": tower.name},
            "tensors": len(placed),
            "left_out": dropped,
            "rows_added": config.text_config.vocab_size - rows_on_disk,
            "prompt_trials": {"agreeing": template.agreeing, "of": len(TRIALS), "first": template.disagreement},
        }
        (new / "conversion.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        check_weights(new)
    console.print(f"written to {out}; talk to it: python -m huatuo_vision.chat --model {out}")


def _official_config(folder: Path) -> dict[str, Any]:
    """config.json, refused where transformers' LLaVA would compute something else from it."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); expected a checkpoint's config.json") from None
    model_type = values.get("model_type")
    if "text_config" in values:
        raise UserError(
            f"{folder} is in transformers' format already (model_type {model_type}, with a text_config): there is "
            "nothing to convert"
        )
    if model_type not in _LANGUAGE_MODELS or "mm_vision_tower" not in values:
        raise UserError(
            f"{path} has the model_type {model_type!r} and {'no' if 'mm_vision_tower' not in values else 'a'} "
            f"mm_vision_tower; expected an original LLaVA checkpoint ({', '.join(_LANGUAGE_MODELS)}) with one"
        )
    understood = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": (None, "patch", "cls_patch"),
        "mm_patch_merge_type": (None, "flat"),
        "image_aspect_ratio": (None, "pad", "square"),
        "mm_use_im_start_end": (None, False),
        "quantization_config": (None,),
    }
    for key, known in understood.items():
        if values.get(key) not in known:
            raise UserError(
                f"{path}: {key} is {values.get(key)!r}; expected {' or '.join(map(repr, known))}, because "
                "transformers' LLaVA has nothing else"
            )
    return values


def _release(values: Mapping[str, Any], prompt: str | None) -> Release:
    if prompt is not None:
        return RELEASES[prompt]
    if values["model_type"] == "llava_mistral":
        return RELEASES["llava-med"]
    # HuatuoGPT-Vision-34B is a llava_llama as LLaVA-1.5 is, but brings its tower along.
    own_tower = str(values["mm_vision_tower"]).startswith(".")
    return RELEASES["huatuo" if values["model_type"] == "llava_qwen2" or own_tower else "llava-v1.5"]


def _official_name(canonical: str) -> str:
    for prefix, official in _PREFIXES:
        if canonical.startswith(prefix):
            return official + canonical.removeprefix(prefix)
    raise ValueError(f"{canonical} is not the name of a tensor in a LLaVA checkpoint")


def _official_tensors(folder: Path) -> dict[str, tuple[Path, TensorHeader]]:
    """Name -> file and header of every tensor of the source, from the headers alone."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = [folder / name for name in sorted(set(listed.values()))]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise UserError(
                f"{folder} lacks {len(absent)} of the {len(paths)} files that its index lists ({absent[0]}); "
                "download it again"
            )
    else:
        listed, paths = None, sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder} holds no safetensors; {_PICKLES.format(flag='--revision')}")
    found: dict[str, tuple[Path, TensorHeader]] = {}
    for path in paths:
        for name, header in _headers(path).items():
            if name in found:
                raise UserError(f"{name} is in {found[name][0].name} and in {path.name} of {folder}; which one counts?")
            found[name] = (path, header)
    if listed is not None and listed.keys() != found.keys():
        name = sorted(listed.keys() ^ found.keys())[0]
        raise UserError(
            f"the index of {folder} and its files do not list the same tensors ({name}); download them again"
        )
    return found


def _headers(path: Path) -> dict[str, TensorHeader]:
    try:
        headers = tensor_headers(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({one_line(error)}); download it again") from None
    for name, header in headers.items():
        if header.dtype is None and not name.endswith(_BUFFERS):
            raise UserError(f"{name} in {path} is quantized; expected float32, float16 or bfloat16 weights")
    return headers


def _place(
    found: Mapping[str, tuple[Path, TensorHeader]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    tied: bool,
    folder: Path,
) -> tuple[list[_Placed], list[str]]:
    """Where each tensor goes, and the names of those that hold nothing of their own. Raises UserError for the rest."""
    dropped = sorted(name for name in found if name.endswith(_BUFFERS) or (tied and name == "lm_head.weight"))
    kept = {name: entry for name, entry in found.items() if name not in set(dropped)}
    wrong = differences(expected, {name: header.shape for name, (_, header) in kept.items()})
    if wrong:
        raise UserError(
            f"the tensors of {folder} are not those of the model that its config.json describes: {wrong}; the "
            "checkpoint is damaged or of another kind"
        )
    return [_Placed(path, name, _canonical_name(name), header) for name, (path, header) in kept.items()], dropped


def _canonical_name(official: str) -> str:
    for prefix, there in _PREFIXES:
        if official.startswith(there):
            return prefix + official.removeprefix(there)
    raise ValueError(f"{official} is not the name of a tensor in an official checkpoint")


def _find_tower(
    values: Mapping[str, Any], folder: Path, given: str | None, revision: str | None, *, with_weights: bool
) -> _Tower:
    """The folder of the CLIP that `mm_vision_tower` names: inside the checkpoint, elsewhere on disk, or on the Hub."""
    named = str(given or values["mm_vision_tower"])
    if given is None and (folder / named).is_dir():
        return _Tower(named, folder / named)
    if given is None and named.startswith("."):
        raise UserError(
            f"{folder} names its vision tower as {named}, and there is no such folder in it; give one with "
            "--vision-tower (HuatuoGPT-Vision's is openai/clip-vit-large-patch14-336)"
        )
    patterns = MODEL_FILES if with_weights else ("*.json",)
    return _Tower(named, find_model(named, "--vision-tower", revision, patterns))


def _tower_config(tower: _Tower) -> CLIPVisionConfig:
    try:
        model_type = PreTrainedConfig.get_config_dict(tower.folder)[0].get("model_type")
    except OSError as error:
        raise UserError(f"vision tower {tower.name} has no readable config.json: {one_line(error)}") from None
    if model_type not in ("clip", "clip_vision_model"):
        raise UserError(f"vision tower {tower.name} has the model_type {model_type!r}; expected a CLIP")
    return CLIPVisionConfig.from_pretrained(tower.folder)


def _place_tower(tower: _Tower, config: LlavaConfig) -> list[_Placed]:
    """The tower's tensors from its own folder, a whole CLIP's or the vision half alone."""
    paths = sorted(tower.folder.glob("*.safetensors"))
    if not paths:
        flag = "--vision-tower and --vision-tower-revision"
        raise UserError(f"vision tower {tower.name} holds no safetensors; {_PICKLES.format(flag=flag)}")
    placed = [
        _Placed(path, name, _TOWER + name.removeprefix("vision_model."), header)
        for path in paths
        for name, header in _headers(path).items()
        if not name.startswith(TEXT_TOWER) and not name.endswith(_BUFFERS)
    ]
    expected = {name: shape for name, shape in expected_shapes(config).items() if name.startswith(_TOWER)}
    wrong = differences(expected, {tensor.target: tensor.header.shape for tensor in placed})
    if wrong:
        raise UserError(f"the tensors of vision tower {tower.name} are not those of its config.json: {wrong}")
    return placed


def _config(values: Mapping[str, Any], vision_config: CLIPVisionConfig) -> LlavaConfig:
    """The model on disk, its vocabulary as it is there."""
    model_type, architecture = _LANGUAGE_MODELS[values["model_type"]]
    config_class = type(AutoConfig.for_model(model_type))
    known = {*config_class().to_dict(), "rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
    text_config = config_class(**{key: value for key, value in values.items() if key in known})
    text_config.architectures = [architecture]
    text_config.pad_token_id = None  # the official one may be no row of the embedding
    full = values.get("mm_vision_select_feature") == "cls_patch"
    patches = (vision_config.image_size // vision_config.patch_size) ** 2
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision_config,
        text_config=text_config,
        image_seq_length=patches + int(full),
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=values.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if full else "default",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


def _tokenizers(folder: Path, rows: int, max_length: int) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """The source's own, and the same with `<image>` in it."""
    original = read_tokenizer(str(folder))
    named = named_tokens(original)
    backend = with_image_token(original.backend_tokenizer, rows, keep=frozenset(named.values()))
    # The official code pads with EOS; LLaVA's pad token of a Llama is its <unk>.
    named["pad_token"] = named["eos_token"]
    return original, finished_tokenizer(backend, named, max_length)


def _complete(config: LlavaConfig, tokenizer: PreTrainedTokenizerFast, placed: list[_Placed]) -> None:
    """What the folder's config says beyond the model on disk: special tokens, rows for them, precision."""
    text_config = config.text_config
    text_config.vocab_size = rows_needed(tokenizer, text_config.vocab_size)
    text_config.bos_token_id = tokenizer.bos_token_id
    text_config.eos_token_id = tokenizer.eos_token_id
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    # With parts in different precisions the widest is named, so that loading loses nothing.
    config.dtype = max(
        (tensor.header.dtype for tensor in placed if not _from_elsewhere(tensor)), key=lambda dtype: dtype.itemsize
    )


def _from_elsewhere(tensor: _Placed) -> bool:
    """Whether it comes from a tower's own folder; the official loader casts that to the checkpoint's precision."""
    return tensor.target.startswith(_TOWER) and not tensor.name.startswith(_TOWER_OFFICIAL)


def _generation_config(
    release: Release, folder: Path, config: LlavaConfig, tokenizer: PreTrainedTokenizerFast, rows_on_disk: int
) -> GenerationConfig:
    """The official decoding. Tokens that the official model does not have are never generated."""
    path = folder / "generation_config.json"
    own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    added = set(range(rows_on_disk, config.text_config.vocab_size)) | {config.image_token_index}
    # top_k 50 was the default of the transformers that the official code ran on.
    kept = {"top_k": 50} | {key: own[key] for key in ("top_k", "top_p") if own.get(key) is not None}
    return GenerationConfig(
        **kept | release.generation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted(added),
    )


def _processor(
    release: Release,
    values: Mapping[str, Any],
    config: LlavaConfig,
    tower: _Tower,
    tokenizer: PreTrainedTokenizerFast,
    template: FittedTemplate,
) -> LlavaProcessor:
    try:
        own = CLIPImageProcessorPil.from_pretrained(tower.folder)
    except OSError:
        raise UserError(
            f"vision tower {tower.name} has no preprocessor_config.json, so its image size and mean are unknown; add it"
        ) from None
    pad = release.always_pads or values.get("image_aspect_ratio") == "pad"
    side = config.vision_config.image_size
    return LlavaProcessor(
        image_processor=llava_image_processor(own, side, f"vision tower {tower.name}", pad=pad),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        num_additional_image_tokens=1,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=template.text,
    )


def _write_weights(folder: Path, placed: list[_Placed], config: LlavaConfig, console: Console) -> None:
    """One shard for each of the source's, and their index."""
    shards: dict[Path, list[_Placed]] = defaultdict(list)
    for tensor in placed:
        shards[tensor.path].append(tensor)
    weight_map, total_size = {}, 0
    for number, (path, tensors) in enumerate(track(shards.items(), "shards", console=console), start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        with safe_open(path, framework="pt") as source:
            written = {tensor.target: _converted(tensor, source.get_tensor(tensor.name), config) for tensor in tensors}
            save_file(written, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(written, name)
        total_size += sum(weight.numel() * weight.element_size() for weight in written.values())
        del written
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _converted(tensor: _Placed, weight: Tensor, config: LlavaConfig) -> Tensor:
    """As it is on disk; embeddings with rows for new tokens, a tower from elsewhere in the model's precision."""
    if _from_elsewhere(tensor):
        return weight.to(config.dtype)
    missing = config.text_config.vocab_size - len(weight) if tensor.target in _GROWING else 0
    if missing <= 0:
        return weight
    # The logit of a mean row is the mean of the others: never the largest, in any engine.
    mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])


def _check_space(out: Path, placed: list[_Placed]) -> None:
    needed = sum(torch.Size(t.header.shape).numel() * t.header.dtype.itemsize for t in placed)
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{out} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free at {parent}; make room")


def _said(placed: list[_Placed], config: LlavaConfig) -> str:
    shards = len({tensor.path for tensor in placed})
    parameters = sum(torch.Size(tensor.header.shape).numel() for tensor in placed)
    dtype = str(config.dtype).removeprefix("torch.")
    return f"{len(placed)} tensors in {shards} files, {parameters / 1e9:.2f} billion parameters, {dtype}"


def _said_image_token(config: LlavaConfig, rows_on_disk: int) -> str:
    token, rows = config.image_token_index, config.text_config.vocab_size
    if rows == rows_on_disk:
        return f"<image>: id {token}, on a row that the embedding has"
    return f"<image>: id {token}, embedding and head grown from {rows_on_disk} to {rows} rows that are never generated"


def _said_template(template: FittedTemplate) -> str:
    said = f"chat template: the official token ids in {template.agreeing} of {len(TRIALS)} trial conversations"
    if template.disagreement:
        said = f"warning: {said}; the first that differs: {template.disagreement}"
    return said
