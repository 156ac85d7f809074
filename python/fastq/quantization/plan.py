"""How one linear layer is quantised, once everything about it is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import Int8Linear, OutlierLinear


@dataclass(frozen=True)
class LinearPlan:
    """What :func:`quantize_linear` makes of one layer.

    Attributes:
        scheme: "w8a8", "w8a8_tensor", "w8a8_static" or "llm_int8".
        rotation: of "w8a8"; see :class:`fastq.nn.Int8Linear`.
        per_tensor_weight: one scale for the whole weight; not of "llm_int8".
        threshold: of "llm_int8".
        outlier_columns: int ``(C,)``, of "llm_int8": columns whose weights are kept, or None.
        input_scale: of "w8a8_static".
        smooth: float32 ``(in_features,)``, or None: the weight is multiplied by it.
        is_folded: whether what stands before the layer divides by smooth already; otherwise the
            quantised layer does.
    """

    scheme: str = "w8a8"
    rotation: int = 0
    per_tensor_weight: bool = False
    threshold: float = 6.0
    outlier_columns: Tensor | None = None
    input_scale: float | None = None
    smooth: Tensor | None = None
    is_folded: bool = False


@torch.no_grad()
def quantize_linear(linear: nn.Linear, plan: LinearPlan) -> Int8Linear | OutlierLinear:
    """A linear layer's quantised form, on the device where it lies; the layer stays as it is."""
    smooth = plan.smooth
    if smooth is not None and plan.is_folded:
        is_int8 = plan.scheme != "llm_int8"
        linear = scaled_linear(linear, smooth, torch.float32 if is_int8 else linear.weight.dtype)
        smooth = None
    if plan.scheme == "llm_int8":
        return OutlierLinear.from_float(
            linear,
            threshold=plan.threshold,
            keep_outlier_weights=plan.outlier_columns is not None,
            outlier_columns=plan.outlier_columns,
        )
    return Int8Linear.from_float(
        linear,
        plan.scheme,
        rotation=plan.rotation,
        input_scale=plan.input_scale,
        smooth=smooth,
        per_tensor_weight=plan.per_tensor_weight,
    )


def scaled_linear(linear: nn.Linear, smooth: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with its weight's columns multiplied, in the dtype; it shares the bias."""
    with torch.device("meta"):
        scaled = nn.Linear(linear.in_features, linear.out_features, bias=False)
    weight = (linear.weight.float() * smooth.to(linear.weight.device)).to(dtype)
    scaled.weight = nn.Parameter(weight, requires_grad=False)
    scaled.bias = linear.bias
    return scaled.train(linear.training)
