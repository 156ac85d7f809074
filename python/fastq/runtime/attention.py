"""Attention of whole sequences to themselves, by fastq's kernel where there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Packing

NO_WINDOW = (-1, -1)


@dataclass(frozen=True)
class AttentionRule:
    """Which keys a query attends to and how their scores are made, as `flash_attention` has it."""

    causal: bool = True
    softmax_scale: float | None = None
    window: tuple[int, int] = NO_WINDOW
    alibi_slopes: Tensor | None = None

    def options(self) -> dict:
        """The keyword arguments of `flash_attention` and `flash_decode`."""
        return vars(self)


def has_kernel(query: Tensor) -> bool:
    """Whether fastq has a kernel for the dtype and device. Float32 on a GPU has none: it is there
    to compare with, not to serve."""
    if query.device.type not in ("cpu", "cuda"):
        return False
    halves = (torch.float16, torch.bfloat16)
    return query.dtype in (halves if query.is_cuda else (torch.float32, *halves))


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: AttentionRule,
    packing: Packing | None = None,
) -> Tensor:
    """Every sequence attends to itself.

    query is (batch, seqlen, heads, head_dim), key and value (batch, seqlen, kv_heads, head_dim), or
    with a packing (1, total, heads, head_dim); returns a tensor like query. Gradients come from
    torch's attention.
    """
    needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
    # A model is trained where the native library may not be built, with `runtime` by itself.
    is_alone = "." not in __package__
    if needs_grad or is_alone or not has_kernel(query):
        return _by_torch(query, key, value, rule, packing)
    from .. import flash_attention

    if packing is None:
        return flash_attention(query, key, value, **rule.options())
    return flash_attention(
        *(x[0] for x in (query, key, value)),
        cu_seqlens_q=packing.cu_seqlens,
        cu_seqlens_k=packing.cu_seqlens,
        max_seqlen_q=packing.max_length,
        max_seqlen_k=packing.max_length,
        **rule.options(),
    )[None]


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, packing: Packing | None
) -> Tensor:
    if packing is None:
        if rule.window == NO_WINDOW and rule.alibi_slopes is None:
            return torch_attention(query, key, value, rule, is_causal=rule.causal)
        positions = torch.arange(query.shape[1], device=query.device)
        mask = scores_mask(positions, positions, rule)
    else:
        same = packing.rows[:, None] == packing.rows
        mask = scores_mask(packing.positions, packing.positions, rule).where(same, -torch.inf)
    return torch_attention(query, key, value, rule, attn_mask=mask.to(query.dtype))


def scores_mask(query_positions: Tensor, key_positions: Tensor, rule: AttentionRule) -> Tensor:
    """What torch's attention adds to its scores, float32 (..., heads or 1, seqlen_q, seqlen_k): the
    ALiBi bias, and -inf at keys not attended to. Positions are (..., seqlen)."""
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    left, right = rule.window
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if rule.causal:
        hidden |= distance < 0
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    bias = torch.zeros_like(distance, dtype=torch.float32)[..., None, :, :]
    if rule.alibi_slopes is not None:
        bias = bias - rule.alibi_slopes[:, None, None] * distance.abs()[..., None, :, :]
    return bias.masked_fill(hidden[..., None, :, :], -torch.inf)


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, **mask: Tensor | bool
) -> Tensor:
    """torch's scaled_dot_product_attention of (batch, seqlen, heads, head_dim), with its mask."""
    scale = rule.softmax_scale
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        enable_gqa=query.shape[2] != key.shape[2],
        **mask,
    )
    return out.transpose(1, 2)
