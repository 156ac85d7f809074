"""The ops on torch tensors: INT8 GEMM and dequantisation; what is common to all of them.

Each op is a torch custom op (:mod:`fastq.torch_library`), so ``torch.compile`` and CUDA graphs take
it; the functions here check what the native library cannot see (autograd), allocate outputs and
call the op. Scales are float32 multipliers: ``x ~ q * s``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _core
from .torch_library import (
    dequantize_kernel,
    dequantize_op,
    dequantize_out_kernel,
    dequantize_out_op,
    gemm_shape,
    int8_gemm_op,
    int8_gemm_out_op,
)

_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int8)
_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
_is_compiling = torch.compiler.is_compiling
_OPTIONAL_ARGS = frozenset(
    ("sa", "sb", "bias", "out", "residual", "zero_point", "column_sums", "out_scale")
)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PackedWeight(NamedTuple):
    """A CPU weight in the form that its kernels read fastest; see :func:`pack_weight`.

    ``data`` is uint8 ``(bytes,)``; ``k`` and ``n`` are the sizes of the ``(K, N)`` operand.
    """

    data: Tensor
    k: int
    n: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.k, self.n)


# How the native module sees that something stands between a call and its kernel: a mode, a
# transform, a tracer or the profiler. Where this torch lacks one of the probes, every call goes
# through the dispatcher.
with suppress(AttributeError):
    _core.set_mode_probes(
        torch.is_grad_enabled,
        (
            torch._C._len_torch_dispatch_stack,
            torch._C._len_torch_function_stack,
            torch._C._functorch.maybe_current_level,
            torch._C._get_tracing_state,
            torch.autograd._profiler_enabled,
        ),
    )


def is_direct(*tensors: Any) -> bool:
    """Whether the kernel may be called directly: plain tensors without grad, in plain eager mode.

    The dispatcher costs as much as all the rest of a small call (about 4 us), and does nothing for
    such a one.
    """
    return not _is_compiling() and _core.is_direct(*tensors)


def check_tensors(op: str, **tensors: Any) -> None:
    """Every argument is a tensor, and none asks for a gradient that the op would drop."""
    for name, tensor in tensors.items():
        if tensor is None and name in _OPTIONAL_ARGS:
            continue
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"{op}: {name} is a {kind}, expected a torch.Tensor")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} requires grad, and {op} has no gradient; call it under "
                f"torch.no_grad() or pass {name}.detach()"
            )


def check_dtype(op: str, dtype: Any, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: out_dtype is {dtype}, expected one of {names}")


def check_out_dtype(op: str, out: Any, out_dtype: torch.dtype | None) -> None:
    if out_dtype is not None and isinstance(out, Tensor) and out_dtype != out.dtype:
        raise TypeError(f"{op}: out has dtype {out.dtype}, expected out_dtype = {out_dtype}")


def as_scale(value: Tensor | float | None, like: Tensor) -> Tensor | None:
    if isinstance(value, (int, float)) and isinstance(like, Tensor):
        return torch.full((), value, dtype=torch.float32, device=like.device)
    return value


def _gemm_options(
    a: Any,
    b: Any,
    packed_shape: Any,
    residual: Any,
    activation: Any,
    zero_point: Any,
    column_sums: Any,
    out_scale: Any,
) -> tuple[Any, ...]:
    """The last five arguments of the ops, from those of :func:`int8_gemm`."""
    if activation is not None and activation not in _ACTIVATIONS:
        got = repr(activation) if isinstance(activation, str) else f"a {type(activation).__name__}"
        error = ValueError if isinstance(activation, str) else TypeError
        names = ", ".join(_ACTIVATIONS)
        raise error(f"int8_gemm: activation is {got}, expected None or one of {names}")
    if isinstance(zero_point, int) and isinstance(a, Tensor):
        zero_point = torch.full((), zero_point, dtype=torch.int32, device=a.device)
    if zero_point is not None and column_sums is None:
        if packed_shape is not None:
            raise ValueError(
                "int8_gemm: zero_point needs column_sums where b is a PackedWeight; pass "
                "column_sums = b.sum(0, dtype=torch.int32) of the plain b"
            )
        if isinstance(b, Tensor) and b.dim() == 2:
            column_sums = b.sum(0, dtype=torch.int32)
    return residual, activation, zero_point, column_sums, as_scale(out_scale, a)


def int8_gemm(
    a: Tensor,
    b: Tensor | PackedWeight,
    sa: Tensor | float | None,
    sb: Tensor | float | None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    zero_point: Tensor | int | None = None,
    column_sums: Tensor | None = None,
    out_scale: Tensor | float | None = None,
    b_is_constant: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """INT8 matrix product with per-token and per-channel scales, and what follows it in a layer::

        acc = sum_k a[m, k] * b[k, n]  - zero_point[m] * column_sums[n]
        y = (f32(acc) * sa[m]) * sb[n]  + bias[n]
        y = activation(y)  + f32(residual[m, n])
        out[m, n] = round_to(out_dtype, y)
                  | clamp(round_half_even(y / out_scale), -127, 127)  for int8

    The integer sum is exact; all else is float32 in this order, each operation rounded once, so a
    row's bits do not depend on the batch it came in. Only an activation's last bits differ between
    devices (relative error below 1e-6).

    Args:
        a: int8 ``(..., M, K)``, any strides; K at most 131071, with zero_point 65535.
        b: int8 ``(K, N)``, any strides: ``w.t()`` of a weight ``(N, K)`` is the zero-copy fast
            path. Or a :class:`PackedWeight` (CPU).
        sa: float32 scale of a's rows: a scalar, ``a.shape[:-1]``, that plus ``(1,)``, or flat
            ``(M,)`` or ``(M, 1)`` with M the product of the leading dimensions.
        sb: float32 scale of b's columns: a scalar, ``(N,)`` or ``(1, N)``.
        bias: ``(N,)`` or ``(1, N)``, float32 or of a floating ``out_dtype``.
        residual: ``(..., M, N)`` float32, float16 or bfloat16, any strides. It may be ``out``
            itself, which accumulates in place.
        activation: ``"relu"``, ``"gelu"`` (with erf), ``"gelu_tanh"`` or ``"silu"``. relu is
            ``0 if y < 0 else y``, so NaN stays.
        zero_point: int32, shapes as ``sa``, or an int: ``a ~ (q - zero_point) * sa``, for
            asymmetric activations. Within -128 to 127; elsewhere the sums may wrap around.
        column_sums: int32 ``(N,)`` or ``(1, N)``, the sums of b over K, read with zero_point only.
            Without them they are computed at each call; a PackedWeight has to be given them.
        out_scale: float32, one element: the static scale of an int8 output, ``y ~ out * out_scale``
            (SmoothQuant O3). In that output -128 stands for NaN, and for nothing else.
        b_is_constant: a promise that no work which the current CUDA stream has still to do writes
            b, or that a call of fastq follows that work there, such as :func:`quantize_per_token`
            of at least one element; within :func:`settled_weights`, what that says.
            b is then read while the kernel before this one still runs (programmatic dependent
            launch), with few tokens a good part of the time. The bits stay the same.
        out_dtype: bfloat16 (the default), float16, float32, or int8 (the default with out_scale);
            int32 gives the raw sums ``acc`` and takes ``sa=None, sb=None`` and at most zero_point.
        out: ``(..., M, N)`` to write into; its dtype is the output's. No overlap with an input,
            but for a residual that is ``out``.

    Returns:
        ``(..., M, N)`` of ``out_dtype`` on a's device; ``out`` when given.

    Raises:
        ValueError: a shape, a size, an overlap, an unknown activation, an option that the output
            cannot have, or a tensor that requires grad.
        TypeError: a dtype, a device, or not a tensor.
        NotImplementedError: this build has no backend for the device.
    """
    packed_shape = None
    if b.__class__ is PackedWeight:
        b, packed_shape = b.data, b.shape
    if sa.__class__ is not Tensor:
        sa = as_scale(sa, a)
    if sb.__class__ is not Tensor:
        sb = as_scale(sb, a)
    if out is not None and out_dtype is not None:
        check_out_dtype("int8_gemm", out, out_dtype)
    if (
        residual is None
        and activation is None
        and zero_point is None
        and column_sums is None
        and out_scale is None
    ):
        options = ()
        if not _is_compiling():
            got = _core.int8_gemm_direct(
                a, b, sa, sb, bias, out, out_dtype, packed_shape, b_is_constant
            )
            if got is not None:
                return got
    else:
        options = _gemm_options(
            a, b, packed_shape, residual, activation, zero_point, column_sums, out_scale
        )
        if not _is_compiling():
            got = _core.int8_gemm_direct(
                a, b, sa, sb, bias, out, out_dtype, packed_shape, b_is_constant, *options
            )
            if got is not None:
                return got
        residual, _, zero_point, column_sums, out_scale = options
        check_tensors(
            "int8_gemm",
            residual=residual,
            zero_point=zero_point,
            column_sums=column_sums,
            out_scale=out_scale,
        )
    check_tensors("int8_gemm", a=a, b=b, sa=sa, sb=sb, bias=bias, out=out)
    if out is not None:
        int8_gemm_out_op(a, b, sa, sb, bias, packed_shape, b_is_constant, out, *options)
        return out
    if out_dtype is None:
        out_dtype = torch.bfloat16 if out_scale is None else torch.int8
    check_dtype("int8_gemm", out_dtype, _OUT_DTYPES)
    return int8_gemm_op(a, b, sa, sb, bias, out_dtype, packed_shape, b_is_constant, *options)


def describe_int8_gemm(
    a: Tensor,
    b: Tensor | PackedWeight,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    b_is_constant: bool = False,
) -> str:
    """The kernel and configuration that :func:`int8_gemm` takes for these operands.

    For example ``"cpu/amx/packed"``; on Hopper ``b_is_constant`` has a say in it. Raises as
    :func:`int8_gemm` does.
    """
    packed_shape = None
    if isinstance(b, PackedWeight):
        b, packed_shape = b.data, b.shape
    check_tensors("int8_gemm", a=a, b=b)
    out = torch.empty(gemm_shape(a, b, packed_shape), dtype=out_dtype, device=a.device)
    one = None if out_dtype == torch.int32 else torch.ones((), device=a.device)
    out_scale = one if out_dtype == torch.int8 else None
    return _core.int8_gemm_describe(a, b, one, one, out, packed_shape, out_scale, b_is_constant)


def pack_weight(b: Tensor) -> PackedWeight:
    """Rearranges an int8 ``(K, N)`` CPU operand, any strides, for :func:`int8_gemm`.

    The packed form takes about ``K * N`` bytes and serves every instruction set. On CUDA the plain
    form is the fastest and this raises NotImplementedError.
    """
    check_tensors("pack_weight", b=b)
    data = _core.pack_weight(b)
    return PackedWeight(data, b.shape[0], b.shape[1])


def dequantize(
    q: Tensor,
    s: Tensor | float,
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``out[r, c] = round_to(out_dtype, f32(q[r, c]) * s[r])``.

    Args:
        q: int8 ``(..., K)``, any strides.
        s: float32 scale of q's rows: a scalar, ``q.shape[:-1]`` or that plus ``(1,)``.
        out_dtype: bfloat16 (the default), float16 or float32.
        out: like q, to write into; its dtype is the output's.

    Raises:
        ValueError, TypeError: as :func:`int8_gemm`.
    """
    if s.__class__ is not Tensor:
        s = as_scale(s, q)
    check_tensors("dequantize", q=q, s=s, out=out)
    direct = is_direct(q, s, out)
    if q.dim() < 1:
        raise ValueError("dequantize: q has shape (), expected (..., K)")
    if out is not None:
        check_out_dtype("dequantize", out, out_dtype)
        (dequantize_out_kernel if direct else dequantize_out_op)(q, s, out)
        return out
    out_dtype = torch.bfloat16 if out_dtype is None else out_dtype
    check_dtype("dequantize", out_dtype, FLOAT_DTYPES)
    return (dequantize_kernel if direct else dequantize_op)(q, s, out_dtype)


