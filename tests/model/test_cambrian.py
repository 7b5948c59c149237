"""Weights in the layout of the Cambrian-1 release load strictly, every tensor at its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from huatuo_vision.inputs.encode import Encoder
from huatuo_vision.model import cambrian
from huatuo_vision.model.cambrian import convert, read_convnext
from huatuo_vision.model.folder import load_model
from huatuo_vision.model.multi_encoder import MultiEncoderLlava
from huatuo_vision.schema import UserError
from tests.model.parts import picture, write_tokenizer

WIDTH, HIDDEN, SIDE = 32, 32, 2
CHANNELS = [32, 32, 32, 36]
REACH = [1, 1, 1, 2]  # sides of the windows
MARKERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>")


def block(query_width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one VisionCrossAttentionLayer (cambrian/model/vision_sampler.py)."""
    w = WIDTH
    shapes = {
        "proj_context.weight": (w, w),
        "proj_in.weight": (w, query_width + w),
        "proj_out.linear_1.weight": (w, w),
        "proj_out.linear_2.weight": (query_width, w),
        "norm.weight": (w,),
        "norm.bias": (w,),
        "cross_attn.o_proj.weight": (w, w),
    }
    for part in ("q_proj", *(f"{kind}_proj_{i}" for kind in "kv" for i in range(4))):
        shapes |= {f"cross_attn.{part}.0.weight": (w,), f"cross_attn.{part}.0.bias": (w,)}
        shapes[f"cross_attn.{part}.1.weight"] = (w, w)
    return shapes | {f"pos_embed_{i}": (reach**2, w) for i, reach in enumerate(REACH) if reach > 1}


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Of everything but the language model (cambrian/model/cambrian_arch.py)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (d_in, d_out) in {0: (WIDTH, HIDDEN), 2: (HIDDEN, HIDDEN)}.items():
        shapes |= {f"model.mm_projector.{i}.weight": (d_out, d_in), f"model.mm_projector.{i}.bias": (d_out,)}
    for i, channels in enumerate(CHANNELS):
        prefix = f"model.mm_projector_aux_{i}"
        shapes |= {f"{prefix}.0.weight": (WIDTH, channels), f"{prefix}.0.bias": (WIDTH,)}
        shapes |= {f"{prefix}.2.weight": (WIDTH, WIDTH), f"{prefix}.2.bias": (WIDTH,)}
        shapes |= {f"{prefix}.3.weight": (WIDTH,), f"{prefix}.3.bias": (WIDTH,)}
    for depth in range(3):
        shapes |= {f"model.vision_sampler_0.layers.{depth}.{k}": shape for k, shape in block(WIDTH).items()}
    for layer in range(2):
        shapes |= {f"model.vision_sampler_layers.{layer}.layers.0.{k}": shape for k, shape in block(HIDDEN).items()}
    return shapes | {"model.vision_query": (1, WIDTH), "model.image_newline": (HIDDEN,)}


