"""The torch custom ops of the namespace ``fastq``: schemas, kernels and fake kernels.

Arguments are checked by the native library; what it cannot see, and the public functions, are in
:mod:`fastq.ops` and its neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _core

# `out` is positional in the schemas: a keyword costs the dispatcher 2 us a call.
_library = torch.library.Library("fastq", "DEF")
_OPTIONS = (
    "Tensor? residual=None, str? activation=None, Tensor? zero_point=None, "
    "Tensor? column_sums=None, Tensor? out_scale=None"
)
_library.define(
    "int8_gemm(Tensor a, Tensor b, Tensor? sa, Tensor? sb, Tensor? bias, ScalarType out_dtype, "
    f"SymInt[]? packed_shape, bool b_is_constant, {_OPTIONS}) -> Tensor"
)
_library.define(
    "int8_gemm.out(Tensor a, Tensor b, Tensor? sa, Tensor? sb, Tensor? bias, "
    f"SymInt[]? packed_shape, bool b_is_constant, Tensor(a!) out, {_OPTIONS}) -> ()"
)
_library.define("quantize_per_token(Tensor x, int rotation=0) -> (Tensor, Tensor)")
# Their results are q, then s and zero_point as far as the call computes them, then the residual.
_QUANTIZATION = "Tensor? smooth, int rotation, Tensor? scale, Tensor? zero_point, bool asymmetric"
_library.define(f"quantize_per_token.options(Tensor x, {_QUANTIZATION}) -> Tensor[]")
_library.define(
    "norm_quant(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, str norm, float eps, "
    f"{_QUANTIZATION}) -> Tensor[]"
)
_library.define(
    f"activation_quant(Tensor x, Tensor? up, str activation, {_QUANTIZATION}) -> Tensor[]"
)
_library.define("quantize_per_channel(Tensor w, int rotation=0) -> (Tensor, Tensor)")
_library.define("tensor_scale(Tensor x, Tensor? smooth) -> Tensor")
_library.define("dequantize(Tensor q, Tensor s, ScalarType out_dtype) -> Tensor")
_library.define("dequantize.out(Tensor q, Tensor s, Tensor(a!) out) -> ()")
_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, SymInt window_left, "
    "SymInt window_right, float softcap, Tensor? alibi_slopes, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
)
_library.define(f"flash_attention({_ATTENTION}) -> (Tensor, Tensor)")
_library.define(f"flash_attention.out({_ATTENTION}, Tensor(a!) out) -> Tensor")
_DECODE_OPTIONS = (
    "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
    "Tensor? alibi_slopes"
)
_DECODE = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, "
    f"Tensor? k_scale, Tensor? v_scale, {_DECODE_OPTIONS}"
)
_library.define(f"flash_decode({_DECODE}) -> (Tensor, Tensor)")
_library.define(f"flash_decode.out({_DECODE}, Tensor(a!) out) -> Tensor")
_APPEND_DECODE = (
    "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? block_table, "
    f"Tensor(c!)? k_scale, Tensor(d!)? v_scale, {_DECODE_OPTIONS}, Tensor k, Tensor v, "
    "Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved"
)
_library.define(f"flash_decode.append({_APPEND_DECODE}) -> (Tensor, Tensor)")
_library.define(f"flash_decode.append_out({_APPEND_DECODE}, Tensor(e!) out) -> Tensor")
_APPEND = (
    "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, "
    "Tensor? block_table, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? rotary_cos, "
    "Tensor? rotary_sin, bool rotary_interleaved"
)
_library.define(f"kv_append({_APPEND}) -> ()")
_library.define(f"kv_append.rotate({_APPEND}, Tensor q) -> Tensor")
_library.define(f"kv_append.rotate_out({_APPEND}, Tensor q, Tensor(e!) out) -> ()")
_LLM_INT8 = (
    "Tensor x, Tensor w, Tensor sw, float threshold, Tensor? bias, Tensor? outlier_columns, "
    "Tensor? outlier_weight, bool w_is_constant"
)
_library.define(f"llm_int8_matmul({_LLM_INT8}, ScalarType out_dtype) -> Tensor")
_library.define(
    f"llm_int8_matmul.out({_LLM_INT8}, Tensor(a!) out, Tensor(b!)? outlier_count) -> ()"
)


def gemm_shape(a: Tensor, b: Tensor, packed_shape: Any) -> tuple[int, ...]:
    if a.dim() < 2:
        raise ValueError(f"int8_gemm: a has shape {tuple(a.shape)}, expected (..., M, K)")
    if packed_shape is None and b.dim() != 2:
        raise ValueError(f"int8_gemm: b has shape {tuple(b.shape)}, expected (K, N)")
    n = b.shape[1] if packed_shape is None else packed_shape[1]
    return (*a.shape[:-1], n)


def _int8_gemm_out(
    a,
    b,
    sa,
    sb,
    bias,
    packed_shape,
    b_is_constant,
    out,
    residual=None,
    activation=None,
    zero_point=None,
    column_sums=None,
    out_scale=None,
):
    options = (residual, activation, zero_point, column_sums, out_scale)
    _core.int8_gemm(a, b, sa, sb, bias, out, packed_shape, b_is_constant, *options)


def _int8_gemm(a, b, sa, sb, bias, out_dtype, packed_shape, b_is_constant, *options):
    out = torch.empty(gemm_shape(a, b, packed_shape), dtype=out_dtype, device=a.device)
    _int8_gemm_out(a, b, sa, sb, bias, packed_shape, b_is_constant, out, *options)
    return out


def _int8_gemm_fake(a, b, sa, sb, bias, out_dtype, packed_shape, b_is_constant, *options):
    k = b.shape[0] if packed_shape is None else packed_shape[0]
    shape = gemm_shape(a, b, packed_shape)
    torch._check_value(
        a.shape[-1] == k, lambda: f"int8_gemm: a has shape {tuple(a.shape)}, expected K = {k}"
    )
    return a.new_empty(shape, dtype=out_dtype)


def quantize_per_token_kernel(x, rotation=0):
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    s = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    _core.quantize_per_token(x, q, s, rotation, None, None, False)
    return q, s


def quantize_per_channel_kernel(w, rotation=0):
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    s = torch.empty(w.shape[:-1], dtype=torch.float32, device=w.device)
    _core.quantize_per_channel(w, q, s, rotation)
    return q, s


def _quantize(entry, x, options, *arguments, residual_out=None):
    """Calls a native op that quantises; what it writes, as the schemas say."""
    smooth, rotation, scale, zero_point, asymmetric = options
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    written = [q]
    is_static = scale is not None
    if not is_static:
        scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        written.append(scale)
        if asymmetric:
            zero_point = torch.empty(scale.shape, dtype=torch.int32, device=x.device)
            written.append(zero_point)
    entry(x, q, scale, rotation, smooth, zero_point, is_static, *arguments)
    if residual_out is not None:
        written.append(residual_out)
    return written


def _quantize_fake(x, options, residual=None):
    _, _, scale, _, asymmetric = options
    dtypes = [torch.int8]
    if scale is None:
        dtypes += [torch.float32, torch.int32] if asymmetric else [torch.float32]
    written = [
        x.new_empty(x.shape if i == 0 else (*x.shape[:-1], 1), dtype=dtype)
        for i, dtype in enumerate(dtypes)
    ]
    return written if residual is None else [*written, x.new_empty(x.shape)]


def quantize_per_token_options_kernel(x, *options):
    return _quantize(_core.quantize_per_token, x, options)


def _quantize_per_token_options_fake(x, *options):
    return _quantize_fake(x, options)


def norm_quant_kernel(x, weight, bias, residual, norm, eps, *options):
    out = None
    if residual is not None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments = (weight, bias, residual, out, norm, eps)
    return _quantize(_core.norm_quant, x, options, *arguments, residual_out=out)


def _norm_quant_fake(x, weight, bias, residual, norm, eps, *options):
    return _quantize_fake(x, options, residual)


def activation_quant_kernel(x, up, activation, *options):
    return _quantize(_core.activation_quant, x, options, up, activation)


def _activation_quant_fake(x, up, activation, *options):
    return _quantize_fake(x, options)


def _quantize_per_token_fake(x, rotation=0):
    q = x.new_empty(x.shape, dtype=torch.int8)
    return q, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _quantize_per_channel_fake(w, rotation=0):
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(w.shape[:-1], dtype=torch.float32)


def dequantize_kernel(q, s, out_dtype):
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    _core.dequantize(q, s, out)
    return out


def dequantize_out_kernel(q, s, out):
    _core.dequantize(q, s, out)


def _dequantize_fake(q, s, out_dtype):
    return q.new_empty(q.shape, dtype=out_dtype)


def _lse_shape(q):
    return (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])


def _check_attention(q, cu_seqlens_q):
    rank = 4 if cu_seqlens_q is None else 3
    if q.dim() != rank:
        wanted = "(batch, seqlen, heads, head_dim)" if rank == 4 else "(total, heads, head_dim)"
        raise ValueError(f"flash_attention: q has shape {tuple(q.shape)}, expected {wanted}")


def flash_attention_out_kernel(q, k, v, *rest):
    *options, out = rest
    _check_attention(q, options[6])
    lse = torch.empty(_lse_shape(q), dtype=torch.float32, device=q.device)
    _core.flash_attention(q, k, v, out, lse, *options)
    return lse


def flash_attention_kernel(q, k, v, *options):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, flash_attention_out_kernel(q, k, v, *options, out)


def _flash_attention_out_fake(q, k, v, *rest):
    _check_attention(q, rest[6])
    return q.new_empty(_lse_shape(q), dtype=torch.float32)


def _flash_attention_fake(q, k, v, *options):
    _check_attention(q, options[6])
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q), dtype=torch.float32)


def _check_decode(q):
    if q.dim() != 4:
        raise ValueError(
            f"flash_decode: q has shape {tuple(q.shape)}, expected (batch, seqlen, heads, head_dim)"
        )


def flash_decode_append_out_kernel(q, k_cache, v_cache, cache_seqlens, *rest):
    *options, out = rest
    _check_decode(q)
    lse = torch.empty(_lse_shape(q), dtype=torch.float32, device=q.device)
    _core.flash_decode(q, k_cache, v_cache, cache_seqlens, out, lse, *options)
    return lse


def flash_decode_append_kernel(q, *rest):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, flash_decode_append_out_kernel(q, *rest, out)


def flash_decode_out_kernel(*arguments):
    *options, out = arguments
    return flash_decode_append_out_kernel(*options, None, None, None, None, False, out)


def flash_decode_kernel(q, *rest):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, flash_decode_out_kernel(q, *rest, out)


def _flash_decode_out_fake(q, *rest):
    _check_decode(q)
    return q.new_empty(_lse_shape(q), dtype=torch.float32)


def _flash_decode_fake(q, *rest):
    _check_decode(q)
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q), dtype=torch.float32)


def kv_append_kernel(*arguments):
    _core.kv_append(*arguments, None, None)


def kv_append_rotate_kernel(*arguments):
    q = arguments[-1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _core.kv_append(*arguments, out)
    return out


def kv_append_rotate_out_kernel(*arguments):
    _core.kv_append(*arguments)


def _kv_append_rotate_fake(*arguments):
    q = arguments[-1]
    return q.new_empty(q.shape)


def llm_int8_shape(x, w):
    """The output's shape."""
    if w.dim() != 2:
        raise ValueError(f"llm_int8_matmul: w has shape {tuple(w.shape)}, expected (N, K)")
    if x.dim() < 2:
        raise ValueError(f"llm_int8_matmul: x has shape {tuple(x.shape)}, expected (..., M, K)")
    return (*x.shape[:-1], w.shape[0])


