"""The gradient of a linear layer's input through its frozen INT8 weight, as for LoRA adapters.

The weight (N, K) is never whole in 16 bits: a few of its columns at a time are dequantised into one
buffer, and each part of the product is a part of the result, so that nothing is accumulated::

    dx[:, k] = dy @ round_to(dy.dtype, f32(w[:, k]) * sw[:, None])

Rounding is straight through: this is the gradient of the dequantised layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..torch_library import dequantize_out_kernel

# Of one part of the weight in the compute dtype: an eighth of it, or this where that is more.
_LEAST_BYTES = 4 << 20
_COLUMNS = 64  # a part is a multiple of this, and so of any rotation


def columns_at_a_time(n: int, k: int, itemsize: int) -> int:
    """How many of a weight's columns are dequantised at a time."""
    columns = max(k // 8, _LEAST_BYTES // max(n * itemsize, 1))
    return min(max(columns // _COLUMNS * _COLUMNS, _COLUMNS), k)


def hadamard(order: int, like: Tensor) -> Tensor:
    """Sylvester's matrix, entries +-1, in the dtype and on the device of a tensor."""
    h = like.new_ones(1, 1)
    while h.shape[0] < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def _linear_input_gradient(
    dy: Tensor,
    w: Tensor,
    sw: Tensor,
    columns: Tensor | None,
    kept: Tensor | None,
    smooth: Tensor | None,
    rotation: int,
) -> Tensor:
    n, k = w.shape
    rows = dy.reshape(math.prod(dy.shape[:-1]), n)
    dx = rows.new_empty(rows.shape[0], k)
    step = max(columns_at_a_time(n, k, dy.element_size()), 1)
    part = rows.new_empty(n, step)
    h = hadamard(rotation, dx) if rotation != 0 else None
    with torch.autocast(dy.device.type, enabled=False):
        for start in range(0, k, step):
            stop = min(start + step, k)
            weight = part[:, : stop - start]
            dequantize_out_kernel(w[:, start:stop], sw, weight)
            if h is None:
                torch.mm(rows, weight, out=dx[:, start:stop])
            else:  # x was multiplied by H, which is symmetric
                rotated = torch.mm(rows, weight).view(-1, rotation)
                dx[:, start:stop] = torch.mm(rotated, h).view(-1, stop - start)
        if columns is not None:
            dx.index_copy_(1, columns.long(), torch.mm(rows, kept.to(dy.dtype)))
    if smooth is not None:
        dx *= 1 / smooth
    return dx.view(*dy.shape[:-1], k)


def _linear_input_gradient_fake(dy, w, sw, columns, kept, smooth, rotation):
    return dy.new_empty(*dy.shape[:-1], w.shape[1])


# An op of its own, so that torch.compile keeps it as it stands: a compiler would see the parts as
# one product and might hold them all at once.
_library = torch.library.Library("fastq", "FRAGMENT")
_library.define(
    "linear_input_gradient(Tensor dy, Tensor w, Tensor sw, Tensor? columns, Tensor? kept, "
    "Tensor? smooth, int rotation) -> Tensor"
)
_library.impl("linear_input_gradient", _linear_input_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastq::linear_input_gradient", _linear_input_gradient_fake, lib=_library
)
_op = torch.ops.fastq.linear_input_gradient.default


def linear_input_gradient(
    dy: Tensor,
    w: Tensor,
    sw: Tensor,
    *,
    outlier_columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    smooth: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    """``dy @ (w * sw[:, None])``, without the whole weight in dy's dtype.

    At any time an eighth of it is there, or 4 MiB where that is more.

    Args:
        dy: float32, float16 or bfloat16 ``(..., N)``, the gradient of the layer's output.
        w: int8 ``(N, K)``.
        sw: float32 ``(N,)``.
        outlier_columns, outlier_weight: int32 ``(C,)`` and float ``(N, C)``: columns whose gradient
            is by these weights instead.
        smooth, rotation: how x was divided and rotated before it was quantised, as in
            :func:`fastq.quantize_per_token`; the gradient is that of x itself.

    Returns:
        ``(..., K)`` in dy's dtype.
    """
    return _op(dy, w, sw, outlier_columns, outlier_weight, smooth, rotation)


class _ThroughFrozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, product, w, sw, columns, kept, smooth, rotation):
        ctx.save_for_backward(w, sw, columns, kept, smooth)
        ctx.rotation = rotation
        return product(x)

    @staticmethod
    def backward(ctx, dy):
        return _op(dy, *ctx.saved_tensors, ctx.rotation), *(None,) * 7


def with_input_gradient(
    product: Callable[[Tensor], Tensor],
    x: Tensor,
    w: Tensor,
    sw: Tensor,
    *,
    outlier_columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    smooth: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    """``product(x)``, whose gradient for x is :func:`linear_input_gradient`; nothing else gets one.

    For the backward pass it keeps the tensors given here, and none of x's size.
    """
    kept = (outlier_columns, outlier_weight)
    return _ThroughFrozen.apply(x, product, w, sw, *kept, smooth, rotation)
