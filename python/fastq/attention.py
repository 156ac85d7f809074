"""Attention on torch tensors."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .ops import check_tensors, is_direct
from .torch_library import (
    flash_attention_kernel,
    flash_attention_op,
    flash_attention_out_kernel,
    flash_attention_out_op,
)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention that never holds a whole row of scores, for each sequence and head::

        t[i, j] = softmax_scale * sum_d q[i, d] * k[j, d]
        s[i, j] = t, or softcap * tanh(t / softcap);  minus alibi_slope * |p(i) - j|
        lse[i] = log(sum_j exp(s[i, j]))  over the keys j that query i attends to
        out[i, d] = sum_j exp(s[i, j] - lse[i]) * v[j, d]

    ``p(i) = i + seqlen_k - seqlen_q`` is where query i stands among the keys: the last query stands
    at the last key. A query that attends to nothing has out 0 and lse -inf. Scores, exponentials
    and sums are float32; before their product with v, CUDA rounds the exponentials to q's dtype,
    and AMX those of bfloat16 inputs.

    Args:
        q: float32 (on CPUs), float16 or bfloat16 ``(batch, seqlen_q, num_heads, head_dim)``, or
            packed ``(total_q, num_heads, head_dim)`` with ``cu_seqlens``. head_dim is at most 256.
            Any strides; where head_dim's is not 1 a copy is made. On CUDA, rows that begin at
            multiples of 16 bytes are read faster.
        k, v: of q's dtype, ``(batch, seqlen_k, num_heads_k, head_dim)`` or packed. num_heads_k
            divides num_heads: query head h reads key head ``h // (num_heads // num_heads_k)``.
        causal: query i attends to the keys ``j <= p(i)`` only.
        softmax_scale: ``1 / sqrt(head_dim)`` if None; finite, not 0.
        window: ``(left, right)``: to the keys ``p(i) - left <= j <= p(i) + right`` only; -1 is no
            bound on that side.
        softcap: 0 is none.
        alibi_slopes: float32 ``(num_heads,)`` or ``(batch, num_heads)``.
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)`` on q's device: sequence b is the rows
            ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. Both or neither.
        max_seqlen_q, max_seqlen_k: with cu_seqlens, no sequence is longer (on CUDA this is not
            checked, and queries past it are left out). None reads it from them, which waits for a
            GPU.
        return_lse: return ``(out, lse)``.
        out: like q, to write into; no overlap with an input.

    Returns:
        ``out`` like q, contiguous; with ``return_lse`` also ``lse`` float32
        ``(batch, num_heads, seqlen_q)``, or ``(num_heads, total_q)`` packed, natural logarithm.

    Raises:
        ValueError: a shape, a size, a number, an overlap, or a tensor that requires grad.
        TypeError: a dtype, a device, or not a tensor.
        NotImplementedError: fastq has no kernel for the device and dtype.

    Source: FlashAttention (Dao et al., 2022), FlashAttention-2 (Dao, 2023).
    """
    optional = {
        "alibi_slopes": alibi_slopes,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "out": out,
    }
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_tensors("flash_attention", q=q, k=k, v=v, **given)
    left, right = check_window("flash_attention", window)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError(
            "flash_attention: only one of cu_seqlens_q and cu_seqlens_k is given, expected both or "
            "neither"
        )
    options = (
        check_softmax_scale("flash_attention", softmax_scale, q),
        bool(causal),
        left,
        right,
        float(softcap),
        alibi_slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        _max_seqlen("max_seqlen_q", max_seqlen_q, cu_seqlens_q),
        _max_seqlen("max_seqlen_k", max_seqlen_k, cu_seqlens_k),
    )
    q, k, v = with_unit_stride(q, k, v)
    direct = is_direct(q, k, v, *given.values())
    if out is None:
        out, lse = (flash_attention_kernel if direct else flash_attention_op)(q, k, v, *options)
    else:
        run = flash_attention_out_kernel if direct else flash_attention_out_op
        lse = run(q, k, v, *options, out)
    return (out, lse) if return_lse else out


def check_softmax_scale(op: str, softmax_scale: float | None, q: Tensor) -> float:
    """The scale of :func:`flash_attention`, None included, as a number."""
    if softmax_scale is None:
        return 1 / math.sqrt(max(q.shape[-1], 1)) if q.dim() > 0 else 1.0
    if softmax_scale == 0:
        raise ValueError(f"{op}: softmax_scale is 0, expected another number or None")
    return float(softmax_scale)


def with_unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, or copies of those whose stride along head_dim is not 1."""
    return tuple(x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def check_window(op: str, window: Any) -> tuple[int, int]:
    """Raises unless `window` is one that :func:`flash_attention` takes."""
    try:
        left, right = window
    except (TypeError, ValueError):
        left = right = None
    if not isinstance(left, int) or not isinstance(right, int):
        raise TypeError(f"{op}: window is {window!r}, expected two ints (left, right)")
    return left, right


def _max_seqlen(name: str, given: int | None, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is None:
        if given is not None:
            raise ValueError(f"flash_attention: {name} is {given}, and there are no cu_seqlens")
        return 0
    if given is not None:
        return given
    lengths = cu_seqlens.diff()
    return int(lengths.max()) if lengths.numel() > 0 else 0
