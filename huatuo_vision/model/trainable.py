"""Which parts of a LLaVA train, and how: freezing, LoRA and QLoRA, optimizer groups, FSDP's wrapping.

Everything here decides by parameter name, in the layout that transformers 5 has in memory (`model.vision_tower.*`,
`model.multi_modal_projector.*`, `model.language_model.*`, `lm_head.*`), whatever PEFT, DDP, FSDP or compile put
around it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import dtype, nn

from huatuo_vision.model.flops import vision_layers_read
from huatuo_vision.model.multi_encoder import MultiEncoderConfig
from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, LlavaConfig

    from huatuo_vision.recipe import TrainSpec

Part = Literal["vision_encoder", "projector", "language_model"]

PART_OF_MODULE: dict[str, Part] = {
    "vision_tower": "vision_encoder",
    "multi_modal_projector": "projector",
    "language_model": "language_model",
    "lm_head": "language_model",
}

# PEFT matches a string against the whole module name. "all-linear" would also hit the tower and both projector linears.
LORA_TARGETS = (
    r"model\.language_model\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"
)

# What Cambrian-1 gives a learning rate of its own: queries and blocks, not the linears before and after them.
_OF_THE_AGGREGATOR = re.compile(r"\bmulti_modal_projector\.(.*\.)?(query$|groups\.|in_llm\.)")

# Matched from the start of the full name or as its end, so "vision_tower" alone would leave the tower to be quantized.
NOT_QUANTIZED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")


def part_of(parameter_name: str) -> Part:
    """The part that a parameter belongs to, under any wrapper's prefixes. Raises ValueError for a name of no part."""
    for step in parameter_name.split("."):
        if step in PART_OF_MODULE:
            return PART_OF_MODULE[step]
    raise ValueError(
        f"parameter {parameter_name!r} belongs to no part; expected one of {', '.join(PART_OF_MODULE)} in its name"
    )


def freeze(model: nn.Module, train: TrainSpec) -> None:
    """Leaves requires_grad on for the parts that train in full, and off for all else.

    Of a trained vision encoder, what the feature layer never reads (the layers after it, the post-layernorm, SigLIP's
    pooling head) stays frozen: it gets no gradient, at which DDP stops in its second step. With LoRA the language
    model's own weights stay frozen.
    """
    in_full = [part for part in train.parts if not (part == "language_model" and train.lora)]
    encoders = _encoders(model.config)
    for name, parameter in model.named_parameters():
        trains = part_of(name) in in_full
        parameter.requires_grad_(trains and not any(encoder.leaves_unread(name) for encoder in encoders))


@dataclass(frozen=True, slots=True)
class _ReadEncoder:
    prefix: str  # of its parameters
    model_type: str
    layers_read: int | None  # None: all, and the last norm

    def leaves_unread(self, name: str) -> bool:
        """Whether a parameter of the model is one of this encoder's that never lead to its features."""
        _, found, within = name.partition(self.prefix)
        if not found:
            return False
        if re.match(_NEVER_READ[self.model_type], within):
            return True
        if self.layers_read is None:
            return False
        layer = re.match(r"encoder\.layers?\.(\d+)\.", within)
        if layer:
            return int(layer[1]) >= self.layers_read
        return re.match(_LAST_NORM.get(self.model_type, "$"), within) is not None


# Pooling heads, and what only masked training reads.
_NEVER_READ = {
    "clip_vision_model": r"post_layernorm\.",
    "siglip_vision_model": r"head\.",
    "dinov2": r"embeddings\.mask_token$",
    "convnext": r"layernorm\.",
}
# Not read where a hidden state is handed on.
_LAST_NORM = {"siglip_vision_model": r"post_layernorm\.", "dinov2": r"layernorm\."}


def _encoders(config: LlavaConfig | MultiEncoderConfig) -> list[_ReadEncoder]:
    if isinstance(config, MultiEncoderConfig):
        return [_ReadEncoder(f"vision_tower.{g.name}.", g.config.model_type, g.layers_read) for g in config.grids]
    return [_ReadEncoder("vision_tower.", config.vision_config.model_type, vision_layers_read(config))]


