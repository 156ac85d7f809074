"""Linear layers in W8A8."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import PackedWeight, int8_gemm, pack_weight
from ..quantize_ops import check_rotation, quantize_per_channel, quantize_per_token
from ..torch_library import tensor_scale_op
from .frozen_linear import FrozenLinear, autocast, check_linear, needs_gradient
from .input_gradient import with_input_gradient

_SCHEMES = ("w8a8", "w8a8_tensor", "w8a8_static")


def _quantize_per_tensor(weight: Tensor, rotation: int) -> tuple[Tensor, Tensor]:
    """int8 (N, K) and float32 (N,), one number."""
    if rotation != 0:
        raise NotImplementedError(
            f"Int8Linear: rotation is {rotation}, expected 0 with per_tensor_weight=True"
        )
    q, scale = quantize_per_channel(weight.reshape(1, -1))
    return q.view_as(weight), scale.expand(weight.shape[0]).clone()


class Int8Linear(FrozenLinear):
    """``nn.Linear`` in W8A8: an INT8 weight per channel, INT8 activations.

    ``y = int8_gemm(q, weight.t(), s, weight_scale, bias)``, in x's dtype or autocast's, with
    ``q, s = quantize_per_token(x, ...)``; the scheme says how:

    - ``"w8a8"``: one dynamic scale a token (ZeroQuant, SmoothQuant O1);
    - ``"w8a8_tensor"``: one dynamic scale for all of x, the largest magnitude in it over 127
      (SmoothQuant O2). It costs a pass over x of its own, and makes a row's result depend on the
      others: a NaN or an Inf anywhere in x reaches every row;
    - ``"w8a8_static"``: ``input_scale`` for all of them, found beforehand: the largest magnitude of
      the layer's input (smoothed and rotated, if it is) over 127 (SmoothQuant O3).

    Smoothing divides x's features by ``smooth`` and multiplies the weight's, before each is
    quantised (SmoothQuant).

    A rotation R multiplies blocks of R consecutive features of x and of the weight by a Hadamard
    matrix before they are quantised (see :func:`fastq.quantize_per_token`). The product stays the
    same, ``(x H) (w H)^T = R x w^T`` with 1 / R in weight_scale, while outliers are spread over
    their block: more accurate where few features are large, at the cost of a slower quantisation.

    The weight is frozen. An x that requires grad gets the gradient of the layer with its weight
    dequantised, of which an eighth at most is held at a time; all rounding is straight through.

    On a CPU the first call rearranges the weight into the form its kernels read fastest and lets
    the plain one go, so there is one copy in memory. ``weight``, the state dict, ``.to()`` and a
    call that needs a gradient restore the plain form; a load or a move packs anew at the next call
    without one. A module that ``torch.compile`` meets before its first call runs on the plain form:
    :meth:`pack` it before.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        device: where the buffers go.
        rotation: 0 (none), 2, 4, 8, 16 or 32; a divisor of in_features.
        scheme: "w8a8", "w8a8_tensor" or "w8a8_static".
        smooth: whether x is smoothed.

    Raises:
        ValueError: a scheme or a rotation that is not among the above.
        NotImplementedError: "w8a8_tensor" with a rotation.

    Attributes:
        weight: int8 ``(out_features, in_features)``, smoothed and rotated; a copy while packed.
        weight_scale: float32 ``(out_features,)``, that of the rotated weight divided by rotation;
            one number throughout where the weight was quantised per tensor.
        bias: float32 ``(out_features,)`` or None. ``.half()`` and ``.to(dtype)`` leave scales,
            smooth and bias in float32.
        rotation: int32 scalar, or None without a rotation.
        input_scale: float32 scalar, or None where scales are dynamic.
        smooth: float32 ``(in_features,)``, or None. These three mark the state dict, which loads
            only into a module of the same kind.

    Source: ZeroQuant (Yao et al., 2022); SmoothQuant (Xiao et al., 2022); QuaRot (Ashkboos et al.,
    2024) for the rotation.
    """

    rotation: Tensor | None
    input_scale: Tensor | None
    smooth: Tensor | None
    _packed: Tensor | None
    _exact = ("weight_scale", "bias", "input_scale", "smooth")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        rotation: int = 0,
        scheme: str = "w8a8",
        smooth: bool = False,
    ) -> None:
        check_rotation("Int8Linear", rotation)
        if rotation != 0 and in_features % rotation != 0:
            raise ValueError(
                f"Int8Linear: in_features is {in_features}, expected a multiple of rotation = "
                f"{rotation}"
            )
        if scheme not in _SCHEMES:
            names = ", ".join(map(repr, _SCHEMES))
            raise ValueError(f"Int8Linear: scheme is {scheme!r}, expected one of {names}")
        if scheme == "w8a8_tensor" and rotation != 0:
            raise NotImplementedError(
                f"Int8Linear: rotation is {rotation}, expected 0 with scheme='w8a8_tensor'"
            )
        super().__init__(in_features, out_features, bias, device)
        self.scheme = scheme
        self._rotation = int(rotation)
        mark = torch.tensor(rotation, dtype=torch.int32, device=device) if rotation else None
        self.register_buffer("rotation", mark)
        ones = torch.ones(in_features, dtype=torch.float32, device=device)
        self.register_buffer("input_scale", ones.new_ones(()) if self._is_static else None)
        self.register_buffer("smooth", ones if smooth else None)
        # Set while weight is None. A buffer, so that it counts as memory.
        self.register_buffer("_packed", None, persistent=False)
        # Where _packed is that of a JointLinear: this layer's first column in it, and their number.
        self._packed_columns: tuple[int, int] | None = None

    @classmethod
    @torch.no_grad()
    def from_float(
        cls,
        linear: nn.Linear,
        scheme: str = "w8a8",
        *,
        rotation: int = 0,
        input_scale: Tensor | float | None = None,
        smooth: Tensor | None = None,
        per_tensor_weight: bool = False,
    ) -> Int8Linear:
        """Quantises a linear layer's weight, on the device where it lies.

        Args:
            linear: of float32, float16 or bfloat16.
            scheme: "w8a8", "w8a8_tensor" or "w8a8_static".
            rotation: see the class.
            input_scale: positive, one element: what "w8a8_static" needs, and no other takes.
            smooth: positive ``(in_features,)``; x is divided by it.
            per_tensor_weight: one scale for the whole weight instead of one a channel, as the
                baseline of the papers has it; less exact, and no faster.

        Raises:
            TypeError: not an ``nn.Linear``, or of another dtype.
            ValueError: a scheme, a rotation, a scale or a shape that is not among the above.
            NotImplementedError: "w8a8_tensor" or a weight per tensor with a rotation.
        """
        check_linear("Int8Linear", linear)
        sizes = (linear.in_features, linear.out_features)
        kind = {"rotation": rotation, "scheme": scheme, "smooth": smooth is not None}
        module = cls(*sizes, linear.bias is not None, device="meta", **kind)
        weight = linear.weight.detach()
        module.input_scale = module._checked_input_scale(input_scale, weight.device)
        if smooth is not None:
            module.smooth = module._checked_smooth(smooth, weight.device)
            weight = weight.float() * module.smooth
        if per_tensor_weight:
            module.weight, module.weight_scale = _quantize_per_tensor(weight, rotation)
        else:
            module.weight, module.weight_scale = quantize_per_channel(weight, rotation=rotation)
        if rotation != 0:
            module.weight_scale /= rotation  # a power of two: exact
            module.rotation = torch.tensor(rotation, dtype=torch.int32, device=weight.device)
        module._take_bias(linear)
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` float32, float16 or bfloat16 to ``(..., out_features)``.

        Raises:
            TypeError: another dtype, or another device than the weight's.
            ValueError: another last size.
        """
        self._check(x)
        x = autocast(x)
        if not needs_gradient(x):
            if not torch.compiler.is_compiling():
                self.pack()
            return self._product(x)
        if not torch.compiler.is_compiling():
            self._unpack()
        weight = self._buffers["weight"]
        if weight is None:
            weight = self._plain_weight()
        options = {"smooth": self.smooth, "rotation": self._rotation}
        return with_input_gradient(self._product, x, weight, self.weight_scale, **options)

    def _product(self, x: Tensor) -> Tensor:
        weight_scale, bias, columns = self.weight_scale, self.bias, None
        plain = self._buffers["weight"]
        if plain is not None:
            weight: Tensor | PackedWeight = plain.t()
        else:
            first, total = self._packed_columns or (0, self.out_features)
            weight = PackedWeight(self._packed, self.in_features, total)
            if total > self.out_features:  # compiled, else it would have been packed anew
                columns = slice(first, first + self.out_features)
                around = (first, total - columns.stop)
                weight_scale = F.pad(weight_scale, around)
                bias = None if bias is None else F.pad(bias, around)
        scale = self.input_scale
        if self.scheme == "w8a8_tensor":
            scale = tensor_scale_op(x.detach(), self.smooth)
        q, s = quantize_per_token(
            x if x.dim() > 1 else x[None],
            rotation=self._rotation,
            smooth=self.smooth,
            scale=scale,
        )
        # Constant for the product: between it and whatever wrote the weight, x was quantised.
        y = int8_gemm(
            q,
            weight,
            s,
            weight_scale,
            bias=bias,
            b_is_constant=True,
            out_dtype=x.dtype,
        )
        if columns is not None:
            y = y[..., columns]
        return y if x.dim() > 1 else y[0]

    def pack(self) -> Int8Linear:
        """Packs a CPU weight now instead of at the first call; does nothing elsewhere."""
        if self._packed_columns is not None:
            self._unpack()
        weight = self._buffers["weight"]
        if weight is not None and weight.device.type == "cpu":
            # A tensor made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._packed = pack_weight(weight.t()).data
            self._buffers["weight"] = None
        return self

    @property
    def _is_static(self) -> bool:
        return self.scheme == "w8a8_static"

    def _checked_input_scale(self, scale: Any, device: torch.device) -> Tensor | None:
        if (scale is not None) != self._is_static:
            wanted = "a positive number" if self._is_static else "None"
            raise ValueError(
                f"Int8Linear: input_scale is {scale}, expected {wanted} with scheme={self.scheme!r}"
            )
        if scale is None:
            return None
        scale = torch.as_tensor(scale).detach()
        if scale.numel() != 1 or not 0 < scale.item() < float("inf"):
            raise ValueError(f"Int8Linear: input_scale is {scale}, expected one positive number")
        return scale.to(device, torch.float32, copy=True).reshape(())

    def _checked_smooth(self, smooth: Tensor, device: torch.device) -> Tensor:
        smooth = torch.as_tensor(smooth).detach().to(device, torch.float32, copy=True)
        if smooth.shape != (self.in_features,):
            raise ValueError(
                f"Int8Linear: smooth has shape {tuple(smooth.shape)}, expected "
                f"({self.in_features},)"
            )
        if not bool(((smooth > 0) & smooth.isfinite()).all()):
            raise ValueError("Int8Linear: smooth has elements that are not positive and finite")
        return smooth

    def _plain_weight(self) -> Tensor:
        # The packed form is opaque; a product with the identity reads it back, exactly.
        first, total = self._packed_columns or (0, self.out_features)
        packed = PackedWeight(self._packed, self.in_features, total)
        weight = torch.empty(self.out_features, self.in_features, dtype=torch.int8)
        for start in range(0, self.in_features, 1024):
            stop = min(start + 1024, self.in_features)
            rows = torch.zeros(stop - start, self.in_features, dtype=torch.int8)
            rows[:, start:stop] = torch.eye(stop - start, dtype=torch.int8)
            columns = int8_gemm(rows, packed, None, None, out_dtype=torch.int32)
            weight[:, start:stop] = columns[:, first : first + self.out_features].t()
        return weight

    def _unpack(self) -> None:
        if self._buffers["weight"] is None:
            with torch.inference_mode(False), torch.no_grad():
                self.weight = self._plain_weight()
        self._packed = None
        self._packed_columns = None

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if value is None and name == "weight":
            return self._plain_weight()
        return value

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        self._unpack()
        super()._apply(fn, recurse)
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
        error = self._misfit(state_dict, prefix)
        if error is not None:
            error_msgs.append(error)
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

    def _misfit(self, state_dict: Any, prefix: str) -> str | None:
        """Why a state would give this module another meaning, if it would."""
        mark = state_dict.get(prefix + "rotation")
        if mark is None and prefix + "weight" not in state_dict:
            return None  # a part of one
        found = 0 if mark is None else int(mark)
        if found != self._rotation:
            return (
                f"Int8Linear: {prefix}weight was quantised with rotation {found}, expected "
                f"{self._rotation}; give quantize or Int8Linear rotation={found}"
            )
        for name, own in (("input_scale", self.input_scale), ("smooth", self.smooth)):
            if (prefix + name in state_dict) != (own is not None):
                how, wanted = ("without", "one") if own is not None else ("with", "none")
                return f"Int8Linear: {prefix}weight comes {how} {name}, expected {wanted}"
        return None

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, scheme={self.scheme}"
            + (f", rotation={self._rotation}" if self._rotation else "")
            + (", smooth=True" if self.smooth is not None else "")
        )
