"""LLM.int8(): the product of float activations and an INT8 weight with the outliers apart."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import FLOAT_DTYPES, as_scale, check_dtype, check_out_dtype, check_tensors, is_direct
from .torch_library import (
    llm_int8_matmul_kernel,
    llm_int8_matmul_op,
    llm_int8_matmul_out_kernel,
    llm_int8_matmul_out_op,
    llm_int8_shape,
)

_OP = "llm_int8_matmul"


def llm_int8_matmul(
    x: Tensor,
    w: Tensor,
    sw: Tensor | float,
    *,
    threshold: float = 6.0,
    bias: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    outlier_count: Tensor | None = None,
    w_is_constant: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``x @ (w * sw[:, None]).t() + bias``, in INT8 but for the outliers of x.

    An element is an outlier where ``|x[m, k]| >= threshold``; with threshold 0 none is. The others
    are quantised with a scale for each row, which no outlier makes coarse; an outlier is multiplied
    as it is, in float32, by the weight that was kept of its column, or else by the INT8 one::

        s[m]    = max|other elements of row m| / 127  (1 where all are zeros, never below FLT_MIN)
        q[m, k] = 0 for an outlier, else clamp(round_half_even(x[m, k] / s[m]), -127, 127)
        v[n, k] = f32(outlier_weight[n, i]) where k = outlier_columns[i]
                | f32(w[n, k]) * sw[n]      elsewhere
        y = (f32(sum_k q[m, k] * w[n, k]) * s[m]) * sw[n]
        y = fma(x[m, k], v[n, k], y)        for the outliers k of row m, in ascending order
        out[m, n] = round_to(out_dtype, y + bias[n])

    The integer sum is exact; all else is float32 in this order, each operation rounded once. So a
    row's bits do not depend on the batch it came in, nor on the other rows' outliers. A NaN makes
    its row NaN, and so does an Inf where threshold is 0; else an Inf is an outlier.

    Only on a CPU, so far.

    Args:
        x: float32, float16 or bfloat16 ``(..., M, K)``, any strides, K at most 131071. Leading
            dimensions that no one stride joins are copied, as by ``x.reshape(-1, K)``.
        w: int8 ``(N, K)``, a linear layer's weight, any strides; K contiguous is the fast path.
        sw: float32 scale of w's rows: a scalar, ``(N,)`` or ``(1, N)``.
        threshold: not negative; Inf leaves only Inf as an outlier.
        bias: ``(N,)`` or ``(1, N)``, float32 or of out's dtype.
        outlier_columns: int32 ``(C,)``, ascending columns of w that are kept in float, too.
        outlier_weight: float32, float16 or bfloat16 ``(N, C)``, any strides: those columns. Both or
            neither; a column that holds no outlier is left as it is.
        outlier_count: int32, one element, to receive the number of x's columns with an outlier.
        w_is_constant: the promise of :func:`int8_gemm`'s ``b_is_constant``.
        out_dtype: float32, float16 or bfloat16; x's by default.
        out: ``(..., M, N)`` to write into, with leading dimensions that one stride joins; its dtype
            is the output's. No overlap with an input.

    Returns:
        ``(..., M, N)`` of ``out_dtype`` on x's device; ``out`` when given.

    Raises:
        ValueError: a shape, a size, a threshold, an overlap, only one of the outlier tensors, a
            column out of order or range, or a tensor that requires grad.
        TypeError: a dtype, a device, or not a tensor.
        NotImplementedError: x is not on a CPU.

    Source: LLM.int8() (Dettmers et al., 2022), where a column with one outlier is taken out of INT8
    for all rows; here each element is.
    """
    if sw.__class__ is not Tensor:
        sw = as_scale(sw, x)
    optional = (bias, outlier_columns, outlier_weight, outlier_count, out)
    direct = w is not None and sw is not None and is_direct(x, w, sw, *optional)
    if not direct:
        names = ("bias", "outlier_columns", "outlier_weight", "outlier_count", "out")
        given = {n: t for n, t in zip(names, optional, strict=True) if t is not None}
        check_tensors(_OP, x=x, w=w, sw=sw, **given)
    if not isinstance(threshold, (int, float)):
        raise TypeError(f"{_OP}: threshold is a {type(threshold).__name__}, expected a number")
    arguments = (x, w, sw, threshold, bias, outlier_columns, outlier_weight, bool(w_is_constant))
    if out is not None:
        check_out_dtype(_OP, out, out_dtype)
    else:
        if out_dtype is None:
            out_dtype = x.dtype
        else:
            check_dtype(_OP, out_dtype, FLOAT_DTYPES)
        if outlier_count is None:
            return (llm_int8_matmul_kernel if direct else llm_int8_matmul_op)(*arguments, out_dtype)
        out = torch.empty(llm_int8_shape(x, w), dtype=out_dtype, device=x.device)
    run = llm_int8_matmul_out_kernel if direct else llm_int8_matmul_out_op
    run(*arguments, out, outlier_count)
    return out