def _check_llm_int8(x, w, sw, columns, kept):
    """Raises where the library would name its own operands, b (K, N) and sb, or transpose one."""
    op = "llm_int8_matmul"
    llm_int8_shape(x, w)
    n, k = w.shape
    if w.dtype != torch.int8:
        raise TypeError(f"{op}: w has dtype {str(w.dtype).removeprefix('torch.')}, expected int8")
    if sw.dtype != torch.float32:
        name = str(sw.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: sw has dtype {name}, expected float32")
    for name, tensor in (("w", w), ("sw", sw)):
        if tensor.device != x.device:
            raise TypeError(f"{op}: {name} is on {tensor.device}, expected {x.device} as x is")
    torch._check_value(
        x.shape[-1] == k,
        lambda: (
            f"{op}: x has shape {tuple(x.shape)} and w {tuple(w.shape)}; expected x "
            "(..., M, K) and w (N, K), a linear layer's weight"
        ),
    )
    if sw.numel() != 1 and tuple(sw.shape) not in ((n,), (1, n)):
        raise ValueError(
            f"{op}: sw has shape {tuple(sw.shape)}, expected a scalar, ({n},) or (1, {n}) with "
            f"N = {n}"
        )
    if columns is not None and kept is not None and columns.dim() == 1:
        wanted = (n, columns.shape[0])
        if tuple(kept.shape) != wanted:
            raise ValueError(
                f"{op}: outlier_weight has shape {tuple(kept.shape)}, expected {wanted}, (N, C)"
            )


def llm_int8_matmul_out_kernel(
    x, w, sw, threshold, bias, columns, kept, w_is_constant, out, outlier_count
):
    if x.dim() > 2 and not x.is_contiguous():
        # The library wants one stride for all rows; this copies where there is none.
        x = x.flatten(0, -2).view(x.shape)
    rest = (threshold, bias, columns, kept, w_is_constant, out, outlier_count)
    try:
        _core.llm_int8_matmul(x, w, sw, *rest)
    except (TypeError, ValueError):
        _check_llm_int8(x, w, sw, columns, kept)
        raise


def llm_int8_matmul_kernel(x, w, *rest):
    *options, out_dtype = rest
    out = torch.empty(llm_int8_shape(x, w), dtype=out_dtype, device=x.device)
    llm_int8_matmul_out_kernel(x, w, *options, out, None)
    return out


def _llm_int8_matmul_out_fake(x, w, sw, threshold, bias, columns, kept, *rest):
    _check_llm_int8(x, w, sw, columns, kept)


def _llm_int8_matmul_fake(x, w, *rest):
    *options, out_dtype = rest
    _llm_int8_matmul_out_fake(x, w, *options)
    return x.new_empty(llm_int8_shape(x, w), dtype=out_dtype)


_LEAST_SCALE = torch.finfo(torch.float32).tiny  # what a scale never falls below


def _tensor_scale(x: Tensor, smooth: Tensor | None) -> Tensor:
    """absmax(x / smooth) / 127 as a float32 scalar on x's device: 1 where all is 0, and NaN or Inf
    where x holds one, so that all that is quantised by it becomes NaN or Inf. An op, so that
    torch.compile takes it from the x that is quantised, and not from one before its rounding."""
    if x.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=x.device)
    if smooth is None:
        absmax = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    else:  # rounding is monotonic: the largest of a column stays the largest when divided
        rows = x.reshape(-1, x.shape[-1])
        columns = torch.linalg.vector_norm(rows, float("inf"), dim=0, dtype=torch.float32)
        absmax = (columns * (1 / smooth)).amax()
    return torch.where(absmax == 0, 1.0, (absmax / 127).clamp(min=_LEAST_SCALE))


