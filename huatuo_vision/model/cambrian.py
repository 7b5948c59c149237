"""Cambrian-1 checkpoints with the Spatial Vision Aggregator, written as folders of `model.multi_encoder`.

`python -m huatuo_vision.model.cambrian --source nyu-visionx/cambrian-8b --convnext CONVNEXT --out models/cambrian-8b`

The release holds language model and projector; its frozen encoders come from their own repositories. CONVNEXT is a
folder or Hub id with the CLIP ConvNeXt-XXL (LAION, augreg soup) as safetensors, in timm's or open_clip's names; without
--source it alone is written, as an encoder for `vision_encoders`. Every tensor must find its place, or nothing is
written.

What the folder computes differently: a picture keeps all 600 positions, its padding among them; the release looks away
from padding, and its inference leaves those positions out. timm's ConvNeXt-XXL norms with an epsilon of 1e-5,
transformers' with 1e-6. The prompt is the chat template that is asked for, without the release's system text. No
release was at hand where this was written: names and shapes are tested on tiny weights in its layout, its answers are
not.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPImageProcessorPil, ConvNextConfig, ConvNextModel, LlamaConfig

from huatuo_vision.cli import run_command
from huatuo_vision.model.compose import (
    check_template,
    encoder_grids,
    encoder_weights,
    name_tokens,
    several_image_processors,
    write_folder,
)
from huatuo_vision.model.encoders import GridEncoder
from huatuo_vision.model.folder import differences, expected_shapes, find_model, replacing, save_model_folder
from huatuo_vision.model.multi_encoder import MultiEncoderConfig, check_grids
from huatuo_vision.model.processor import (
    finished_tokenizer,
    named_tokens,
    one_line,
    read_tokenizer,
    rows_needed,
    with_image_token,
)
from huatuo_vision.recipe import NamedEncoderSpec
from huatuo_vision.schema import IMAGE_PLACEHOLDER, UserError

# The towers of the 8B release, in its order, and the repositories of the same weights in transformers' names.
ENCODERS = (
    {"name": "siglip", "id": "google/siglip-so400m-patch14-384"},
    {"name": "clip", "id": "openai/clip-vit-large-patch14-336", "feature_layer": -2},
    {"name": "dinov2", "id": "facebook/dinov2-giant", "image_size": 378},
    {"name": "convnext", "image_size": 1024},
)

# Official name -> ours; {i} is one of several.
_NAMES = (
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.mm_projector_aux_(\d+)\.", r"model.multi_modal_projector.encoders.\1."),
    (r"model\.vision_sampler_(\d+)\.layers\.(\d+)\.", r"model.multi_modal_projector.groups.\1.\2."),
    (r"model\.vision_query$", "model.multi_modal_projector.query"),
    (r"model\.image_newline$", "model.multi_modal_projector.newline"),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
)
_IN_BLOCK = (
    (r"\.proj_context\.", ".context."),
    (r"\.proj_in\.", ".merge."),
    (r"\.proj_out\.linear_", ".linear_"),
    (r"\.pos_embed_(\d+)$", r".places.\1"),
    (r"\.cross_attn\.q_proj\.", ".attention.query."),
    (r"\.cross_attn\.k_proj_(\d+)\.", r".attention.keys.\1."),
    (r"\.cross_attn\.v_proj_(\d+)\.", r".attention.values.\1."),
    (r"\.cross_attn\.o_proj\.", ".attention.output."),
)
_CONSTANT = ".rotary_emb.inv_freq"

# timm's ConvNeXt -> transformers'; open_clip puts a prefix before timm's.
_TIMM = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"encoder.stages.\1.layers.\2.dwconv."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"encoder.stages.\1.layers.\2.pwconv\3."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.gamma$", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
    (r"^head\.norm\.", "layernorm."),
)
_OPEN_CLIP = "visual.trunk."


def convert(
    source: str,
    out: Path,
    *,
    convnext: str,
    encoders: Mapping[str, str] | None = None,
    revision: str | None = None,
    chat_template: str = "llama3",
) -> None:
    """Writes `out`, a model folder, from a Cambrian-1 checkpoint: a folder or a Hub id.

    encoders: folders for siglip, clip and dinov2 in place of their Hub ids. Raises UserError, and writes nothing, where
    a tensor is missing, left over or of another shape.
    """
    if out.exists():
        raise UserError(f"{out} already exists; remove it or give another --out")
    folder = find_model(source, "--source", revision)
    values = _official_config(folder)
    specs = [_spec(known, (encoders or {}).get(known["name"])) for known in ENCODERS[:-1]]
    stack, convnext_weights = read_convnext(convnext)
    config = cambrian_config(values, specs, stack, ENCODERS[-1]["image_size"])
    weights = cambrian_weights(_tensors(folder), values)
    dtype = weights["model.language_model.embed_tokens.weight"].dtype
    weights |= encoder_weights(specs, config, dtype)
    weights |= {f"model.vision_tower.convnext.{name}": tensor.to(dtype) for name, tensor in convnext_weights.items()}
    wrong = differences(expected_shapes(config), {name: tuple(tensor.shape) for name, tensor in weights.items()})
    if wrong:
        raise UserError(f"{source} is not the model that its config.json describes: {wrong}; nothing was written")

    original = read_tokenizer(str(folder))
    named = named_tokens(original)
    backend = with_image_token(original.backend_tokenizer, config.text_config.vocab_size, frozenset(named.values()))
    tokenizer = finished_tokenizer(backend, named, config.text_config.max_position_embeddings)
    end_of_turn = check_template(chat_template, tokenizer)
    rows = rows_needed(tokenizer, config.text_config.vocab_size)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = _grown(weights[name], rows)
    config.text_config.vocab_size = rows
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    config.dtype = dtype
    name_tokens(config.text_config, tokenizer)
    processor = several_image_processors(specs, config, CLIPImageProcessorPil())
    with replacing(out) as new:
        write_folder(new / "folder", config, processor, tokenizer, chat_template, end_of_turn)
        save_model_folder(new / "folder", weights, config, source_folder=new / "folder")
        for path in (new / "folder").iterdir():
            path.rename(new / path.name)
        (new / "folder").rmdir()
    Console(highlight=False, soft_wrap=True).print(
        f"written to {out}: {len(weights):,} tensors; talk to it: python -m huatuo_vision.chat --model {out}"
    )


def cambrian_config(
    values: Mapping[str, Any], specs: list[NamedEncoderSpec], convnext: ConvNextConfig, convnext_size: int
) -> MultiEncoderConfig:
    """The model that an official config.json describes, with these encoders. Raises UserError for another kind."""
    sides = [round(tokens**0.5) for tokens in values["mm_vision_tower_aux_token_len_list"]]
    side = round(values["image_token_len"] ** 0.5)
    if len(sides) != len(specs) + 1 or any(round(n**0.5) != side for n in values["query_num_list"]):
        raise UserError(
            f"the checkpoint has {len(sides)} encoders and {values['query_num_list']} queries; expected "
            f"{len(specs) + 1} encoders, and {side**2} queries in each group"
        )
    specs = [spec.model_copy(update={"side": side}) for spec, side in zip(specs, sides, strict=False)]
    grids = [*encoder_grids(specs), GridEncoder.of("convnext", convnext, convnext_size, side=sides[-1])]
    check_grids(grids, side)
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
    text_config = LlamaConfig(**{key: value for key, value in values.items() if key in known})
    return MultiEncoderConfig(
        text_config=text_config,
        encoders=[grid.to_dict() for grid in grids],
        sva={
            "side": side,
            "depth": values["connector_depth"],
            "groups": values["num_query_group"],
            "width": values["vision_hidden_size"],
            "heads": 16,
            "newline": True,
            "in_llm": _layers(values),
        },
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


def cambrian_weights(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Official tensors under our names. A tensor that no rule knows keeps its own, and is found left over."""
    layers = _layers(values)

    def renamed(name: str) -> str:
        inside = re.match(r"model\.vision_sampler_layers\.(\d+)\.layers\.0\.", name)
        if inside and int(inside[1]) < len(layers):
            name = f"model.multi_modal_projector.in_llm.{layers[int(inside[1])]}.{name[inside.end() :]}"
        for pattern, ours in _NAMES:
            name, found = re.subn(f"^{pattern}", ours, name)
            if found:
                break
        if name.startswith("model.multi_modal_projector."):
            for pattern, ours in _IN_BLOCK:
                name = re.sub(pattern, ours, name)
        return name

    return {renamed(name): tensor for name, tensor in tensors.items() if not name.endswith(_CONSTANT)}


