"""The oracle: every op in NumPy, each rounding spelled out, without a call into fastq.

Results are compared bit by bit (two NaNs count as equal). Values of bfloat16 and float16 are held
in float32, which holds each of them exactly. What follows an activation lies between two bounds.
"""

from __future__ import annotations

import math

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


def _quantize_output(y: np.ndarray, out_scale: torch.Tensor | float) -> np.ndarray:
    ratio = y / np.float32(out_scale.item() if isinstance(out_scale, torch.Tensor) else out_scale)
    assert ratio.dtype == np.float32
    rounded = np.clip(np.rint(ratio), -127, 127)
    return np.where(np.isnan(rounded), -128, rounded).astype(np.int8)


def _scaled_sums(a, b, sa, sb, bias, zero_point, raw) -> np.ndarray:
    """y before the activation, float32; the int32 sums themselves when `raw`."""
    sums = int_matmul(to_numpy(a), to_numpy(b))
    if zero_point is not None:
        points = to_numpy(zero_point) if isinstance(zero_point, torch.Tensor) else zero_point
        column_sums = to_numpy(b).astype(np.int64).sum(axis=0)
        sums = sums - _per_row(np.asarray(points, np.int64), sums) * column_sums
    assert np.abs(sums).max(initial=0) < 2**31
    if raw:
        return sums.astype(np.int32)
    row_scale = np.asarray(to_numpy(sa) if isinstance(sa, torch.Tensor) else sa, np.float32)
    column_scale = np.asarray(to_numpy(sb) if isinstance(sb, torch.Tensor) else sb, np.float32)
    y = sums.astype(np.float32) * _per_row(row_scale, sums)
    y = y * column_scale.reshape(-1)
    return y if bias is None else y + to_numpy(bias).reshape(-1)


def _finish(y: np.ndarray, residual, out_dtype, out_scale) -> np.ndarray:
    """From the activated float32 y to the output; never decreasing in y where out_scale > 0."""
    assert y.dtype == np.float32
    if residual is not None:
        y = y + to_numpy(residual)
    return _quantize_output(y, out_scale) if out_dtype == torch.int8 else round_to(y, out_dtype)


def int8_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    sa: torch.Tensor | float | None,
    sb: torch.Tensor | float | None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    zero_point: torch.Tensor | int | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | float | None = None,
) -> np.ndarray:
    """a (..., M, K), b (K, N) int8 -> (..., M, N), as fastq.int8_gemm documents it.

    No activation but relu: the others have no exact result.
    """
    assert activation in (None, "relu")
    with np.errstate(all="ignore"):
        y = _scaled_sums(a, b, sa, sb, bias, zero_point, out_dtype == torch.int32)
        if out_dtype == torch.int32:
            return y
        if activation == "relu":
            y = np.where(y < 0, np.float32(0), y)
        return _finish(y, residual, out_dtype, out_scale)


def activate(y: np.ndarray, activation: str) -> np.ndarray:
    """The formula in float64, without its cancellations: each result to nearly all its digits."""
    y = y.astype(np.float64)
    if activation == "gelu":
        phi = torch.special.erfc(torch.from_numpy(y / -math.sqrt(2))).numpy() / 2
    elif activation == "relu":
        return np.where(y < 0, 0, y)
    else:
        inner = np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)
        exponent = {"silu": y, "gelu_tanh": 2 * inner}[activation]
        small = np.exp(-np.abs(exponent))
        phi = np.where(exponent < 0, small, 1) / (1 + small)
    return np.where(y == -np.inf, 0, y * phi)


