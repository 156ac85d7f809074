"""Quantised modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ops import PackedWeight, int8_gemm, pack_weight
from .quantize_ops import check_rotation, quantize_per_channel, quantize_per_token

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Int8Linear(nn.Module):
    """``nn.Linear`` in W8A8: an INT8 weight per channel, activations quantised per token.

    ``y = int8_gemm(q, weight.t(), s, weight_scale, bias)`` with
    ``q, s = quantize_per_token(x, rotation=rotation)``; y has x's dtype. Inference only.

    A rotation R multiplies blocks of R consecutive features of x and of the weight by a Hadamard
    matrix before they are quantised (see :func:`fastq.quantize_per_token`). The product stays the
    same, ``(x H) (w H)^T = R x w^T`` with 1 / R in weight_scale, while outliers are spread over
    their block: more accurate where few features are large, at the cost of a slower quantisation.

    On a CPU the first call rearranges the weight into the form its kernels read fastest and lets
    the plain one go, so there is one copy in memory. ``weight``, the state dict and ``.to()``
    restore the plain form; a load or a move packs anew at the next call. A module that
    ``torch.compile`` meets before its first call runs on the plain form: :meth:`pack` it before.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        device: where the buffers go.
        rotation: 0 (none), 2, 4, 8, 16 or 32; a divisor of in_features.

    Attributes:
        weight: int8 ``(out_features, in_features)``, rotated; a copy while packed.
        weight_scale: float32 ``(out_features,)``, that of the rotated weight divided by rotation.
        bias: float32 ``(out_features,)`` or None. ``.half()`` and ``.to(dtype)`` leave scale and
            bias in float32.
        rotation: int32 scalar, or None without a rotation. It marks the state dict, which loads
            only into a module of the same rotation.

    Source: ZeroQuant (Yao et al., 2022); QuaRot (Ashkboos et al., 2024) for the rotation.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    rotation: Tensor | None
    _packed: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        rotation: int = 0,
    ) -> None:
        super().__init__()
        check_rotation("Int8Linear", rotation)
        if rotation != 0 and in_features % rotation != 0:
            raise ValueError(
                f"Int8Linear: in_features is {in_features}, expected a multiple of rotation = "
                f"{rotation}"
            )
        self.in_features = in_features
        self.out_features = out_features
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        scale = torch.ones(out_features, dtype=torch.float32, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", torch.zeros_like(scale) if bias else None)
        self._rotation = int(rotation)
        mark = torch.tensor(rotation, dtype=torch.int32, device=device) if rotation else None
        self.register_buffer("rotation", mark)
        # Set while weight is None. A buffer, so that it counts as memory.
        self.register_buffer("_packed", None, persistent=False)

    @classmethod
    @torch.no_grad()
    def from_float(cls, linear: nn.Linear, *, rotation: int = 0) -> Int8Linear:
        """Quantises a linear layer's weight per channel, on the device where it lies.

        Raises TypeError for anything but an ``nn.Linear`` of float32, float16 or bfloat16, and
        ValueError for a rotation that the class does not take.
        """
        if not isinstance(linear, nn.Linear):
            kind = type(linear).__name__
            raise TypeError(f"Int8Linear: linear is a {kind}, expected a torch.nn.Linear")
        has_bias = linear.bias is not None
        sizes = (linear.in_features, linear.out_features)
        module = cls(*sizes, has_bias, device="meta", rotation=rotation)
        weight = linear.weight.detach()
        module.weight, module.weight_scale = quantize_per_channel(weight, rotation=rotation)
        if rotation != 0:
            module.weight_scale /= rotation  # a power of two: exact
            module.rotation = torch.tensor(rotation, dtype=torch.int32, device=weight.device)
        module.bias = linear.bias.detach().float().clone() if has_bias else None
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` float32, float16 or bfloat16 to ``(..., out_features)``.

        Raises:
            TypeError: another dtype, or another device than the weight's.
            ValueError: another last size, or an x that requires grad while grad is enabled.
        """
        self._check(x)
        if not torch.compiler.is_compiling():
            self.pack()
        plain = self._buffers["weight"]
        if plain is None:
            weight = PackedWeight(self._packed, self.in_features, self.out_features)
        else:
            weight = plain.t()
        q, s = quantize_per_token(x if x.dim() > 1 else x[None], rotation=self._rotation)
        # Constant for the product: between it and whatever wrote the weight, x was quantised.
        y = int8_gemm(
            q,
            weight,
            s,
            self.weight_scale,
            bias=self.bias,
            b_is_constant=True,
            out_dtype=x.dtype,
        )
        return y if x.dim() > 1 else y[0]

    def pack(self) -> Int8Linear:
        """Packs a CPU weight now instead of at the first call; does nothing elsewhere."""
        weight = self._buffers["weight"]
        if weight is not None and weight.device.type == "cpu":
            # A tensor made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._packed = pack_weight(weight.t()).data
            self._buffers["weight"] = None
        return self

    def _check(self, x: Tensor) -> None:
        if x.dtype not in _FLOATS:
            names = ", ".join(str(d).removeprefix("torch.") for d in _FLOATS)
            raise TypeError(f"Int8Linear: x has dtype {x.dtype}, expected one of {names}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Int8Linear: x has shape {tuple(x.shape)}, expected (..., {self.in_features})"
            )
        if x.device != self.weight_scale.device:
            raise TypeError(
                f"Int8Linear: x is on {x.device}, expected {self.weight_scale.device} as the weight"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "Int8Linear: x requires grad, and Int8Linear has no gradient; call the model under "
                "torch.no_grad()"
            )

    def _plain_weight(self) -> Tensor:
        # The packed form is opaque; a product with the identity reads it back, exactly.
        packed = PackedWeight(self._packed, self.in_features, self.out_features)
        weight = torch.empty(self.out_features, self.in_features, dtype=torch.int8)
        for start in range(0, self.in_features, 1024):
            stop = min(start + 1024, self.in_features)
            rows = torch.zeros(stop - start, self.in_features, dtype=torch.int8)
            rows[:, start:stop].fill_diagonal_(1)
            columns = int8_gemm(rows, packed, None, None, out_dtype=torch.int32)
            weight[:, start:stop] = columns.t()
        return weight

    def _unpack(self) -> None:
        if self._buffers["weight"] is None:
            with torch.inference_mode(False), torch.no_grad():
                self.weight = self._plain_weight()
        self._packed = None

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if value is None and name == "weight":
            return self._plain_weight()
        return value

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        self._unpack()
        exact = {"weight_scale": self.weight_scale, "bias": self.bias}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != torch.float32:
                self._buffers[name] = before.to(after.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._buffers["weight"] is None:
            destination[prefix + "weight"] = self._plain_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

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
        self._unpack()
        mark = state_dict.get(prefix + "rotation")
        if mark is not None or prefix + "weight" in state_dict:
            found = 0 if mark is None else int(mark)
            if found != self._rotation:
                error_msgs.append(
                    f"Int8Linear: {prefix}weight was quantised with rotation {found}, expected "
                    f"{self._rotation}; give quantize or Int8Linear rotation={found}"
                )
                return  # with everything as it was
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
            + (f", rotation={self._rotation}" if self._rotation else "")
        )
