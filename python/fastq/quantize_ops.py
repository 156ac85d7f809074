"""The ops that quantise: a tensor as it is, and what comes before an INT8 product in a transformer,
norms and activations, in the same pass over memory.

Symmetric: ``x ~ q * s``; asymmetric: ``x ~ (q - zero_point) * s``. Both are operands of
:func:`fastq.int8_gemm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import check_tensors, is_direct
from .torch_library import (
    activation_quant_kernel,
    activation_quant_op,
    norm_quant_kernel,
    norm_quant_op,
    quantize_per_channel_kernel,
    quantize_per_channel_op,
    quantize_per_token_kernel,
    quantize_per_token_op,
    quantize_per_token_options_kernel,
    quantize_per_token_options_op,
)

_ROTATIONS = (0, 2, 4, 8, 16, 32)
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_SMALLEST, _LARGEST = 2.0**-149, torch.finfo(torch.float32).max


def check_rotation(op: str, rotation: Any) -> None:
    """Raises unless `rotation` is one that :func:`quantize_per_token` takes."""
    if not isinstance(rotation, int):
        raise TypeError(f"{op}: rotation is a {type(rotation).__name__}, expected an int")
    if rotation not in _ROTATIONS:
        raise ValueError(f"{op}: rotation is {rotation}, expected 0, 2, 4, 8, 16 or 32")


def _check_rotation_of(op: str, name: str, x: Tensor, rotation: Any) -> None:
    check_rotation(op, rotation)
    if x.shape[-1] % rotation != 0:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}, expected a last size that is a multiple of "
            f"rotation = {rotation}"
        )


def _static(op: str, x: Tensor, scale: Any, zero_point: Any, asymmetric: bool) -> tuple[Any, Any]:
    """A static scale and zero point as tensors."""
    if zero_point is None and asymmetric:
        raise ValueError(f"{op}: zero_point is missing; with a scale, asymmetric=True needs it")
    if isinstance(scale, (int, float)):
        if not _SMALLEST <= scale <= _LARGEST:
            raise ValueError(f"{op}: scale is {scale}, expected a positive float32 number")
        scale = torch.full((), scale, dtype=torch.float32, device=x.device)
    if isinstance(zero_point, int):
        if not -128 <= zero_point <= 127:
            raise ValueError(f"{op}: zero_point is {zero_point}, expected -128 to 127")
        zero_point = torch.full((), zero_point, dtype=torch.int32, device=x.device)
    return scale, zero_point


def _quantize(
    op: str,
    entries: tuple[Any, Any],
    tensors: dict[str, Any],
    arguments: tuple[Any, ...],
    smooth: Any,
    rotation: Any,
    scale: Any,
    zero_point: Any,
    asymmetric: Any,
) -> tuple[Tensor, ...]:
    """Checks the arguments that all these ops share, and calls one.

    `entries` are its kernel and its torch op, `tensors` all its tensors by name, with None for the
    absent ones: the first is quantised. `arguments` stand before the shared ones.
    """
    (name, x), *_ = tensors.items()
    # What is direct has passed the checks of tensors, which cost as much as the rest.
    direct = x is not None and is_direct(*tensors.values(), smooth, scale, zero_point)
    if not direct:
        check_tensors(op, **{name: x})
        check_tensors(op, **{key: tensor for key, tensor in tensors.items() if tensor is not None})
    if x.dim() < 1:
        raise ValueError(f"{op}: {name} has shape (), expected (..., K)")
    if rotation != 0:
        _check_rotation_of(op, name, x, rotation)
    if not isinstance(asymmetric, bool):
        kind = type(asymmetric).__name__
        raise TypeError(f"{op}: asymmetric is a {kind}, expected a bool")
    if scale is not None:
        scale, zero_point = _static(op, x, scale, zero_point, asymmetric)
    elif zero_point is not None:
        raise ValueError(
            f"{op}: zero_point is given without scale; asymmetric=True finds one for each row"
        )
    if not direct:
        given = {"smooth": smooth, "scale": scale, "zero_point": zero_point}
        check_tensors(op, **{key: tensor for key, tensor in given.items() if tensor is not None})
        direct = is_direct(*tensors.values(), smooth, scale, zero_point)
    q, *rest = entries[0 if direct else 1](
        *arguments, smooth, rotation, scale, zero_point, asymmetric
    )
    if scale is None:
        return (q, *rest)
    return (q, scale, *rest) if zero_point is None else (q, scale, zero_point, *rest)


def quantize_per_token(
    x: Tensor,
    *,
    rotation: int = 0,
    smooth: Tensor | None = None,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    asymmetric: bool = False,
) -> tuple[Tensor, ...]:
    """INT8 quantisation with one scale per token (row of the last dimension).

    Symmetric with dynamic scales, unless told otherwise: ``s = absmax / 127`` (1 for a row of
    zeros), ``q = round_half_even(x / s)`` within +-127. A row with a NaN or an Inf gets that scale
    and ``q = 0``, so what follows shows NaN. All arithmetic is float32, each operation rounded.

    ``smooth`` divides the columns first, ``x[r, c] * (1 / smooth[c])``: multiplied into the weight,
    which is easier to quantise, it leaves the product as it was (SmoothQuant).

    With a rotation R, each R consecutive elements of a row are then replaced by their product with
    the Hadamard matrix of order R (Sylvester's, entries +-1)::

        H[1] = [1],  H[2n] = [[H[n], H[n]], [H[n], -H[n]]]
        x[R*i : R*(i+1)] = x[R*i : R*(i+1)] @ H[R]

    which spreads an outlier over its block, so that it costs the rest of the row less precision.
    ``H @ H == R * I``: where x and w were both rotated, ``x @ w.t()`` is R times what it was, and
    ``s / R`` as the scale of one of them brings the plain product back. Rotated values that
    overflow float32 count as Inf.

    With ``asymmetric=True``, ``x ~ (q - zero_point) * s``, which uses all of q's range where the
    values lie on one side of 0. Of a row's extremes, with 0 among its elements::

        s = high / 255 - low / 255  (1 where both are 0)
        zero_point = clamp(round_half_even(-128 - low / s), -128, 127)
        q = clamp(round_half_even(x / s) + zero_point, -128, 127)

    ``zero_point`` is 0 in a row with a NaN or an Inf.

    With a ``scale`` it is static: that scale serves all rows, ``zero_point`` makes it asymmetric,
    and what is out of range is clamped. A NaN becomes -128; in a symmetric q nothing else does.

    Args:
        x: float32, float16 or bfloat16 ``(..., K)``, any strides.
        rotation: 0 (none), 2, 4, 8, 16 or 32; K is a multiple of it.
        smooth: ``(K,)`` or ``(1, K)``, float32 or x's dtype.
        scale: float32, one element, finite and positive: a static scale.
        zero_point: int32, one element, -128 to 127: of a static scale.
        asymmetric: dynamic zero points; a static call is asymmetric by its ``zero_point``.

    Returns:
        ``(q, s)`` or, where asymmetric, ``(q, s, zero_point)``: ``q`` int8 like x (contiguous),
        ``s`` float32 and ``zero_point`` int32 ``x.shape[:-1] + (1,)``; those given, as tensors,
        where they are static.

    Raises:
        ValueError: a shape, a rotation or a number that is not among the above, a zero_point
            without scale, a scale with ``asymmetric=True`` and without zero_point, or a tensor that
            requires grad.
        TypeError: a dtype, a device, or not a tensor.
        NotImplementedError: this build has no backend for the device.

    Source: ZeroQuant (Yao et al., 2022), token-wise quantisation; SmoothQuant (Xiao et al., 2022),
    smoothing and static scales; QuaRot (Ashkboos et al., 2024), Hadamard rotation, here in blocks.
    """
    op = "quantize_per_token"
    if smooth is not None or scale is not None or zero_point is not None or asymmetric is not False:
        return _quantize(
            op,
            (quantize_per_token_options_kernel, quantize_per_token_options_op),
            {"x": x},
            (x,),
            *(smooth, rotation, scale, zero_point, asymmetric),
        )
    check_tensors(op, x=x)
    if x.dim() < 1:
        raise ValueError("quantize_per_token: x has shape (), expected (..., K)")
    if rotation != 0:
        _check_rotation_of(op, "x", x, rotation)
    return (quantize_per_token_kernel if is_direct(x) else quantize_per_token_op)(x, rotation)


def quantize_per_channel(w: Tensor, *, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 quantisation of a weight with one scale per output channel (row).

    Args:
        w: float32, float16 or bfloat16 ``(N, K)``, any strides, as ``nn.Linear.weight``.
        rotation: of the rows, as in :func:`quantize_per_token`, which rotates x to match: pass
            ``s / rotation`` to :func:`int8_gemm`.

    Returns:
        ``q`` int8 ``(N, K)`` (contiguous) and ``s`` float32 ``(N,)``; ``q.t()`` and ``s`` are what
        :func:`int8_gemm` takes as ``b`` and ``sb``.

    Raises:
        ValueError, TypeError: as :func:`quantize_per_token`.
    """
    check_tensors("quantize_per_channel", w=w)
    if w.dim() != 2:
        raise ValueError(f"quantize_per_channel: w has shape {tuple(w.shape)}, expected (N, K)")
    if rotation != 0:
        _check_rotation_of("quantize_per_channel", "w", w, rotation)
    return (quantize_per_channel_kernel if is_direct(w) else quantize_per_channel_op)(w, rotation)


_NORM_ENTRIES = (norm_quant_kernel, norm_quant_op)


def _norm_quant(
    op: str, x: Any, weight: Any, bias: Any, residual: Any, norm: str, eps: Any, *options: Any
) -> tuple[Tensor, ...]:
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps is a {type(eps).__name__}, expected a float")
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    return _quantize(op, _NORM_ENTRIES, tensors, (*tensors.values(), norm, eps), *options)


def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    smooth: Tensor | None = None,
    rotation: int = 0,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    asymmetric: bool = False,
) -> tuple[Tensor, ...]:
    """RMSNorm of x, or of x + residual, quantised per token::

        h = x, or round_to(x.dtype, x + residual)
        y = h / sqrt(mean(h ** 2) + eps) * weight + bias

    and y, never rounded to x's dtype, is quantised as :func:`quantize_per_token` does it. Means are
    over the last dimension. Float32 throughout; the order of its sums, and so y's last bits, differ
    between devices. A row's bits do not depend on the other rows.

    Args:
        x: float32, float16 or bfloat16 ``(..., K)``, any strides.
        weight: ``(K,)`` or ``(1, K)``, float32 or x's dtype; None stands for ones.
        eps: not negative.
        bias: as weight; None stands for zeros.
        residual: like x, in its dtype, any strides.
        smooth, rotation, scale, zero_point, asymmetric: as in :func:`quantize_per_token`.

    Returns:
        What :func:`quantize_per_token` returns, and after it, with a residual, the new one, ``h``:
        ``(q, s[, zero_point][, h])``.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`quantize_per_token`; a negative eps.
    """
    return _norm_quant(
        *("rms_norm_quant", x, weight, bias, residual, "rms", eps),
        *(smooth, rotation, scale, zero_point, asymmetric),
    )


