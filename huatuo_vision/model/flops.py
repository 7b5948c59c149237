"""FLOPs and memory of one training step, from the shapes alone (no weights, no torch).

Legend, one row (or any set of rows): S tokens, S2 sum of the squared sample lengths, T supervised tokens, M images.
Language model: L decoder layers, h hidden, f intermediate, d_q = heads * head_dim, d_kv = key/value heads * head_dim,
N matmul weights of the decoder layers (no embedding, no head), V vocabulary. Vision encoders, each one or several
stacks of layers: L_v layers, of which R_v stand before the state that the projector reads and run, d_v hidden, f_v
intermediate, N_v matmul weights of the L_v layers, P tokens per image (patches and class token).
Projector: N_p weights, I image tokens that it hands on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from transformers import LlavaConfig, PreTrainedConfig

    from huatuo_vision.model.multi_encoder import MultiEncoderConfig
    from huatuo_vision.recipe import LoraSpec, TrainSpec

# Bytes that one decoder layer keeps for the backward, per token: (per h, per d_kv, per f). Measured on Llama layers
# with torch.autograd.graph.saved_tensors_hooks, under bf16 autocast and in fp32; a frozen linear does not keep its
# input.
_KEPT_PER_TOKEN = {
    ("bf16", "full"): (26, 4, 8),
    ("bf16", "lora"): (24, 4, 8),
    ("bf16", "frozen"): (12, 4, 6),
    ("fp32", "full"): (32, 8, 16),
    ("fp32", "lora"): (24, 8, 16),
    ("fp32", "frozen"): (16, 8, 12),
}
# The same of a trained CLIP layer: (per d_v, per f_v).
_KEPT_PER_PATCH = {"bf16": (16, 6), "fp32": (16, 12)}
# What one block of an aggregator keeps of each feature in its windows, per width W: the feature with its place, both
# norms' outputs, key and value. And what each encoder's projection keeps of a feature: (per channel, per W).
_KEPT_PER_FEATURE = {"bf16": 12, "fp32": 20}
_KEPT_PER_PROJECTED = {"bf16": (2, 12), "fp32": (4, 16)}
_OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2}
_NF4_BYTES = 0.55  # 4 bits and the doubly quantized scales


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Equal layers of a vision encoder: attention and MLP, or a ConvNeXt's convolution and MLP."""

    layers: int  # L_v
    layers_read: int  # R_v
    hidden: int  # d_v
    intermediate: int  # f_v
    tokens: int  # P
    layer_weights: int  # N_v / L_v
    attends: bool = True

    @property
    def image_flops(self) -> int:
        attention = 4 * self.hidden * self.tokens**2 if self.attends else 0
        return self.layers_read * (2 * self.layer_weights * self.tokens + attention)


