"""``Linear8bitLt`` with the constructor and the state dict of bitsandbytes 0.50."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..llm_int8 import llm_int8_matmul
from ..nn.frozen_linear import autocast, check_input, needs_gradient
from ..nn.input_gradient import with_input_gradient
from ..nn.outlier_linear import check_threshold, padded_rows
from ..quantize_ops import quantize_per_channel

_FORMATS = {0: "row", 1: "col32", 2: "col_turing", 3: "col_ampere"}


class Linear8bitLt(nn.Linear):
    """LLM.int8() as ``bitsandbytes.nn.Linear8bitLt``, by :func:`fastq.llm_int8_matmul`.

    The weight is float until it is quantised: with ``has_fp16_weights=False`` when the module
    leaves the CPU, or in its first call outside of ``torch.compile``. A state dict that holds an
    INT8 weight loads at any time, on any device; one that holds a float weight is quantised as
    above. With ``has_fp16_weights=True`` the weight, and so the state dict, stays float, and each
    call quantises it.

    Differences: weight and bias are frozen in both forms (``requires_grad`` is False; a call where
    it is True raises), while x gets its gradient through the quantised weight. An outlier is an
    element of x and not all of its column; see :func:`fastq.llm_int8_matmul`. A weight is quantised
    from its own dtype, not from float16. It works under ``torch.compile``. There is no ``state``,
    and weight is a plain parameter. A call runs on a CPU only, so far; a module may lie anywhere.

    Args:
        input_features: K.
        output_features: N.
        bias: whether there is one.
        has_fp16_weights: whether the weight stays in float.
        threshold: from which magnitude on an activation is an outlier; 0 for none.
        index: kept and not used, as there.
        device: where it lies.

    Attributes:
        weight: int8 ``(N, K)``, or float before it is quantised.
        SCB: float32 ``(N,)``, the largest magnitude of each row, or None:
            ``weight * SCB[:, None] / 127`` is the weight.
        bias: ``(N,)`` or None.

    The state dict has ``weight``, ``bias``, and, once quantised, ``SCB`` and ``weight_format``, a
    uint8 0 for "row".

    Raises ValueError for a state dict of another format (col32, col_turing, col_ampere).
    """

    SCB: Tensor | None
    _scale: Tensor | None

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.requires_grad_(False)
        self.has_fp16_weights = has_fp16_weights
        self.threshold = check_threshold("Linear8bitLt", threshold)
        self.index = index
        self.register_buffer("SCB", None)
        self.register_buffer("_scale", None, persistent=False)  # SCB / 127

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K)`` float32, float16 or bfloat16 to ``(..., N)``, in x's dtype or autocast's.

        Raises:
            TypeError: another dtype, or another device than the weight's.
            ValueError: another last size, or a weight or bias that requires grad.
        """
        check_input("Linear8bitLt", x, self.in_features, self.weight.device)
        if torch.is_grad_enabled():
            for name, parameter in self.named_parameters(recurse=False):
                if parameter.requires_grad:
                    raise ValueError(f"Linear8bitLt: {name} requires grad, but it is frozen")
        x = autocast(x)
        if not torch.compiler.is_compiling():
            if not self.has_fp16_weights:
                self._quantize()
            self._settle()
        weight, scale = self.weight, self._scale
        if scale is None:
            weight, scale = quantize_per_channel(weight)
        bias = self.bias
        if bias is not None and bias.dtype not in (x.dtype, torch.float32):
            bias = bias.float()

        def product(x: Tensor) -> Tensor:
            rows = x if x.dim() > 1 else x[None]
            options = {"threshold": self.threshold, "bias": bias, "w_is_constant": True}
            y = llm_int8_matmul(rows, weight, scale, **options)
            return y if x.dim() > 1 else y[0]

        return with_input_gradient(product, x, weight, scale) if needs_gradient(x) else product(x)

    @property
    def _is_int8(self) -> bool:
        return self.weight.dtype == torch.int8

    def _quantize(self) -> None:
        if self._is_int8:
            return
        # A tensor made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            weight = self.weight.detach()
            self.SCB = weight.abs().amax(1).float()
            self.weight = nn.Parameter(quantize_per_channel(weight)[0], requires_grad=False)
        self._settle()

    def _settle(self) -> None:
        """What follows from weight and SCB: rows that are padded, and the scale."""
        if not self._is_int8:
            self.SCB = self._scale = None
            return
        padded = padded_rows(self.weight)
        if padded is not self.weight:
            self.weight = nn.Parameter(padded, requires_grad=False)
        if self._scale is None and self.SCB is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._scale = self.SCB / 127

    def _apply(self, fn: Any, recurse: bool = True) -> Linear8bitLt:
        before, here = self.SCB, self.weight.device.type
        self._scale = None
        super()._apply(fn, recurse)
        if self.SCB is not None and self.SCB.dtype != before.dtype:
            self.SCB = before.to(self.SCB.device)
        there = self.weight.device.type
        if here == "cpu" and there not in ("cpu", "meta") and not self.has_fp16_weights:
            self._quantize()
        self._settle()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_int8:
            destination[prefix + "weight"] = destination[prefix + "weight"].contiguous()
            destination[prefix + "weight_format"] = torch.tensor(0, dtype=torch.uint8)

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
        _check_format(prefix, state_dict.pop(prefix + "weight_format", 0))
        loaded = state_dict.get(prefix + "weight")
        if loaded is not None and loaded.dtype == torch.int8 and self.has_fp16_weights:
            error_msgs.append(
                f"Linear8bitLt: {prefix}weight is int8, expected a float weight; give the module "
                "has_fp16_weights=False"
            )
            return
        before = (self.weight, self.SCB, self._scale)
        if loaded is not None and (loaded.dtype == torch.int8) != self._is_int8:
            self._make_room(loaded.dtype)
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
            self.weight, self.SCB, self._scale = before
        else:
            self._scale = None
        self._settle()

    def _make_room(self, dtype: torch.dtype) -> None:
        """Tensors for an INT8 weight in place of a float one, or the other way round."""
        weight = self.weight
        self.weight = nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=False)
        self.SCB = None
        if dtype == torch.int8:
            # NaN, which shows, where a state has no SCB and the load is not strict.
            self.SCB = torch.full((self.out_features,), torch.nan, device=weight.device)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, scheme=llm_int8, threshold={self.threshold:g}, "
            f"has_fp16_weights={self.has_fp16_weights}"
        )


def _check_format(prefix: str, value: Any) -> None:
    value = int(value) if isinstance(value, (Tensor, int)) else value
    name = _FORMATS.get(value, value)
    if name != "row":
        raise ValueError(
            f"Linear8bitLt: {prefix}weight_format is {name!r}, expected 'row'; load and save the "
            "checkpoint with a newer bitsandbytes"
        )