def layer_norm_quant(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    smooth: Tensor | None = None,
    rotation: int = 0,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    asymmetric: bool = False,
) -> tuple[Tensor, ...]:
    """LayerNorm of x, or of x + residual, quantised per token::

        h = x, or round_to(x.dtype, x + residual)
        d = h - mean(h)
        y = d / sqrt(mean(d ** 2) + eps) * weight + bias

    Arguments, results and errors are those of :func:`rms_norm_quant`.
    """
    return _norm_quant(
        *("layer_norm_quant", x, weight, bias, residual, "layer", eps),
        *(smooth, rotation, scale, zero_point, asymmetric),
    )


_ACTIVATION_ENTRIES = (activation_quant_kernel, activation_quant_op)


def silu_mul_quant(
    gate: Tensor,
    up: Tensor,
    *,
    smooth: Tensor | None = None,
    rotation: int = 0,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    asymmetric: bool = False,
) -> tuple[Tensor, ...]:
    """SwiGLU, quantised per token: ``y = gate / (1 + exp(-gate)) * up``.

    y is float32, never rounded to gate's dtype, and quantised as :func:`quantize_per_token` does
    it. The activation has a relative error below 1e-6; its last bits differ between devices.

    Args:
        gate: float32, float16 or bfloat16 ``(..., K)``, any strides.
        up: like gate, in its dtype, any strides: they may be ``gate, up = x.chunk(2, -1)``.
        smooth, rotation, scale, zero_point, asymmetric: as in :func:`quantize_per_token`.

    Returns:
        What :func:`quantize_per_token` returns: ``(q, s)`` or ``(q, s, zero_point)``.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`quantize_per_token`.
    """
    op = "silu_mul_quant"
    check_tensors(op, gate=gate, up=up)
    return _quantize(
        *(op, _ACTIVATION_ENTRIES, {"gate": gate, "up": up}, (gate, up, "silu")),
        *(smooth, rotation, scale, zero_point, asymmetric),
    )