def describe() -> dict[str, Any]:
    """What the library was built with and what it finds; touches the CUDA driver."""
    return json.loads(_core.describe())


@contextmanager
def settled_weights() -> Iterator[None]:
    """A promise for this thread's calls in a ``with``, which are those of one step: when the first
    has its turn in its stream, whatever wrote what they call settled has finished, and nothing
    writes that meanwhile. Settled are

    - the weights that calls say are constant (``b_is_constant``, ``w_is_constant``);
    - of :func:`kv_append` and :func:`flash_decode` the lengths, the block table, the tables of
      sines and cosines, and the cache's tokens but the last seqlen_new or seqlen_q of each
      sequence.

    A model's step keeps it where some kernel of torch's comes first, such as the embedding's. On
    Hopper the small kernels between two products then let their successor start before they
    themselves have waited, so that a product's weight and the cache are read while several kernels
    before still run. The bits stay the same; on a CPU nothing changes. A CUDA graph has what its
    capture had.
    """
    before = _core.set_settled_weights(True)
    try:
        yield
    finally:
        _core.set_settled_weights(before)


def set_num_threads(num_threads: int) -> None:
    """Sets the number of threads that the CPU backend uses, the caller included."""
    _core.set_num_threads(num_threads)


def get_num_threads() -> int:
    """The number of threads that the CPU backend uses, the caller included."""
    return _core.get_num_threads()