def write_release(folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    folder.mkdir()
    ids = write_tokenizer(folder, MARKERS)
    torch.manual_seed(3)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=ids, max_position_embeddings=512, rope_theta=500000.0)
    tensors = dict(LlamaForCausalLM(text).state_dict())
    tensors |= {name: torch.randn(shape) / 8 for name, shape in official_shapes().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    values = text.to_dict() | {
        "model_type": "llava_llama",
        "rope_theta": 500000.0,
        "mm_projector_type": "sva",
        "mm_vision_tower_aux_token_len_list": [4, 4, 4, 16],
        "image_token_len": 4,
        "num_query_group": 1,
        "query_num_list": [4],
        "connector_depth": 3,
        "connector_only": False,
        "vision_hidden_size": WIDTH,
        "start_of_vision_sampler_layers": 0,
        "stride_of_vision_sampler_layers": 3,
        "num_of_vision_sampler_layers": 2,
    }
    (folder / "config.json").write_text(json.dumps(values | changes))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return tensors


def timm_name(name: str) -> str:
    """A ConvNextModel's parameter as timm calls it, the other way round than the loader."""
    for pattern, timm in (
        (r"embeddings\.patch_embeddings\.", "stem.0."),
        (r"embeddings\.layernorm\.", "stem.1."),
        (r"encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
        (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
        (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm\.", r"stages.\1.blocks.\2.norm."),
        (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.pwconv(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
        (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_scale_parameter", r"stages.\1.blocks.\2.gamma"),
        (r"layernorm\.", "head.norm."),
    ):
        renamed, found = re.subn(f"^{pattern}", timm, name)
        if found:
            return renamed
    raise AssertionError(name)


def write_encoders(folder: Path, convnext_prefix: str = "") -> dict[str, str]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    square = {"height": 28, "width": 28}
    torch.manual_seed(4)
    made = {
        "siglip": (
            SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=64, image_size=28)),
            SiglipImageProcessorPil(size=square),
        ),
        "clip": (
            CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=64, image_size=28)),
            CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square),
        ),
        "dinov2": (Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2, image_size=28)), BitImageProcessorPil()),
    }
    for name, (model, processor) in made.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    convnext = ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8, 8, 16], depths=[1, 2, 1, 1], image_size=32))
    (folder / "convnext").mkdir()
    tensors = {convnext_prefix + timm_name(name): tensor for name, tensor in convnext.state_dict().items()}
    save_file(tensors | {"logit_scale": torch.ones(1)}, folder / "convnext" / "open_clip_model.safetensors")
    return {name: str(folder / name) for name in (*made, "convnext")}


@pytest.fixture
def towers(tmp_path, monkeypatch) -> dict[str, str]:
    """Encoders of the release's kinds and tiny, which read pictures of 28, 28, 42 and 64 pixels on a side."""
    monkeypatch.setitem(cambrian.ENCODERS[2], "image_size", 42)
    monkeypatch.setitem(cambrian.ENCODERS[3], "image_size", 64)
    return write_encoders(tmp_path)


def converted(tmp_path: Path, towers: dict[str, str]) -> MultiEncoderLlava:
    local = {name: towers[name] for name in ("siglip", "clip", "dinov2")}
    convert(str(tmp_path / "release"), tmp_path / "out", convnext=towers["convnext"], encoders=local)
    return load_model(tmp_path / "out", dtype=torch.float32)


def test_every_tensor_of_a_release_finds_its_place(tmp_path, towers):
    tensors = write_release(tmp_path / "release")
    model = converted(tmp_path, towers)
    projector = model.model.multi_modal_projector
    assert list(projector.in_llm) == ["0", "3"]
    third = projector.groups[0][2]
    same = {
        "model.vision_query": projector.query,
        "model.image_newline": projector.newline,
        "model.mm_projector.2.weight": projector.linear_2.weight,
        "model.mm_projector_aux_3.3.bias": projector.encoders[3][3].bias,
        "model.vision_sampler_0.layers.1.pos_embed_3": projector.groups[0][1].places["3"],
        "model.vision_sampler_0.layers.2.cross_attn.v_proj_2.1.weight": third.attention.values[2][1].weight,
        "model.vision_sampler_layers.1.layers.0.proj_in.weight": projector.in_llm["3"].merge.weight,
        "model.vision_sampler_layers.1.layers.0.proj_out.linear_2.weight": projector.in_llm["3"].linear_2.weight,
        "model.layers.2.mlp.up_proj.weight": model.model.language_model.layers[2].mlp.up_proj.weight,
    }
    for name, parameter in same.items():
        assert torch.equal(tensors[name], parameter), name
    assert sum(p.numel() for p in projector.parameters()) == sum(tensors[name].numel() for name in official_shapes())
    encoder = Encoder(tmp_path / "out")
    assert encoder.tokens_per_image == SIDE * (SIDE + 1)
    pixels = torch.from_numpy(encoder.pixel_values([picture()]))
    ids = torch.tensor([[*[encoder.image_token_id] * 6, 5, 6]])
    assert torch.isfinite(model(input_ids=ids, pixel_values=pixels).logits).all()


