"""Is what is fast also right? Packed attention and a packed model against one sample at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from benchmarks.gpu import models, samples
from benchmarks.gpu.models import IMAGE_TOKEN, PHASE_2, Phase
from huatuo_vision.inputs.rows import pack_row
from huatuo_vision.model.attention import PER_SAMPLE, VARLEN, choose_attention


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def attention(device: torch.device, toy: bool) -> dict[str, Any]:
    """Forward and backward of the packed attentions against float64, one sample at a time, on the same inputs."""
    heads, key_heads, width = (4, 2, 16) if toy else (32, 8, 128)
    lengths = (7, 1, 12) if toy else (776, 1, 310, 1290, 643, 64)
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((heads, width), (key_heads, width), (key_heads, width), (heads, width))
    q, k, v, upstream = (
        torch.randn(1, h, sum(lengths), e, device=device, generator=generator).bfloat16() for h, e in shapes
    )
    upstream = upstream.transpose(1, 2)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(heads // key_heads, dim=1) for x in (k, v))
        parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
        return torch.cat([_plain_attention(*part) for part in parts], 2).transpose(1, 2)

    def run(name: str | None, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = (
            reference(*leaves)
            if name is None
            else AttentionInterface._global_mapping[name](None, *leaves, None, **_boundaries(lengths, device))[0]
        )
        out.backward(upstream.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    exact = run(None, torch.float64)
    wanted = [(PER_SAMPLE, torch.float32), (PER_SAMPLE, torch.bfloat16)]
    if device.type == "cuda":
        wanted.append((VARLEN, torch.bfloat16))
    errors = {}
    for name, dtype in wanted:
        found = run(name, dtype)
        key = f"{name} {str(dtype).removeprefix('torch.')}"
        errors[key] = dict(
            zip(("out", "dq", "dk", "dv"), (relative(*pair) for pair in zip(found, exact, strict=True)), strict=True)
        )
    limits = {"float32": 1e-4, "bfloat16": 1e-2}
    worst = {key: max(values.values()) for key, values in errors.items()}
    passed = all(error < limits[key.split()[-1]] for key, error in worst.items())
    return {"passed": passed, "relative_error": errors, "limits": limits, "lengths": lengths}


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


def _boundaries(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    return {"sample_lengths": lengths, "cu_seq_lens_q": ends, "max_length_q": max(lengths)}


def packed_model(device: torch.device, toy: bool) -> dict[str, Any]:
    """Losses and gradients of a small LLaVA (4 layers, 512 wide): one packed row against one sample a row.

    In bf16 neither is exact, so both are compared with fp32, and packing may err no more than twice as much.
    """
    config = models.llava_config("Llama-3-8B", toy)
    if not toy:
        text, vision = config.text_config, config.vision_config
        text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.vocab_size = 4, 512, 1408, 8192
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = 8, 2, 64
        vision.num_hidden_layers = 4
    pool = samples.drawn_pool(config.image_seq_length, toy)
    chosen = [samples.drawn_sample(n, pool, config) for n in range(6)]
    side = config.vision_config.image_size
    pixels = torch.randn(len(chosen), 3, side, side, generator=torch.Generator().manual_seed(0)).numpy()
    start = models.random_llava(config, device, torch.float32)

    def run(precision: str, packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        phase = Phase(PHASE_2, precision=precision)
        model = models.prepare_model(copy.deepcopy(start), phase, device)
        groups = [list(range(len(chosen)))] if packed else [[n] for n in range(len(chosen))]
        losses = []
        for group in groups:
            row = pack_row([chosen[n] for n in group], range(len(group)), pixels[group], 1, IMAGE_TOKEN)
            inputs = {k: v for k, v in samples.to_device(row, device).items() if k not in ("stats", "target_sources")}
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                losses.append(model(**inputs))
            losses[-1].sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return torch.cat([loss.detach() for loss in losses]), gradients

    def errors(found: tuple, expected: tuple) -> dict[str, float]:
        together = [torch.cat([g[name].flatten() for name in expected[1]]) for g in (found[1], expected[1])]
        return {"losses": relative(found[0], expected[0]), "gradients": relative(*together)}

    torch.backends.cudnn.allow_tf32 = False  # the patch embedding's, else on by default
    exact = run("fp32", packed=False)
    fp32 = errors(run("fp32", packed=True), exact)
    torch.backends.cudnn.allow_tf32 = True
    packed, alone = (errors(run("bf16", packed=packed), exact) for packed in (True, False))
    passed = all(error < 1e-4 for error in fp32.values()) and all(packed[key] < 2 * alone[key] for key in packed)
    attention = choose_attention("auto", device=device, precision="bf16")
    return {"passed": passed, "fp32": fp32, "bf16_packed": packed, "bf16_alone": alone, "bf16_attention": attention}
