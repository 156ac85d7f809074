"""Linear layers in INT8 with the activations' outliers apart: LLM.int8()."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..llm_int8 import llm_int8_matmul
from ..quantize_ops import quantize_per_channel
from .frozen_linear import FrozenLinear, autocast, check_linear, needs_gradient
from .input_gradient import with_input_gradient

_ROW_BYTES = 16  # what the CUDA kernels want rows to begin at multiples of


def padded_rows(weight: Tensor) -> Tensor:
    """An int8 ``(N, K)`` weight with rows that begin at multiples of 16 bytes; itself, if they do.

    The shape stays, only the stride grows.
    """
    n, k = weight.shape
    if weight.stride(1) == 1 and weight.stride(0) % _ROW_BYTES == 0:
        return weight
    # A tensor made in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        rows = weight.new_zeros(n, -(-k // _ROW_BYTES) * _ROW_BYTES)[:, :k]
        return rows.copy_(weight)


def check_threshold(module: str, threshold: Any) -> float:
    if not isinstance(threshold, (int, float)):
        kind = type(threshold).__name__
        raise TypeError(f"{module}: threshold is a {kind}, expected a number")
    if not threshold >= 0:
        raise ValueError(f"{module}: threshold is {threshold}, expected 0 (no outliers) or more")
    return float(threshold)


def outlier_product(x: Tensor, layer: Any) -> Tensor:
    """x ``(..., M, K)`` by the weight of an OutlierLinear, or of several joined."""
    return llm_int8_matmul(
        x,
        layer.weight,
        layer.weight_scale,
        threshold=layer.threshold,
        bias=layer.bias,
        outlier_columns=layer.outlier_columns,
        outlier_weight=layer.outlier_weight,
        # Constant for the product: x is quantised between it and whatever wrote the weight.
        w_is_constant=True,
    )


class OutlierLinear(FrozenLinear):
    """``nn.Linear`` by LLM.int8(): W8A8, but for activations of magnitude ``threshold`` or more.

    ``y = llm_int8_matmul(x, weight, weight_scale, threshold=threshold, bias=bias, ...)``, in x's
    dtype or autocast's: see :func:`fastq.llm_int8_matmul`. Outliers are found in each call, without
    calibration; they are multiplied by the INT8 weight in float, or by the weight's own columns
    where those were kept.

    The weight is frozen. An x that requires grad gets the gradient of the layer with its weight
    dequantised (and the kept columns as they are), of which an eighth at most is held at a time;
    all rounding is straight through.

    Where in_features is not a multiple of 16, the rows are held with padding between them, which
    the CUDA kernels read faster. The state dict has none.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        threshold: from which magnitude on an activation is an outlier; 0 for none.
        device: where the buffers go.

    Attributes:
        weight: int8 ``(out_features, in_features)``.
        weight_scale: float32 ``(out_features,)``.
        bias: float32 ``(out_features,)`` or None.
        outlier_columns: int32 ``(C,)``, ascending: columns whose weights were kept, or None.
        outlier_weight: ``(out_features, C)`` in the linear layer's dtype: those, or None.
            ``.half()`` and ``.to(dtype)`` leave it, scale and bias in their dtypes. A state dict
            that loads brings its own columns, or none.

    Source: LLM.int8() (Dettmers et al., 2022).
    """

    outlier_columns: Tensor | None
    outlier_weight: Tensor | None
    _exact = ("weight_scale", "bias", "outlier_weight")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = 6.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device)
        self.threshold = check_threshold("OutlierLinear", threshold)
        self.register_buffer("outlier_columns", None)
        self.register_buffer("outlier_weight", None)
        self._pad()

    @classmethod
    @torch.no_grad()
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        threshold: float = 6.0,
        keep_outlier_weights: bool = False,
        outlier_columns: Tensor | Sequence[int] | None = None,
    ) -> OutlierLinear:
        """Quantises a linear layer's weight per channel, on the device where it lies.

        Args:
            linear: of float32, float16 or bfloat16.
            threshold: not negative.
            keep_outlier_weights: keep the given columns of the weight as they are, too. It needs
                outlier_columns.
            outlier_columns: distinct columns, such as :meth:`find_outlier_columns` gives.

        Raises:
            TypeError: not an ``nn.Linear``, or of another dtype; columns that are not integers.
            ValueError: a threshold or columns that are not among the above.
        """
        check_linear("OutlierLinear", linear)
        if keep_outlier_weights != (outlier_columns is not None):
            raise ValueError(
                "OutlierLinear: keep_outlier_weights=True and outlier_columns need each other; "
                "OutlierLinear.find_outlier_columns(x) finds the columns of activations"
            )
        sizes = (linear.in_features, linear.out_features)
        module = cls(*sizes, linear.bias is not None, threshold=threshold, device="meta")
        weight = linear.weight.detach()
        if outlier_columns is not None:
            columns = module._checked_columns(outlier_columns).to(weight.device)
            module.outlier_columns = columns
            module.outlier_weight = weight.index_select(1, columns)
        module.weight, module.weight_scale = quantize_per_channel(weight)
        module._pad()
        module._take_bias(linear)
        return module.train(linear.training)

    @staticmethod
    @torch.no_grad()
    def find_outlier_columns(x: Tensor, threshold: float = 6.0) -> Tensor:
        """The features of activations ``(..., K)`` that hold an outlier: int32, ascending."""
        check_threshold("find_outlier_columns", threshold)
        found = (x.detach().reshape(-1, x.shape[-1]).abs() >= threshold).any(0)
        return found.nonzero().flatten().to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` float32, float16 or bfloat16 to ``(..., out_features)``.

        Raises:
            TypeError: another dtype, or another device than the weight's.
            ValueError: another last size.
        """
        self._check(x)
        x = autocast(x)
        if not torch.compiler.is_compiling():
            self._pad()  # a weight that was assigned
        if not needs_gradient(x):
            return self._product(x)
        return with_input_gradient(
            self._product,
            x,
            self.weight,
            self.weight_scale,
            outlier_columns=self.outlier_columns,
            outlier_weight=self.outlier_weight,
        )

    def _product(self, x: Tensor) -> Tensor:
        y = outlier_product(x if x.dim() > 1 else x[None], self)
        return y if x.dim() > 1 else y[0]

    def _checked_columns(self, columns: Tensor | Sequence[int]) -> Tensor:
        columns = torch.as_tensor(columns)
        if columns.numel() == 0:
            columns = columns.to(torch.int32)
        if columns.is_floating_point() or columns.dtype == torch.bool:
            raise TypeError(
                f"OutlierLinear: outlier_columns has dtype {columns.dtype}, expected integers"
            )
        ordered = columns.flatten().sort().values
        distinct = ordered.unique().numel() == ordered.numel()
        inside = bool(((ordered >= 0) & (ordered < self.in_features)).all())
        if columns.dim() != 1 or not distinct or not inside:
            raise ValueError(
                f"OutlierLinear: outlier_columns is {columns.tolist()}, expected distinct columns "
                f"from 0 to {self.in_features - 1}"
            )
        return ordered.to(torch.int32)

    def _pad(self) -> None:
        weight = self._buffers["weight"]
        padded = padded_rows(weight)
        if padded is not weight:
            self._buffers["weight"] = padded

    def _apply(self, fn: Any, recurse: bool = True) -> OutlierLinear:
        super()._apply(fn, recurse)
        self._pad()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].contiguous()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        before = (self.outlier_columns, self.outlier_weight)
        names = ("outlier_columns", "outlier_weight")
        columns, kept = (state_dict.get(prefix + name) for name in names)
        if prefix + "weight" in state_dict:
            if not self._fit(columns, kept):
                shapes = [None if t is None else tuple(t.shape) for t in (columns, kept)]
                error_msgs.append(
                    f"OutlierLinear: {prefix}outlier_columns and outlier_weight have shapes "
                    f"{shapes[0]} and {shapes[1]}, expected (C,) and ({self.out_features}, C)"
                )
                return  # with everything as it was
            self._make_room(columns, kept)
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if len(error_msgs) > errors:
            self.outlier_columns, self.outlier_weight = before
        self._pad()

    def _fit(self, columns: Tensor | None, kept: Tensor | None) -> bool:
        if columns is None or kept is None:
            return columns is kept
        return columns.dim() == 1 and kept.shape == (self.out_features, columns.shape[0])

    def _make_room(self, columns: Tensor | None, kept: Tensor | None) -> None:
        """Buffers for the columns of a state: how many there are differs from one to the other."""
        for name, loaded in (("outlier_columns", columns), ("outlier_weight", kept)):
            buffer = None
            if loaded is not None:
                buffer = torch.empty_like(loaded, device=self.weight_scale.device)
            self._buffers[name] = buffer

    def extra_repr(self) -> str:
        columns = self.outlier_columns
        return f"{super().extra_repr()}, scheme=llm_int8, threshold={self.threshold:g}" + (
            f", kept_columns={columns.numel()}" if columns is not None else ""
        )
