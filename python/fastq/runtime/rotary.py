"""Positions: rotary embedding and ALiBi.

Sources: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; Press et
al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
2022.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig, RopeScaling


def rotary_table(
    config: ModelConfig, length: int, device: torch.device | str
) -> tuple[Tensor, Tensor] | None:
    """cos and sin, float32 (length, rotary_dim / 2), of positions 0 to length - 1; None for a model
    without rotary."""
    if config.position != "rotary":
        return None
    # Computed anew, not a buffer: that would be rounded by model.to(torch.bfloat16).
    dim = config.rotary_dim or config.head_dim
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    frequency = 1.0 / (config.rope_theta**exponent)
    if config.rope_scaling is not None:
        frequency = _scaled(frequency, config.rope_scaling)
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = torch.outer(position, frequency)
    return angle.cos(), angle.sin()


def _scaled(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short waves, as they are
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates the first R elements of x (batch, seqlen, heads, head_dim) by tables (seqlen, R / 2)
    or (batch, seqlen, R / 2), in x's dtype."""
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def alibi_slopes(config: ModelConfig, device: torch.device | str) -> Tensor | None:
    """float32 (num_attention_heads,): 2^(-8 i / n) for i = 1 to n, n the number of heads or the
    power of two below it; then those of 2 n with i odd. None for a model without ALiBi."""
    if config.position != "alibi":
        return None
    heads = config.num_attention_heads
    power = 1 << (heads.bit_length() - 1)
    exponent = torch.arange(1, power + 1, device=device, dtype=torch.float32) * (-8 / power)
    if heads > power:
        odd = torch.arange(1, 2 * (heads - power), 2, device=device, dtype=torch.float32)
        exponent = torch.cat((exponent, odd * (-4 / power)))
    return exponent.exp2()