def _tensor_scale_fake(x, smooth):
    return x.new_empty((), dtype=torch.float32)


# One registration serves every device: the native library itself tells the devices apart. There
# are no autograd kernels on purpose: they would cost microseconds a call.
for _name, _kernel, _fake in (
    ("int8_gemm", _int8_gemm, _int8_gemm_fake),
    ("int8_gemm.out", _int8_gemm_out, lambda *args: None),
    ("quantize_per_token", quantize_per_token_kernel, _quantize_per_token_fake),
    (
        "quantize_per_token.options",
        quantize_per_token_options_kernel,
        _quantize_per_token_options_fake,
    ),
    ("norm_quant", norm_quant_kernel, _norm_quant_fake),
    ("activation_quant", activation_quant_kernel, _activation_quant_fake),
    ("quantize_per_channel", quantize_per_channel_kernel, _quantize_per_channel_fake),
    ("tensor_scale", _tensor_scale, _tensor_scale_fake),
    ("dequantize", dequantize_kernel, _dequantize_fake),
    ("dequantize.out", dequantize_out_kernel, lambda *args: None),
    ("flash_attention", flash_attention_kernel, _flash_attention_fake),
    ("flash_attention.out", flash_attention_out_kernel, _flash_attention_out_fake),
    ("flash_decode", flash_decode_kernel, _flash_decode_fake),
    ("flash_decode.out", flash_decode_out_kernel, _flash_decode_out_fake),
    ("flash_decode.append", flash_decode_append_kernel, _flash_decode_fake),
    ("flash_decode.append_out", flash_decode_append_out_kernel, _flash_decode_out_fake),
    ("kv_append", kv_append_kernel, lambda *args: None),
    ("kv_append.rotate", kv_append_rotate_kernel, _kv_append_rotate_fake),
    ("kv_append.rotate_out", kv_append_rotate_out_kernel, lambda *args: None),
    ("llm_int8_matmul", llm_int8_matmul_kernel, _llm_int8_matmul_fake),
    ("llm_int8_matmul.out", llm_int8_matmul_out_kernel, _llm_int8_matmul_out_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastq::{_name}", _fake, lib=_library)

int8_gemm_op = torch.ops.fastq.int8_gemm.default
tensor_scale_op = torch.ops.fastq.tensor_scale.default
int8_gemm_out_op = torch.ops.fastq.int8_gemm.out
quantize_per_token_op = torch.ops.fastq.quantize_per_token.default
quantize_per_token_options_op = torch.ops.fastq.quantize_per_token.options
norm_quant_op = torch.ops.fastq.norm_quant.default
activation_quant_op = torch.ops.fastq.activation_quant.default
quantize_per_channel_op = torch.ops.fastq.quantize_per_channel.default
dequantize_op = torch.ops.fastq.dequantize.default
dequantize_out_op = torch.ops.fastq.dequantize.out
flash_attention_op = torch.ops.fastq.flash_attention.default
flash_attention_out_op = torch.ops.fastq.flash_attention.out
flash_decode_op = torch.ops.fastq.flash_decode.default
flash_decode_out_op = torch.ops.fastq.flash_decode.out
flash_decode_append_op = torch.ops.fastq.flash_decode.append
flash_decode_append_out_op = torch.ops.fastq.flash_decode.append_out
kv_append_op = torch.ops.fastq.kv_append.default
kv_append_rotate_op = torch.ops.fastq.kv_append.rotate
kv_append_rotate_out_op = torch.ops.fastq.kv_append.rotate_out
llm_int8_matmul_op = torch.ops.fastq.llm_int8_matmul.default
llm_int8_matmul_out_op = torch.ops.fastq.llm_int8_matmul.out