def read_convnext(source: str) -> tuple[ConvNextConfig, dict[str, Tensor]]:
    """A ConvNeXt in timm's or open_clip's names, as transformers has it; its sizes are read from its shapes."""
    tensors = _tensors(find_model(source, "--convnext"))
    if any(name.startswith(_OPEN_CLIP) for name in tensors):
        tensors = {k.removeprefix(_OPEN_CLIP): tensor for k, tensor in tensors.items() if k.startswith(_OPEN_CLIP)}
    weights = {}
    for name, tensor in tensors.items():
        for pattern, ours in _TIMM:
            renamed, found = re.subn(pattern, ours, name)
            if found:
                weights[renamed] = tensor
    depths: list[int] = []
    while any(name.startswith(f"encoder.stages.{len(depths)}.") for name in weights):
        stage = f"encoder.stages.{len(depths)}.layers."
        depths.append(len({name.split(".")[4] for name in weights if name.startswith(stage)}))
    widths = [len(weights[f"encoder.stages.{stage}.layers.0.dwconv.bias"]) for stage in range(len(depths))]
    if len(depths) != 4:
        raise UserError(f"--convnext {source} holds no ConvNeXt of four stages in timm's names; found {len(depths)}")
    config = ConvNextConfig(hidden_sizes=widths, depths=depths, image_size=256)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in ConvNextModel(config).state_dict().items()}
    wrong = differences(expected, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    if wrong:
        raise UserError(f"--convnext {source} is not the ConvNeXt that its shapes suggest: {wrong}")
    return config, weights


def convert_convnext(source: str, out: Path) -> None:
    """Writes the encoder's folder. Raises UserError where `source` is no such ConvNeXt, or `out` exists."""
    if out.exists():
        raise UserError(f"{out} already exists; remove it or give another --out")
    config, weights = read_convnext(source)
    with torch.device("meta"):
        model = ConvNextModel(config)
    model.load_state_dict(weights, strict=True, assign=True)
    with replacing(out) as new:
        model.save_pretrained(new)
        CLIPImageProcessorPil().save_pretrained(new)
    Console(highlight=False, soft_wrap=True).print(f"written to {out}: ConvNeXt of {config.hidden_sizes} channels")


def _spec(known: dict[str, Any], folder: str | None) -> NamedEncoderSpec:
    if folder is None:
        return NamedEncoderSpec.model_validate(known)
    return NamedEncoderSpec.model_validate({k: v for k, v in known.items() if k != "id"} | {"path": folder})


def _layers(values: Mapping[str, Any]) -> list[int]:
    """The decoder layers after which the release looks again."""
    if values["connector_only"]:
        return []
    start, stride = values["start_of_vision_sampler_layers"], values["stride_of_vision_sampler_layers"]
    return [start + stride * i for i in range(values["num_of_vision_sampler_layers"])]


def _official_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); expected a checkpoint's config.json") from None
    if values.get("mm_projector_type") != "sva":
        raise UserError(
            f"{path} has the mm_projector_type {values.get('mm_projector_type')!r}; expected sva, as Cambrian-1 has it"
        )
    return values


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not tensors:
        raise UserError(f"{folder} holds no *.safetensors; pickled weights are never opened: convert them first")
    return tensors


def _grown(weight: Tensor, rows: int) -> Tensor:
    """New rows are the mean of the old ones."""
    if rows == len(weight):
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m huatuo_vision.model.cambrian",
        description="Convert a Cambrian-1 checkpoint into a model folder.",
    )
    parser.add_argument("--source", help="folder or Hub id of a Cambrian-1 checkpoint; without it, the ConvNeXt alone")
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--convnext", required=True, help="folder or Hub id of its ConvNeXt, in timm's names")
    for known in ENCODERS[:-1]:
        parser.add_argument(f"--{known['name']}", metavar="DIR", help=f"a local copy of {known['id']}")
    parser.add_argument("--chat-template", default="llama3", help="a name of model/chat_templates (default: llama3)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, must not exist")
    arguments = parser.parse_args()
    if arguments.source is None:
        convert_convnext(arguments.convnext, arguments.out)
        return
    local = {known["name"]: getattr(arguments, known["name"]) for known in ENCODERS[:-1]}
    convert(
        arguments.source,
        arguments.out,
        convnext=arguments.convnext,
        encoders={name: folder for name, folder in local.items() if folder},
        revision=arguments.revision,
        chat_template=arguments.chat_template,
    )


if __name__ == "__main__":
    run_command(main)