def int8_gemm_bounds(
    a: torch.Tensor,
    b: torch.Tensor,
    sa: torch.Tensor | float,
    sb: torch.Tensor | float,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    zero_point: torch.Tensor | int | None = None,
    activation: str,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What int8_gemm must give at least and at most: the activation has a relative error of 1e-6,
    everything after it rounds and so keeps the order of its inputs."""
    with np.errstate(all="ignore"):
        y = activate(_scaled_sums(a, b, sa, sb, bias, zero_point, False), activation)
        slack = np.where(np.isfinite(y), 1e-6 * np.abs(y), 0)
        low = np.nextafter((y - slack).astype(np.float32), np.float32(-np.inf))
        high = np.nextafter((y + slack).astype(np.float32), np.float32(np.inf))
        low = np.where(y == np.inf, np.float32(np.inf), low)
        return tuple(_finish(bound, residual, out_dtype, out_scale) for bound in (low, high))


def rotate(values: np.ndarray, rotation: int) -> np.ndarray:
    """Each group of `rotation` elements times the Hadamard matrix of that order, by its recursion:
    the halves transformed, their sum beside their difference. float32, each operation rounded."""

    def transform(group: np.ndarray) -> np.ndarray:
        if group.shape[-1] == 1:
            return group
        a, b = map(transform, np.split(group, 2, axis=-1))
        return np.concatenate([a + b, a - b], axis=-1)

    groups = values.reshape(*values.shape[:-1], values.shape[-1] // rotation, rotation)
    with np.errstate(over="ignore", invalid="ignore"):
        return transform(groups).reshape(values.shape)


def quantize(x: torch.Tensor, rotation: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x (..., K) -> q int8 like x, s float32 x.shape[:-1]; one float32 division per element."""
    return quantize_floats(to_numpy(x) if rotation == 0 else rotate(to_numpy(x), rotation))


def quantize_floats(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """quantize of float32 numbers."""
    absmax = np.abs(values).max(axis=-1, initial=0)  # np.max keeps NaN
    finite = np.isfinite(absmax)
    s = np.where(absmax == 0, np.float32(1), np.maximum(absmax / np.float32(127), FLT_MIN))
    s = np.where(finite, s, absmax).astype(np.float32)
    with np.errstate(invalid="ignore"):
        ratio = np.where(finite[..., None], values / s[..., None], np.float32(0))
    assert ratio.dtype == np.float32
    return np.clip(np.rint(ratio), -127, 127).astype(np.int8), s


def quantize_with(
    values: np.ndarray,
    *,
    smooth: torch.Tensor | None = None,
    rotation: int = 0,
    scale: float | None = None,
    zero_point: int | None = None,
    asymmetric: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """float32 numbers (..., K) -> q, s (...,) and, where asymmetric, zero_point (...,)."""
    y = prepare(values, smooth, rotation)
    assert y.dtype == np.float32
    with np.errstate(all="ignore"):
        if scale is not None:
            s, z = np.float32(scale), np.float32(zero_point or 0)
            q = np.clip(np.rint(y / s) + z, -127 if zero_point is None else -128, 127)
            q = np.where(np.isnan(q), np.float32(-128), q)
            return q.astype(np.int8), s, None if zero_point is None else z.astype(np.int32)
        if not asymmetric:
            return *quantize_floats(y), None
        low, high = y.min(axis=-1, initial=0), y.max(axis=-1, initial=0)  # both keep NaN
        absmax = np.maximum(-low, high)
        finite = np.isfinite(absmax)
        s = np.maximum(high / np.float32(255) - low / np.float32(255), FLT_MIN)
        s = np.where(absmax == 0, np.float32(1), np.where(finite, s, absmax))
        z = np.clip(np.rint(np.float32(-128) - low / s), -128, 127)
        z = np.where(finite, z, np.float32(0))
        q = np.clip(np.rint(y / s[..., None]) + z[..., None], -128, 127)
        assert s.dtype == z.dtype == q.dtype == np.float32
        return np.where(finite[..., None], q, 0).astype(np.int8), s, z.astype(np.int32)


def prepare(values: np.ndarray, smooth: torch.Tensor | None, rotation: int) -> np.ndarray:
    """What is quantised of `values`, in their own precision: smoothed, then rotated."""
    with np.errstate(all="ignore"):
        if smooth is not None:
            values = values * (values.dtype.type(1) / to_numpy(smooth).reshape(-1))
    return rotate(values, rotation) if rotation else values


def normalize(h: np.ndarray, weight, bias, eps: float, *, is_layer_norm: bool) -> np.ndarray:
    """RMSNorm or LayerNorm of the last dimension in float64."""
    h = h.astype(np.float64)
    if is_layer_norm:
        h = h - h.mean(axis=-1, keepdims=True)
    y = h / np.sqrt((h * h).mean(axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * to_numpy(weight).astype(np.float64).reshape(-1)
    return y if bias is None else y + to_numpy(bias).astype(np.float64).reshape(-1)


def assert_quantizes(
    got: tuple[torch.Tensor, ...],
    y: np.ndarray,
    tolerance: float,
    *,
    smooth: torch.Tensor | None = None,
    rotation: int = 0,
    scale: float | None = None,
    zero_point: int | None = None,
    asymmetric: bool = False,
) -> None:
    """q, s and, where asymmetric, zero_point are those of float64 numbers y, which the op knows but
    for `tolerance`, as a part of their row's largest one: q is the nearest one there is."""
    q, s, *z = (to_numpy(t) for t in got)
    y = prepare(y, smooth, rotation)
    is_static, asymmetric = scale is not None, asymmetric or zero_point is not None
    assert q.shape == y.shape
    assert q.dtype == np.int8
    assert s.shape == (() if is_static else (*y.shape[:-1], 1))
    assert len(z) == asymmetric
    low, high = y.min(axis=-1, keepdims=True), y.max(axis=-1, keepdims=True)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    absmax = np.maximum(-low, high)
    zero = np.float64(z[0]) if z else np.float64(0)
    if is_static:
        assert s == np.float32(scale)
        assert not z or zero == zero_point
    else:
        wanted = (high - low) / 255 if asymmetric else absmax / 127
        error = np.abs(s - np.where(absmax == 0, 1, np.maximum(wanted, FLT_MIN)))
        assert (error <= 2 * tolerance * wanted).all(), f"s is off by {(error / wanted).max()}"
        if asymmetric:
            assert z[0].shape == s.shape
            assert (np.abs(zero - (-128 - low / s)) <= 0.5 + 512 * tolerance).all()
    least = -128 if asymmetric else -127
    nearest = np.clip(y, (least - zero) * s.astype(np.float64), (127 - zero) * s.astype(np.float64))
    error = np.abs((q - zero) * s.astype(np.float64) - nearest) - tolerance * absmax
    # A whole float32 division is left to the op: its rounding counts next to a tie.
    steps = (error / s - (0.5 + 255 * 2.0**-23)).max(initial=0)
    assert steps <= 0, f"q is {0.5 + steps} steps from what it stands for"


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


def assert_between(got: torch.Tensor, bounds: tuple[np.ndarray, np.ndarray]) -> None:
    """low <= got <= high, and NaN exactly where they are."""
    low, high = bounds
    found = to_numpy(got)
    assert found.shape == low.shape
    assert found.dtype == low.dtype
    outside = (found < low) | (found > high) | (np.isnan(found) != np.isnan(low))
    if outside.any():
        at = tuple(int(i) for i in np.argwhere(outside)[0])
        raise AssertionError(
            f"{int(outside.sum())} of {outside.size} elements are out of bounds, the first at "
            f"{at}: got {found[at]!r}, expected {low[at]!r} to {high[at]!r}"
        )


def flash_attention(
    q,
    k,
    v,
    *,
    causal=False,
    softmax_scale=None,
    window=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
):
    """out and lse in float64: whole rows of scores, one sequence and head after the other."""
    packed = cu_seqlens_q is not None
    q64, k64, v64 = (x.detach().cpu().double().numpy() for x in (q, k, v))
    if packed:
        cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        sequences = list(zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True))
    else:
        sequences = [(0, q.shape[1], 0, k.shape[1])] * q.shape[0]
    heads, group = q.shape[-2], q.shape[-2] // max(k.shape[-2], 1)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    out = np.zeros(q.shape)
    lse = np.full((heads, q.shape[0]) if packed else (q.shape[0], heads, q.shape[1]), -np.inf)
    for b, (begin_q, end_q, begin_k, end_k) in enumerate(sequences):
        positions = np.arange(end_q - begin_q)[:, None] + (end_k - begin_k) - (end_q - begin_q)
        keys = np.arange(end_k - begin_k)[None, :]
        allowed = np.ones((end_q - begin_q, end_k - begin_k), bool)
        if causal:
            allowed &= keys <= positions
        if window[0] >= 0:
            allowed &= keys >= positions - window[0]
        if window[1] >= 0:
            allowed &= keys <= positions + window[1]
        some = allowed.any(axis=1)
        for h in range(heads):
            rows = (slice(begin_q, end_q), h) if packed else (b, slice(None), h)
            at = (slice(begin_k, end_k), h // group) if packed else (b, slice(None), h // group)
            s = scale * (q64[rows] @ k64[at].T)
            if softcap > 0:
                s = softcap * np.tanh(s / softcap)
            if alibi_slopes is not None:
                slopes = alibi_slopes.cpu().double().numpy()
                s = s - (slopes[h] if slopes.ndim == 1 else slopes[b, h]) * np.abs(positions - keys)
            s = np.where(allowed, s, -np.inf)
            top = np.where(some, s.max(axis=1, initial=-np.inf), 0.0)
            e = np.where(allowed, np.exp(s - top[:, None]), 0.0)
            total = np.where(some, e.sum(axis=1), 1.0)
            out[rows] = (e / total[:, None]) @ v64[at]
            its_lse = np.where(some, top + np.log(total), -np.inf)
            lse[(h, slice(begin_q, end_q)) if packed else (b, h)] = its_lse
    return out, lse


def cached(cache, seqlens, b, block_table=None):
    """A view or copy of the tokens of sequence b: of k, v, or their scales."""
    length = int(seqlens[b])
    if block_table is None:
        return cache[b, :length]
    page_size = cache.shape[1]
    pages = [cache[int(page)] for page in block_table[b, : -(-length // page_size)]]
    return np.concatenate([cache[:0].reshape(0, *cache.shape[2:]), *pages])[:length]


def flash_decode(
    q,
    k_cache,
    v_cache,
    cache_seqlens,
    *,
    block_table=None,
    k_scale=None,
    v_scale=None,
    causal=True,
    alibi_slopes=None,
    **options,
):
    """out and lse in float64: attention of each sequence to its own tokens, dequantised."""
    out = np.zeros(q.shape)
    lse = np.full((q.shape[0], q.shape[2], q.shape[1]), -np.inf)
    for b in range(q.shape[0]):
        k, v = sequence(b, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale)
        slopes = (
            alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        )
        out[b : b + 1], lse[b : b + 1] = flash_attention(
            q[b : b + 1], k, v, causal=causal, alibi_slopes=slopes, **options
        )
    return out, lse


def sequence(b, k_cache, v_cache, cache_seqlens, block_table=None, k_scale=None, v_scale=None):
    """k and v of sequence b in float64, (1, seqlen, num_heads_k, head_dim)."""
    lengths = cache_seqlens.tolist()
    table = None if block_table is None else block_table.cpu().numpy()
    result = []
    for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)):
        x = cached(to_numpy(cache), lengths, b, table).astype(np.float64)
        if scale is not None:
            x = x * cached(to_numpy(scale), lengths, b, table).astype(np.float64)[..., None]
        result.append(torch.from_numpy(x[None]))
    return result


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """x (heads, head_dim) float32 with its first 2 * len(cos) elements rotated; each product and
    sum rounded."""
    half = len(cos)
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    result = x.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        result[:, first] = x[:, first] * cos - x[:, second] * sin
        result[:, second] = x[:, second] * cos + x[:, first] * sin
    assert result.dtype == np.float32
    return result


def kv_append(
    k,
    v,
    k_cache,
    v_cache,
    cache_seqlens,
    *,
    block_table=None,
    k_scale=None,
    v_scale=None,
    rotary_cos=None,
    rotary_sin=None,
    rotary_interleaved=False,
    q=None,
):
    """The caches and scales afterwards, and the rotated q: (k_cache, v_cache, k_scale, v_scale, q),
    None where there is none."""
    tensors = (k_cache, v_cache, k_scale, v_scale, q)
    after = [None if x is None else to_numpy(x).copy() for x in tensors]
    seqlens, seqlen_new = cache_seqlens.tolist(), k.shape[1]
    for b in range(k.shape[0]):
        for i in range(seqlen_new):
            token = seqlens[b] - seqlen_new + i
            if token < 0:
                continue
            place = (b, token)
            if block_table is not None:
                page_size = k_cache.shape[1]
                place = (int(block_table[b, token // page_size]), token % page_size)
            rows = [to_numpy(x[b, i]) for x in (k, v)]
            if rotary_cos is not None:
                angles = [to_numpy(x)[token] for x in (rotary_cos, rotary_sin)]
                rows[0] = rope(rows[0], *angles, rotary_interleaved)
                if q is not None:
                    rotated = rope(to_numpy(q[b, i]), *angles, rotary_interleaved)
                    after[4][b, i] = round_to(rotated, q.dtype)
            for at, row in enumerate(rows):
                if k_scale is None:
                    after[at][place] = round_to(row, k.dtype)
                else:
                    after[at][place], after[at + 2][place] = quantize_floats(row)
    return after