def apply_training(model: nn.Module, train: TrainSpec) -> nn.Module:
    """The model ready to train: frozen where the recipe says so, in a PeftModel where it says LoRA.

    LoRA adapts the linears of the decoder layers only; the projector trains in full beside it and is saved with it
    (`modules_to_save`). What trains becomes fp32, since an update of 1e-5 is lost in a bf16 weight: run bf16 under
    autocast.
    """
    freeze(model, train)
    if train.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=train.lora.r,
            lora_alpha=train.lora.alpha,
            lora_dropout=train.lora.dropout,
            target_modules=LORA_TARGETS,
            modules_to_save=["multi_modal_projector"],
        )
        model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        # The whole part, because a norm of the encoder's last layer, frozen in bf16, would meet fp32 activations.
        fp32 = parameter.requires_grad or (part_of(name) in train.parts and not train.lora)
        # Under ZeRO-3 a parameter is an empty placeholder, and DeepSpeed keeps the fp32 weights itself.
        if fp32 and not hasattr(parameter, "ds_numel"):
            parameter.data = parameter.data.float()
    return model


def quantization_config(train: TrainSpec, compute_dtype: dtype) -> BitsAndBytesConfig | None:
    """How to load the frozen language model for QLoRA (arXiv:2305.14314: NF4, double quantization), or None.

    Tower, projector and lm_head stay as they are. Raises UserError where bitsandbytes is missing.
    """
    if not (train.lora and train.lora.quantize):
        return None
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"train.language_model.lora.quantize: {train.lora.quantize} needs bitsandbytes, which is not installed; "
            "run pip install bitsandbytes, or remove quantize for LoRA on unquantized weights"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(NOT_QUANTIZED),
    )


def parameter_groups(model: nn.Module, train: TrainSpec, weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups (params, lr, weight_decay, name): per trained part, its biases and norms undecayed; an
    aggregator with a learning rate of its own is one more part."""
    rates = {part: getattr(train, part).lr for part in train.parts}
    if train.projector and train.projector.sva_lr:
        rates["sva"] = train.projector.sva_lr
    groups = {}
    for part, lr in rates.items():
        groups[part] = {"params": [], "lr": lr, "weight_decay": weight_decay, "name": part}
        groups[f"{part}/no_decay"] = {"params": [], "lr": lr, "weight_decay": 0.0, "name": f"{part}/no_decay"}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        part = part_of(name)
        assert part in train.parts, f"{name} requires a gradient, but the recipe freezes the {part}"
        if "sva" in rates and _OF_THE_AGGREGATOR.search(name):
            part = "sva"
        # ZeRO-3 keeps the true shape beside a flat shard.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        undecayed = dimensions < 2 or name.endswith(".bias")
        groups[f"{part}/no_decay" if undecayed else part]["params"].append(parameter)
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, trained.values())), "every trained parameter belongs in exactly one group"
    return [group for group in groups.values() if group["params"]]


def parameter_counts(model: nn.Module) -> dict[Part, tuple[int, int]]:
    """Part -> (trainable, total) weights, however they are packed or sharded."""
    counts = dict.fromkeys(get_args(Part), (0, 0))
    for name, parameter in model.named_parameters():
        # PEFT keeps the projector it started from beside the trained copy, and runs only the copy.
        if "original_module" in name.split("."):
            continue
        part, elements = part_of(name), _elements(parameter)
        trainable, total = counts[part]
        counts[part] = (trainable + elements * parameter.requires_grad, total + elements)
    return counts


def _elements(parameter: nn.Parameter) -> int:
    if hasattr(parameter, "ds_numel"):  # ZeRO-3
        return parameter.ds_numel
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes: two 4-bit weights to a byte
    return parameter.numel() if packed is None else packed.shape.numel()


def fsdp_wrap_classes(model: nn.Module, train: TrainSpec) -> list[str]:
    """The layer classes that FSDP shards one by one.

    The list that transformers derives names classes that a vision-only tower lacks, which accelerate refuses. The
    layers of a frozen tower stay together in the root.
    """
    stacks = r"language_model\.layers"
    if train.vision_encoder:
        stacks += r"|vision_tower\.(\w+\.)?encoder\.(layers?|stages)"
    first_layer = re.compile(rf"(.*\.)?({stacks})\.0")
    return sorted({type(module).__name__ for name, module in model.named_modules() if first_layer.fullmatch(name)})
