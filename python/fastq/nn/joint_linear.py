"""Quantised linear layers that read one input, as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import PackedWeight, int8_gemm, pack_weight
from .int8_linear import Int8Linear
from .outlier_linear import OutlierLinear, outlier_product, padded_rows


class JointLinear:
    """The product of several :class:`Int8Linear` layers with their common, quantised input.

    Their weights, scales and biases lie one below the other here, and the layers' own become views
    of them; on a CPU the layers share one packed weight, which a layer that is called by itself
    leaves again. So everything is in memory once, and the layers can be saved, loaded and moved as
    before: :meth:`is_current` tells whether one has got other tensors since.

    Args:
        linears: of one in_features, device and scheme, without rotation and smooth; with
            "w8a8_static" of one input_scale (see :func:`why_not_joint`).

    Attributes:
        sizes: the layers' out_features, N their sum.
        weight: int8 ``(K, N)`` or packed, as :func:`fastq.int8_gemm` takes it.
        weight_scale: float32 ``(N,)``.
        bias: float32 ``(N,)``, zeros for a layer without; None where no layer has one.
        input_scale: float32 scalar with "w8a8_static", else None.
    """

    weight: Tensor | PackedWeight

    def __init__(self, linears: Sequence[Int8Linear]) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.input_scale = linears[0].input_scale
        # Tensors made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.weight_scale = _join([linear.weight_scale for linear in linears])
            self.bias = _joint_bias(linears)
            if self.weight_scale.device.type == "cpu":
                self.weight = _joint_packed(linears)
            else:
                self.weight = _join([linear.weight for linear in linears]).t()
            self._share(linears)
        names = ("weight", "_packed", "weight_scale", "bias", "input_scale")
        self._expected = _buffers(linears, names)

    def _share(self, linears: Sequence[Int8Linear]) -> None:
        start = 0
        for linear, size in zip(linears, self.sizes, strict=True):
            rows = slice(start, start + size)
            tensors: dict[str, Tensor | None] = {"weight_scale": self.weight_scale[rows]}
            if linear.bias is not None:
                tensors["bias"] = self.bias[rows]
            if isinstance(self.weight, PackedWeight):
                linear._packed_columns = (start, self.weight.n) if len(linears) > 1 else None
                tensors |= {"weight": None, "_packed": self.weight.data}
            else:
                tensors["weight"] = self.weight.t()[rows]
            linear._buffers.update(tensors)
            start += size

    def is_current(self) -> bool:
        """Whether every layer still has the tensors that it was joined with. Writing into them in
        place is seen here."""
        return _have_stayed(self._expected)

    def __call__(self, q: Tensor, s: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
        """``(..., N)`` of a dtype for q int8 ``(..., K)`` and s float32 ``(..., 1)`` or a scalar;
        `options` are further ones of :func:`fastq.int8_gemm`."""
        # Constant for the product: q comes from a call of fastq, after whatever wrote the weight.
        return int8_gemm(
            q,
            self.weight,
            s,
            self.weight_scale,
            bias=self.bias,
            b_is_constant=True,
            out_dtype=dtype,
            **options,
        )


def why_not_joint(linears: dict[str, Any]) -> str | None:
    """What keeps these layers, by name, from a :class:`JointLinear`; None where nothing does."""
    first: Int8Linear | None = None
    for name, linear in linears.items():
        if type(linear) is not Int8Linear:
            return f"{name} is a {type(linear).__name__}, expected an Int8Linear"
        if linear.scheme not in ("w8a8", "w8a8_static"):
            return f"{name} has scheme {linear.scheme!r}, expected 'w8a8' or 'w8a8_static'"
        for option in ("rotation", "smooth"):
            if linear._buffers[option] is not None:
                return f"{name} has {option}, expected a layer without"
        if first is None:
            first_name, first = name, linear
        elif linear.scheme != first.scheme:
            return (
                f"{name} has scheme {linear.scheme!r}, expected {first.scheme!r} as {first_name}, "
                "which reads the same input"
            )
        elif linear.weight_scale.device != first.weight_scale.device:
            return f"{name} is on another device than {first_name}"
        elif first.input_scale is not None and not _same_scale(linear, first):
            return (
                f"{name} has input_scale {linear.input_scale.item():g}, expected "
                f"{first.input_scale.item():g} as {first_name}, which reads the same input"
            )
    return None


class JointOutlierLinear:
    """The product of several :class:`OutlierLinear` layers with their common, float input.

    Their weights, scales and biases lie one below the other here, as do the weights of the columns
    that they keep, and the layers' own become views of them: see :class:`JointLinear`. An output is
    equal to the layer's own, because each of them is computed for itself.

    Args:
        linears: of one in_features, device and threshold, with the same kept columns in one dtype
            or without (see :func:`why_not_joint_outliers`).

    Attributes:
        sizes: the layers' out_features, N their sum.
        weight: int8 ``(N, K)``, its rows padded as :class:`OutlierLinear` has them.
        weight_scale: float32 ``(N,)``.
        bias: float32 ``(N,)``, zeros for a layer without; None where no layer has one.
        threshold: from which magnitude on an activation is an outlier.
        outlier_columns: int32 ``(C,)`` or None.
        outlier_weight: ``(N, C)`` or None.
    """

    def __init__(self, linears: Sequence[OutlierLinear]) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.threshold = linears[0].threshold
        self.outlier_columns = linears[0].outlier_columns
        self.outlier_weight: Tensor | None = None
        with torch.inference_mode(False), torch.no_grad():
            self.weight = padded_rows(_join([linear.weight for linear in linears]))
            self.weight_scale = _join([linear.weight_scale for linear in linears])
            self.bias = _joint_bias(linears)
            if self.outlier_columns is not None:
                self.outlier_weight = _join([linear.outlier_weight for linear in linears])
            self._share(linears)
        names = ("weight", "weight_scale", "bias", "outlier_columns", "outlier_weight")
        self._expected = _buffers(linears, names)
        self._linears = list(linears)

    def _share(self, linears: Sequence[OutlierLinear]) -> None:
        start = 0
        for linear, size in zip(linears, self.sizes, strict=True):
            rows = slice(start, start + size)
            # The columns stay each layer's own: a view of all of another's cannot be saved.
            for name in ("weight", "weight_scale", "bias", "outlier_weight"):
                if linear._buffers[name] is not None:
                    linear._buffers[name] = getattr(self, name)[rows]
            start += size

    def is_current(self) -> bool:
        """Whether every layer still has the tensors and the threshold that it was joined with.
        Writing into weights, scales and biases in place is seen here."""
        return _have_stayed(self._expected) and all(
            linear.threshold == self.threshold for linear in self._linears
        )

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., N)`` in the dtype of x, ``(..., M, K)`` float32, float16 or bfloat16."""
        return outlier_product(x, self)


