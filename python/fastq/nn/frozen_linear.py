"""What the quantised linear modules share: checks, autocast, and buffers that keep their dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def autocast(x: Tensor) -> Tensor:
    """x as ``nn.Linear`` would take it here: in autocast's dtype where that is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in FLOATS:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def check_input(module: str, x: Tensor, in_features: int, device: torch.device) -> None:
    """Raises unless x is ``(..., in_features)`` float32, float16 or bfloat16 on the device."""
    if x.dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{module}: x has dtype {x.dtype}, expected one of {names}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{module}: x has shape {tuple(x.shape)}, expected (..., {in_features})")
    if x.device != device:
        raise TypeError(f"{module}: x is on {x.device}, expected {device} as the weight")


def check_linear(module: str, linear: Any) -> None:
    if not isinstance(linear, nn.Linear):
        kind = type(linear).__name__
        raise TypeError(f"{module}: linear is a {kind}, expected a torch.nn.Linear")


def needs_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


class FrozenLinear(nn.Module):
    """``nn.Linear`` with a frozen INT8 weight.

    Attributes:
        weight: int8 ``(out_features, in_features)``.
        weight_scale: float32 ``(out_features,)``.
        bias: float32 ``(out_features,)`` or None.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    # Floating-point buffers that ``.half()`` and ``.to(dtype)`` leave as they are.
    _exact: tuple[str, ...] = ("weight_scale", "bias")

    def __init__(
        self, in_features: int, out_features: int, bias: bool, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        scale = torch.ones(out_features, dtype=torch.float32, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", torch.zeros_like(scale) if bias else None)

    def _take_bias(self, linear: nn.Linear) -> None:
        self.bias = None if linear.bias is None else linear.bias.detach().float().clone()

    def _check(self, x: Tensor) -> None:
        check_input(type(self).__name__, x, self.in_features, self.weight_scale.device)

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        exact = {name: self._buffers[name] for name in self._exact}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
