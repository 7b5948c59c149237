"""Attention that never crosses the samples of a packed row.

Both implementations take the row's boundaries as arguments of the model call and no mask: stock SDPA would
build an S x S mask per row, quadratic in the whole row. Names registered here have no mask function, so
transformers makes no mask for them.

Legend: S tokens of the row, H heads, K key-value heads, E head dimension.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from huatuo_vision.schema import UserError

PER_SAMPLE = "per_sample_sdpa"
VARLEN = "torch_varlen"


def _per_sample_sdpa(
    module: nn.Module,
    query: torch.Tensor,  # (1, H, S, E)
    key: torch.Tensor,  # (1, K, S, E)
    value: torch.Tensor,  # (1, K, S, E)
    attention_mask: None,
    *,
    sample_lengths: tuple[int, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
        for q, k, v in zip(
            query.split(sample_lengths, 2), key.split(sample_lengths, 2), value.split(sample_lengths, 2), strict=True
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None  # (1, S, H, E)


def _torch_varlen(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: torch.Tensor,  # (D + 1,) int32
    max_length_q: int,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    from torch.nn.attention.varlen import varlen_attn

    # FlashAttention takes half precision only; under autocast the rotary embedding leaves q and k in fp32.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (S, heads, E)
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    output = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, **_CAUSAL)
    return output[None], None  # (1, S, H, E)


def _varlen_causal_argument() -> dict[str, object] | None:
    """How this torch says "causal" (a window since 2.11, a flag before), None where it has no varlen_attn."""
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}


_CAUSAL = _varlen_causal_argument()

AttentionInterface.register(PER_SAMPLE, _per_sample_sdpa)
AttentionInterface.register(VARLEN, _torch_varlen)


def choose_attention(asked: str, *, device: torch.device, precision: str) -> str:
    """The attention implementation for packed rows. `asked` is the recipe's `attention` key.

    auto: the varlen kernel on CUDA in bf16, SDPA per sample elsewhere. Raises UserError where what is asked
    for can't run here.
    """
    kernel_runs = device.type == "cuda" and precision == "bf16"
    if asked == "auto":
        return VARLEN if kernel_runs and _CAUSAL is not None else PER_SAMPLE
    if asked == "sdpa":
        return PER_SAMPLE
    if not kernel_runs:
        raise UserError(f"attention: {asked} needs a CUDA device and precision: bf16; set attention: auto")
    if asked == "varlen":
        if _CAUSAL is None:
            raise UserError(
                "attention: varlen needs torch 2.11 or newer; upgrade torch or set attention: flash_attention_2"
            )
        return VARLEN
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    available = is_flash_attn_2_available() if asked == "flash_attention_2" else is_flash_attn_3_available()
    if not available:
        raise UserError(
            f"attention: {asked} is not installed; pip install -r requirements-gpu.txt or set attention: auto"
        )
    return asked