def why_not_joint_outliers(linears: dict[str, Any]) -> str | None:
    """What keeps these layers, by name, from a :class:`JointOutlierLinear`; None where nothing
    does."""
    first: OutlierLinear | None = None
    for name, linear in linears.items():
        if type(linear) is not OutlierLinear:
            return f"{name} is a {type(linear).__name__}, expected an OutlierLinear"
        if first is None:
            first_name, first = name, linear
        elif linear.weight_scale.device != first.weight_scale.device:
            return f"{name} is on another device than {first_name}"
        elif linear.threshold != first.threshold:
            return (
                f"{name} has threshold {linear.threshold:g}, expected {first.threshold:g} as "
                f"{first_name}, which reads the same input"
            )
        elif not _keep_alike(linear, first):
            return f"{name} keeps other columns than {first_name}, which reads the same input"
    return None


def _keep_alike(linear: OutlierLinear, other: OutlierLinear) -> bool:
    if linear.outlier_columns is None or other.outlier_columns is None:
        return linear.outlier_columns is other.outlier_columns
    return linear.outlier_weight.dtype == other.outlier_weight.dtype and torch.equal(
        linear.outlier_columns, other.outlier_columns
    )


def _buffers(
    linears: Sequence[nn.Module], names: Sequence[str]
) -> list[tuple[dict[str, Tensor | None], str, Tensor | None]]:
    """Where the layers keep their tensors, and which they are."""
    return [(linear._buffers, name, linear._buffers[name]) for linear in linears for name in names]


def _have_stayed(expected: list[tuple[dict[str, Tensor | None], str, Tensor | None]]) -> bool:
    return all(buffers.get(name) is tensor for buffers, name, tensor in expected)


def _same_scale(linear: Int8Linear, other: Int8Linear) -> bool:
    return bool(torch.equal(linear.input_scale, other.input_scale))


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _joint_bias(linears: Sequence[Int8Linear | OutlierLinear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return _join(
        [
            torch.zeros_like(linear.weight_scale) if linear.bias is None else linear.bias
            for linear in linears
        ]
    )


def _joint_packed(linears: Sequence[Int8Linear]) -> PackedWeight:
    first = linears[0]
    columns = sum(linear.out_features for linear in linears)
    if len(linears) == 1 and first._packed_columns is None:
        data = first.pack()._packed
    else:
        data = pack_weight(_join([linear.weight for linear in linears]).t()).data
    return PackedWeight(data, first.in_features, columns)
