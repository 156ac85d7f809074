"""The oracle of llm_int8_matmul, each rounding spelled out, and inputs with outliers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

import reference
from operands import generator, random_int8
from reference import to_numpy


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of float32 with one rounding.

    The product is exact in float64. Their sum, rounded to odd there (to the neighbour with an odd
    last bit wherever it is not exact), has enough digits left to be rounded to float32 as if it
    were the exact one.
    """
    product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = np.asarray(product + z)
    part = total - product
    error = (product - (total - part)) + (z - part)  # TwoSum: total + error is the exact sum
    bits = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)
    is_even = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    return np.where(is_even, bits + away, bits).view(np.float64).astype(np.float32)


def outliers_of(x: torch.Tensor, threshold: float) -> np.ndarray:
    """Which elements of x are outliers."""
    return (np.abs(to_numpy(x)) >= np.float32(threshold)) & (threshold > 0)


def count_columns(x: torch.Tensor, threshold: float = 6.0) -> int:
    """Columns of x with an outlier."""
    return int(outliers_of(x, threshold).any(axis=tuple(range(x.dim() - 1))).sum())


def llm_int8_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor | float,
    *,
    threshold: float = 6.0,
    bias: torch.Tensor | None = None,
    outlier_columns: torch.Tensor | None = None,
    outlier_weight: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> np.ndarray:
    """x (..., M, K), w (N, K) -> (..., M, N), as fastq.llm_int8_matmul documents it."""
    N, K = w.shape
    rows = to_numpy(x).reshape(int(np.prod(x.shape[:-1])), K)
    weight = to_numpy(w)
    scale = np.asarray(to_numpy(sw) if isinstance(sw, torch.Tensor) else sw, np.float32)
    scale = np.broadcast_to(scale.reshape(-1), (N,))
    outlier = outliers_of(x, threshold).reshape(rows.shape)
    with np.errstate(all="ignore"):
        q, s = reference.quantize_floats(np.where(outlier, np.float32(0), rows))
        sums = reference.int_matmul(q, weight.T)
        assert np.abs(sums).max(initial=0) < 2**31
        y = (sums.astype(np.float32) * s[:, None]) * scale
        v = weight.astype(np.float32) * scale[:, None]
        if outlier_columns is not None:
            v[:, to_numpy(outlier_columns)] = to_numpy(outlier_weight)
        for k in np.flatnonzero(outlier.any(axis=0)):
            at = outlier[:, k]
            y[at] = fma(rows[at, k, None], v[None, :, k], y[at])
        if bias is not None:
            y = y + to_numpy(bias).reshape(-1)
        assert y.dtype == np.float32
        y = reference.round_to(y, out_dtype or x.dtype)
    return y.reshape(*x.shape[:-1], N)


class Problem(NamedTuple):
    x: torch.Tensor
    w: torch.Tensor
    sw: torch.Tensor


def plant(x: torch.Tensor, columns: int, seed: int = 0) -> torch.Tensor:
    """x with outliers of 7 to 57 in that many columns, each in about half of the rows."""
    draw = generator(seed)
    x = x.clone()
    flat = x.flatten(0, -2)
    at = torch.randperm(flat.shape[1], generator=draw)[:columns]
    size = 7 + 50 * torch.rand(len(flat), len(at), generator=draw)
    sign = torch.randint(0, 2, size.shape, generator=draw) * 2 - 1
    chosen = torch.rand(size.shape, generator=draw) < 0.5
    flat[:, at] = torch.where(chosen, size * sign, flat[:, at].float().cpu()).to(x)
    return x


def random_problem(
    M: int,
    N: int,
    K: int,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    columns: int = 0,
    seed: int = 0,
) -> Problem:
    """x (M, K) of N(0, 1) within +-5, with outliers in `columns` columns; w (N, K), sw (N,)."""
    x = torch.randn(M, K, generator=generator(seed)).clamp(-5, 5)
    x = plant(x, columns, seed + 1).to(device, dtype)
    w = random_int8(N, K, device=device, seed=seed + 2)
    sw = 0.001 + 0.01 * torch.rand(N, generator=generator(seed + 3))
    return Problem(x, w, sw.to(device))


class Kept(NamedTuple):
    """The float columns of a weight, by their names as arguments."""

    outlier_columns: torch.Tensor
    outlier_weight: torch.Tensor


def random_kept(
    problem: Problem, columns: torch.Tensor, *, dtype: torch.dtype = torch.float32, seed: int = 9
) -> dict[str, torch.Tensor]:
    """Those columns of w in float: w * sw and a little noise, so that it shows which was read."""
    columns = columns.sort().values.to(problem.w.device, torch.int32)
    exact = (problem.w.float() * problem.sw[:, None])[:, columns.long()]
    noise = 0.01 * torch.randn(exact.shape, generator=generator(seed)).to(exact.device)
    return Kept(columns, (exact + noise).to(dtype))._asdict()
