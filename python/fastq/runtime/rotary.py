"""Rotary position embedding on halves of the head: element i pairs with i + head_dim / 2.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import ModelConfig


def rotary_table(
    config: ModelConfig, length: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (length, head_dim / 2), of positions 0 to length - 1."""
    # Computed anew, not a buffer: that would be rounded by model.to(torch.bfloat16).
    dim = config.head_dim
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = torch.outer(position, 1.0 / (config.rope_theta**exponent))
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (batch, seqlen, heads, head_dim) by tables (seqlen, head_dim / 2), in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
