"""The oracle: every op in NumPy, each rounding spelled out, without a call into fastq.

Results are compared bit by bit (two NaNs count as equal). Values of bfloat16 and float16 are held
in float32, which holds each of them exactly.
"""

from __future__ import annotations

import numpy as np
import torch

FLT_MIN = np.finfo(np.float32).tiny


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """A tensor on any device as NumPy: floats as float32, integers as they are."""
    x = x.detach().cpu()
    return (x.to(torch.float32) if x.is_floating_point() else x).numpy()


def round_to(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 rounded to the nearest value of `dtype`, ties to even, and held in float32."""
    if dtype == torch.float32:
        return x
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    assert dtype == torch.bfloat16
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    rounded = rounded.astype(np.uint32).view(np.float32).reshape(x.shape)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def int_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The exact sums as int64. float64 holds every partial sum below 2**53 exactly."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)


def _per_row(scale: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A scale of any accepted shape, such that it broadcasts over the rows of `rows`."""
    return scale.reshape(1) if scale.size == 1 else scale.reshape(*rows.shape[:-1], 1)


def int8_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    sa: torch.Tensor | float | None,
    sb: torch.Tensor | float | None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> np.ndarray:
    """a (..., M, K), b (K, N) int8 -> (..., M, N), as fastq.int8_gemm documents it."""
    sums = int_matmul(to_numpy(a), to_numpy(b))
    if out_dtype == torch.int32:
        assert np.abs(sums).max(initial=0) < 2**31
        return sums.astype(np.int32)
    row_scale = np.asarray(to_numpy(sa) if isinstance(sa, torch.Tensor) else sa, np.float32)
    column_scale = np.asarray(to_numpy(sb) if isinstance(sb, torch.Tensor) else sb, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        result = sums.astype(np.float32) * _per_row(row_scale, sums)
        result = result * column_scale.reshape(-1)
        if bias is not None:
            result = result + to_numpy(bias).reshape(-1)
    assert result.dtype == np.float32
    return round_to(result, out_dtype)


def quantize(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """x (..., K) -> q int8 like x, s float32 x.shape[:-1]; one float32 division per element."""
    values = to_numpy(x)
    absmax = np.abs(values).max(axis=-1, initial=0)  # np.max keeps NaN
    finite = np.isfinite(absmax)
    s = np.where(absmax == 0, np.float32(1), np.maximum(absmax / np.float32(127), FLT_MIN))
    s = np.where(finite, s, absmax).astype(np.float32)
    with np.errstate(invalid="ignore"):
        ratio = np.where(finite[..., None], values / s[..., None], np.float32(0))
    assert ratio.dtype == np.float32
    return np.clip(np.rint(ratio), -127, 127).astype(np.int8), s


def dequantize(
    q: torch.Tensor, s: torch.Tensor | float, out_dtype: torch.dtype = torch.bfloat16
) -> np.ndarray:
    """q (..., K), s a scalar or one value per row -> (..., K)."""
    scale = np.asarray(to_numpy(s) if isinstance(s, torch.Tensor) else s, np.float32)
    values = to_numpy(q).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return round_to(values * _per_row(scale, values), out_dtype)


def assert_same(got: torch.Tensor, expected: np.ndarray) -> None:
    """Equal shapes and bits; the message shows the first element that differs."""
    found = to_numpy(got)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if found.dtype == np.float32:
        x, y = np.ascontiguousarray(found), np.ascontiguousarray(expected)
        differ = (x.view(np.uint32) != y.view(np.uint32)) & ~(np.isnan(x) & np.isnan(y))
        differ = differ.reshape(found.shape)
    else:
        differ = found != expected
    if differ.any():
        at = tuple(int(i) for i in np.argwhere(differ)[0])
        raise AssertionError(
            f"{int(differ.sum())} of {differ.size} elements differ, the first at {at}: "
            f"got {found[at]!r}, expected {expected[at]!r}"
        )
