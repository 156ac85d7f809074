"""Attention by its plain formula in torch, and how near to the exact result an op must come."""

from __future__ import annotations

import math

import numpy as np
import torch


def torch_attention(
    q, k, v, *, causal=False, softmax_scale=None, window=(-1, -1), softcap=0.0, alibi_slopes=None
):
    """The plain formula with torch, scores and probabilities in q's dtype."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    s = torch.einsum("bihd,bjhd->bhij", q * scale, k)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    positions = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    keys = torch.arange(k.shape[1], device=q.device)[None, :]
    if alibi_slopes is not None:
        slopes = alibi_slopes[None] if alibi_slopes.dim() == 1 else alibi_slopes
        s = s - (slopes[:, :, None, None] * (positions - keys).abs()).to(s.dtype)
    allowed = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        allowed &= keys <= positions
    if window[0] >= 0:
        allowed &= keys >= positions - window[0]
    if window[1] >= 0:
        allowed &= keys <= positions + window[1]
    p = s.masked_fill(~allowed, -torch.inf).softmax(-1).masked_fill(~allowed, 0)
    return torch.einsum("bhij,bjhd->bihd", p, v)


def assert_close(out: torch.Tensor, expected: np.ndarray, theirs: torch.Tensor) -> None:
    """The error of `out` is at most about twice that of the plain formula, `theirs`."""
    ours, theirs = (x.double().cpu().numpy() - expected for x in (out, theirs))
    if ours.size > 0:
        assert np.abs(ours).max() <= 2 * np.abs(theirs).max() + 1e-5
        rms, size = np.sqrt(np.mean(ours**2)), np.sqrt(np.mean(expected**2))
        assert rms <= 1.2 * np.sqrt(np.mean(theirs**2)) + 1e-6 * size
