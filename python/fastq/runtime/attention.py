"""Causal attention of a whole sequence to itself, by fastq's kernel where there is one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def has_kernel(query: Tensor) -> bool:
    """Whether fastq has a kernel for the dtype and device. Float32 on a GPU has none: it is there
    to compare with, not to serve."""
    if query.device.type not in ("cpu", "cuda"):
        return False
    halves = (torch.float16, torch.bfloat16)
    return query.dtype in (halves if query.is_cuda else (torch.float32, *halves))


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Query i attends to the keys up to i.

    query is (batch, seqlen, heads, head_dim), key and value (batch, seqlen, kv_heads, head_dim);
    returns a tensor like query. Gradients come from torch's attention.
    """
    needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
    # A model is trained where the native library may not be built, with `runtime` by itself.
    is_alone = "." not in __package__
    if needs_grad or is_alone or not has_kernel(query):
        return torch_attention(query, key, value, is_causal=True)
    from .. import flash_attention

    return flash_attention(query, key, value, causal=True)


def torch_attention(query: Tensor, key: Tensor, value: Tensor, **mask: Tensor | bool) -> Tensor:
    """The same by torch's scaled_dot_product_attention, with its mask."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        enable_gqa=query.shape[2] != key.shape[2],
        **mask,
    )
    return out.transpose(1, 2)