def test_one_block_computes_what_the_published_one_does():
    """The published block, written down again from its description, against ours with the same weights."""
    from torch.nn import functional as F

    from huatuo_vision.model.cambrian import cambrian_weights
    from huatuo_vision.model.sva import AggregationBlock, Windows

    torch.manual_seed(0)
    official = {name: torch.randn(shape) / 4 for name, shape in block(WIDTH).items()}
    renamed = cambrian_weights(
        {f"model.vision_sampler_0.layers.0.{name}": tensor for name, tensor in official.items()},
        {"connector_only": True},
    )
    ours = AggregationBlock(WIDTH, WIDTH, 16, [reach**2 for reach in REACH])
    ours.load_state_dict(
        {name.removeprefix("model.multi_modal_projector.groups.0.0."): tensor for name, tensor in renamed.items()}
    )
    images, rows = 2, 8
    queries, context = torch.randn(rows, WIDTH), torch.randn(images, WIDTH)
    windows = [torch.randn(rows, reach**2, WIDTH) for reach in REACH]

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        name = f"cross_attn.{name}"
        return (
            F.layer_norm(x, (WIDTH,), official[f"{name}.0.weight"], official[f"{name}.0.bias"])
            @ official[f"{name}.1.weight"].mT
        )

    expected = []
    for i in range(rows):
        whole = context[i // (rows // images)] @ official["proj_context.weight"].mT
        merged = torch.cat([queries[i], whole]) @ official["proj_in.weight"].mT
        placed = [w[i] + official[f"pos_embed_{k}"] if REACH[k] > 1 else w[i] for k, w in enumerate(windows)]
        keys = torch.cat([normed(x, f"k_proj_{k}") for k, x in enumerate(placed)]).view(-1, 16, 2)
        values = torch.cat([normed(x, f"v_proj_{k}") for k, x in enumerate(placed)]).view(-1, 16, 2)
        scores = torch.einsum("he,khe->hk", normed(merged, "q_proj").view(16, 2), keys) / 2**0.5
        seen = (
            torch.einsum("hk,khe->he", scores.softmax(-1), values).flatten() @ official["cross_attn.o_proj.weight"].mT
        )
        state = F.layer_norm(merged + seen, (WIDTH,), official["norm.weight"], official["norm.bias"])
        state = F.gelu(state @ official["proj_out.linear_1.weight"].mT) @ official["proj_out.linear_2.weight"].mT
        expected.append(queries[i] + state)
    torch.testing.assert_close(
        ours(queries, Windows(tuple(windows), context)), torch.stack(expected), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("model.vision_sampler_layers.1.layers.0.norm.bias"), r"1 missing \(.*in_llm.3.norm.bias"),
        (
            lambda t: t.update({"model.vision_sampler_0.layers.3.norm.bias": torch.ones(32)}),
            r"1 unexpected \(.*groups.0.3",
        ),
        (lambda t: t.update({"model.image_newline": torch.ones(31)}), r"1 of another shape \(.*newline"),
    ],
    ids=["missing", "left over", "another shape"],
)
def test_nothing_is_written_where_a_tensor_does_not_fit(tmp_path, towers, change, sentence):
    tensors = write_release(tmp_path / "release")
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "release" / "model.safetensors")
    with pytest.raises(UserError, match=sentence):
        converted(tmp_path, towers)
    assert not (tmp_path / "out").exists()


def test_a_plain_llava_is_no_cambrian(tmp_path, towers):
    write_release(tmp_path / "release", mm_projector_type="mlp2x_gelu")
    with pytest.raises(UserError, match="has the mm_projector_type 'mlp2x_gelu'; expected sva"):
        converted(tmp_path, towers)


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_a_convnext_in_timms_names(tmp_path, prefix):
    folder = Path(write_encoders(tmp_path, prefix)["convnext"])
    config, weights = read_convnext(str(folder))
    assert (config.hidden_sizes, config.depths) == ([4, 8, 8, 16], [1, 2, 1, 1])
    model = ConvNextModel(config)
    model.load_state_dict(weights, strict=True)
    with pytest.raises(UserError, match="holds no ConvNeXt of four stages"):
        read_convnext(str(tmp_path / "clip"))
    assert np.isfinite(model(torch.zeros(1, 3, 32, 32)).pooler_output.detach().numpy()).all()