@dataclass(frozen=True, slots=True)
class EncoderShape:
    stacks: tuple[LayerStack, ...]
    patch_weights: int  # of the patch embedding, and of what lies between the stacks
    position_weights: int

    @classmethod
    def from_config(cls, vision: PreTrainedConfig, image_size: int, layers_read: int | None) -> EncoderShape:
        """layers_read: None where all are."""
        if vision.model_type == "convnext":
            stacks, between, before = [], vision.num_channels * vision.patch_size**2 * vision.hidden_sizes[0], None
            for stage, (width, depth) in enumerate(zip(vision.hidden_sizes, vision.depths, strict=True)):
                between += 4 * before * width if before else 0
                tokens = (image_size // (vision.patch_size * 2**stage)) ** 2
                stacks.append(
                    LayerStack(depth, depth, width, 4 * width, tokens, (49 + 8 * width) * width, attends=False)
                )
                before = width
            return cls(tuple(stacks), between, 0)
        d = vision.hidden_size
        class_tokens = int(vision.model_type != "siglip_vision_model")
        if vision.model_type == "dinov2":
            intermediate = int(d * vision.mlp_ratio)
            # SwiGLU has three matrices of two thirds the width, a multiple of 8.
            mlp = 3 * d * ((intermediate * 2 // 3 + 7) // 8 * 8) if vision.use_swiglu_ffn else 2 * d * intermediate
        else:
            intermediate = vision.intermediate_size
            mlp = 2 * d * intermediate
        tokens = (image_size // vision.patch_size) ** 2 + class_tokens
        layers = vision.num_hidden_layers
        read = layers if layers_read is None else layers_read
        stack = LayerStack(layers, read, d, intermediate, tokens, 4 * d * d + mlp)
        positions = ((vision.image_size // vision.patch_size) ** 2 + class_tokens) * d
        return cls((stack,), vision.num_channels * vision.patch_size**2 * d, positions)

    @property
    def layer_weights(self) -> int:
        """N_v."""
        return sum(stack.layers * stack.layer_weights for stack in self.stacks)


@dataclass(frozen=True, slots=True)
class ProjectorShape:
    weights: int  # N_p
    image_flops: int
    # Bytes that it keeps of an image for the backward where it trains: an aggregator's alone count.
    kept: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_KEPT_PER_FEATURE, 0))

    @classmethod
    def of_mlp(cls, channels: int, hidden: int, image_tokens: int) -> ProjectorShape:
        weights = hidden * (channels + hidden)
        return cls(weights, 2 * weights * image_tokens)

    @classmethod
    def of_sva(cls, config: MultiEncoderConfig) -> ProjectorShape:
        sva, hidden = config.sva, config.text_config.hidden_size
        w, queries, encoders = sva["width"], sva["side"] ** 2, len(config.encoders)
        grids = [(grid.channels, grid.side**2) for grid in config.grids]
        features = sum(size for _, size in grids)
        places = sum(size // queries for _, size in grids if size > queries) * w
        weights = sum(c * w + w * w for c, _ in grids) + (sva["groups"] * w + hidden) * hidden
        flops = sum(2 * (c * w + w * w) * size for c, size in grids)
        flops += 2 * (sva["groups"] * w + hidden) * hidden * queries
        blocks = [(w, sva["groups"] * sva["depth"]), (hidden, len(sva["in_llm"]))]
        for width, count in blocks:
            # context; merge, query, output and the two linears of the MLP; keys and values of each encoder
            at_queries = (width + w) * w + 3 * w * w + w * width
            weights += count * (w * w + at_queries + 2 * encoders * w * w + places)
            flops += count * (2 * (w * w + at_queries * queries + 2 * w * w * features) + 4 * w * features)
        every = sum(count for _, count in blocks)
        kept = {}
        for precision, per_feature in _KEPT_PER_FEATURE.items():
            per_channel, per_width = _KEPT_PER_PROJECTED[precision]
            kept[precision] = sum((per_channel * c + per_width * w) * size for c, size in grids)
            kept[precision] += every * per_feature * w * features
        return cls(weights, flops, kept)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that its FLOPs and memory depend on; the names are the legend's."""

    layers: int  # L
    hidden: int  # h
    intermediate: int  # f
    query_dim: int  # d_q
    key_value_dim: int  # d_kv
    vocabulary: int  # V
    tied_embeddings: bool
    encoders: tuple[EncoderShape, ...]
    projector: ProjectorShape
    image_tokens: int  # I / M

    @classmethod
    def from_config(cls, config: LlavaConfig | MultiEncoderConfig) -> ModelShape:
        text = config.text_config
        # Qwen2's config has no head_dim.
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if config.model_type == "llava":
            vision = config.vision_config
            encoders = (EncoderShape.from_config(vision, vision.image_size, vision_layers_read(config)),)
            image_tokens = encoders[0].stacks[0].tokens - (config.vision_feature_select_strategy == "default")
            states = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
            projector = ProjectorShape.of_mlp(states * vision.hidden_size, text.hidden_size, image_tokens)
        else:
            grids, image_tokens = config.grids, config.tokens_per_image
            encoders = tuple(EncoderShape.from_config(grid.config, grid.image_size, grid.layers_read) for grid in grids)
            channels = sum(grid.channels for grid in grids)
            projector = (
                ProjectorShape.of_sva(config)
                if config.sva
                else ProjectorShape.of_mlp(channels, text.hidden_size, image_tokens)
            )
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            query_dim=text.num_attention_heads * head_dim,
            key_value_dim=text.num_key_value_heads * head_dim,
            vocabulary=text.vocab_size,
            tied_embeddings=config.tie_word_embeddings,
            encoders=encoders,
            projector=projector,
            image_tokens=image_tokens,
        )

    @property
    def layer_weights(self) -> int:
        """N."""
        attention = 2 * self.hidden * (self.query_dim + self.key_value_dim)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def vision_layer_weights(self) -> int:
        """N_v of all encoders."""
        return sum(encoder.layer_weights for encoder in self.encoders)

    @property
    def weights(self) -> dict[str, int]:
        """Part -> matrix weights; norms and biases, some 0.1 %, are left out."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)
        outside = sum(encoder.patch_weights + encoder.position_weights for encoder in self.encoders)
        return {
            "vision_encoder": self.vision_layer_weights + outside,
            "projector": self.projector.weights,
            "language_model": self.layer_weights + embeddings,
        }

    def lora_weights(self, lora: LoraSpec) -> int:
        """r * A, A the sum of d_in + d_out over the adapted linears."""
        h, f, q, kv = self.hidden, self.intermediate, self.query_dim, self.key_value_dim
        return lora.r * self.layers * (2 * (h + q) + 2 * (h + kv) + 3 * (h + f))


def vision_layers_read(config: LlavaConfig) -> int:
    """How many encoder layers stand before the last hidden state that the projector reads (0: the embeddings)."""
    layers, wanted = config.vision_config.num_hidden_layers, config.vision_feature_layer
    states = [wanted] if isinstance(wanted, int) else wanted
    # hidden_states holds the embeddings' output and then one state per layer.
    return max(state if state >= 0 else layers + 1 + state for state in states)


def forward_flops(
    shape: ModelShape, *, tokens: int, squared_lengths: int, targets: int, images: int
) -> dict[str, float]:
    """FLOPs of one forward pass: vision_encoder, projector, linear, attention, logits.

    Attention counts the causal half (2 L d_q S2; PaLM and Megatron count the full square, 4 L d_q S2), the
    bidirectional vision encoder its whole square. Logits count only where there is a target. Left out, below 0.5 %
    together on a 7B: the patch embedding, SigLIP's pooling head, norms and activations.
    """
    return {
        "vision_encoder": images * sum(stack.image_flops for encoder in shape.encoders for stack in encoder.stacks),
        "projector": images * shape.projector.image_flops,
        "linear": 2 * shape.layer_weights * tokens,
        "attention": 2 * shape.layers * shape.query_dim * squared_lengths,
        "logits": 2 * shape.vocabulary * shape.hidden * targets,
    }


def step_flops(
    shape: ModelShape, train: TrainSpec, *, tokens: int, squared_lengths: int, targets: int, images: int
) -> float:
    """FLOPs that one step must spend, for MFU: forward and backward, no recompute.

    A matmul's backward costs its forward once towards its input and once towards its weights; frozen weights need only
    the first, and a frozen encoder, with nothing to train before it, neither. Attention has no weights, so its
    backward is always twice its forward. LoRA adds 6 r A S. What trains counts three times as a whole, as in the usual
    formula: the projector's first linear above a frozen encoder in truth costs less.
    """
    forward = forward_flops(shape, tokens=tokens, squared_lengths=squared_lengths, targets=targets, images=images)
    language_model_in_full = bool(train.language_model and not train.lora)
    passes = {
        "vision_encoder": 3 if train.vision_encoder else 1,
        "projector": 3 if train.projector else 2 if train.vision_encoder else 1,
        "linear": 3 if language_model_in_full else 2,
        "attention": 3,
        "logits": 3 if language_model_in_full else 2,
    }
    flops = sum(forward[part] * passes[part] for part in forward)
    if train.lora:
        flops += 6 * shape.lora_weights(train.lora) * tokens
    return flops


def sample_cost(
    shape: ModelShape, train: TrainSpec, tokens: np.ndarray, targets: np.ndarray, images: np.ndarray
) -> np.ndarray:
    """(n,) FLOPs of training on each of n samples: what rows are balanced by."""
    tokens, targets, images = (array.astype("float64") for array in (tokens, targets, images))
    return step_flops(shape, train, tokens=tokens, squared_lengths=tokens**2, targets=targets, images=images)


def memory_estimate(
    shape: ModelShape,
    train: TrainSpec,
    *,
    optimizer_name: Literal["adamw", "adamw_8bit"],
    precision: Literal["bf16", "fp32"],
    world_size: int,
    sharding: Literal["ddp", "zero2", "fsdp"],
    row_tokens: int,
    row_targets: int,
    recompute: Literal["none", "all"] | int,
) -> dict[str, int]:
    """An estimate of one GPU's bytes: weights, gradients, optimizer, activations, logits. The allocator comes on top.

    With F frozen and R trained weights, W processes, and b = 2 in bf16, 4 in fp32:

    - weights: b F + 4 R, in bf16 + 2 R for the copy that computes; NF4 decoder weights 0.55 instead of b. ddp holds
      all of it. zero2 holds b (F + R) and 1/W of the 4 R masters. fsdp holds 1/W of b F + 4 R, and gathered in b the
      root (all but the sharded layers) and two decoder layers; NF4 weights stay whole.
    - gradients: 4 R, over W in zero2 and fsdp; in ddp twice that from two processes on, for its buckets.
    - optimizer: 8 R for adamw, 2 R for adamw_8bit, over W in zero2 and fsdp.
    - activations: per decoder layer and token a h + b d_kv + c f, (a, b, c) measured per precision and way of training;
      a trained vision encoder the same for as many images as the row could hold; a frozen one none; a trained
      aggregator what its blocks keep of every feature of those images. A recomputed layer keeps its input (b h), and
      one layer at a time is whole. recompute n recomputes every n-th layer.
    - logits: 12 T V: the log-softmax, the gradient behind it and the gradient before it, in fp32.
    """
    width = 2 if precision == "bf16" else 4
    way = "lora" if train.lora else "full" if train.language_model else "frozen"
    in_full = [part for part in train.parts if part != "language_model" or way == "full"]

    lora = shape.lora_weights(train.lora) if train.lora else 0
    trained = sum(shape.weights[part] for part in in_full) + lora
    quantized = shape.layer_weights if train.lora and train.lora.quantize else 0
    frozen = sum(shape.weights.values()) + lora - trained - quantized
    copies = 2 * trained if precision == "bf16" else 0
    shards = 1 if sharding == "ddp" else world_size

    packed = _NF4_BYTES * quantized
    if sharding == "ddp":
        weights = packed + width * frozen + 4 * trained + copies
    elif sharding == "zero2":
        weights = packed + width * (frozen + trained) + (4 * trained / shards if precision == "bf16" else 0)
    else:
        sharded = shape.layer_weights - quantized + (shape.vision_layer_weights if train.vision_encoder else 0)
        root = frozen + trained - lora - sharded
        gathered = width * (root + 2 * (shape.layer_weights - quantized) / shape.layers)
        weights = packed + (width * frozen + 4 * trained) / shards + gathered

    buckets = 2 if sharding == "ddp" and world_size > 1 else 1
    per_hidden, per_key_value, per_intermediate = _KEPT_PER_TOKEN[precision, way]
    layer = row_tokens * (
        per_hidden * shape.hidden + per_key_value * shape.key_value_dim + per_intermediate * shape.intermediate
    )
    activations = _kept(shape.layers, layer, width * shape.hidden * row_tokens, recompute)
    row_images = row_tokens // shape.image_tokens
    if train.vision_encoder:
        per_hidden, per_intermediate = _KEPT_PER_PATCH[precision]
        for stack in (stack for encoder in shape.encoders for stack in encoder.stacks):
            patches = row_images * stack.tokens
            layer = patches * (per_hidden * stack.hidden + per_intermediate * stack.intermediate)
            activations += _kept(stack.layers_read, layer, width * stack.hidden * patches, recompute)
    if train.projector:
        activations += row_images * shape.projector.kept[precision]
    return {
        "weights": round(weights),
        "gradients": round(4 * trained * buckets / shards),
        "optimizer": round(_OPTIMIZER_BYTES[optimizer_name] * trained / shards),
        "activations": activations,
        "logits": 12 * row_targets * shape.vocabulary,
    }


def _kept(layers: int, layer_bytes: int, input_bytes: int, recompute: Literal["none", "all"] | int) -> int:
    if recompute == "none":
        return layers * layer_bytes
    recomputed = layers if recompute == "all" else -(-layers // recompute)
    return (layers - recomputed) * layer_bytes + recomputed * input_bytes + layer_bytes