def gelu_quant(
    x: Tensor,
    *,
    approximate: str = "none",
    up: Tensor | None = None,
    smooth: Tensor | None = None,
    rotation: int = 0,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    asymmetric: bool = False,
) -> tuple[Tensor, ...]:
    """GELU of x, times ``up`` where it is given (GeGLU), quantised per token::

        approximate="none":  y = x * (1 + erf(x / sqrt(2))) / 2
        approximate="tanh":  y = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))) / 2

    All else, errors included, is as in :func:`silu_mul_quant`.
    """
    op = "gelu_quant"
    if not isinstance(approximate, str):
        kind = type(approximate).__name__
        raise TypeError(f"{op}: approximate is a {kind}, expected 'none' or 'tanh'")
    if approximate not in _GELUS:
        raise ValueError(f"{op}: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return _quantize(
        *(op, _ACTIVATION_ENTRIES, {"x": x, "up": up}, (x, up, _GELUS[approximate])),
        *(smooth, rotation, scale, zero_point, asymmetric),
    )


def relu_quant(
    x: Tensor,
    *,
    up: Tensor | None = None,
    smooth: Tensor | None = None,
    rotation: int = 0,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    asymmetric: bool = False,
) -> tuple[Tensor, ...]:
    """ReLU of x, times ``up`` where it is given, quantised per token: ``y = 0 if x < 0 else x``, so
    NaN stays.

    Without ``up`` all y lie on one side of 0, and ``asymmetric=True`` halves the steps. All else,
    errors included, is as in :func:`silu_mul_quant`; y is exact, or rounded once after the product.
    """
    return _quantize(
        *("relu_quant", _ACTIVATION_ENTRIES, {"x": x, "up": up}, (x, up, "relu")),
        *(smooth, rotation, scale, zero_point, asymmetric),
    )
