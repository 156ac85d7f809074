"""Quantised decoder layers as few kernels: the fast path of `CausalLM`.

A layer in W8A8 is, with one product for all that reads a norm:

    q, s, x = norm_quant(x, residual=delta)          # the addition, the norm and its quantisation
    query, key, value = int8_gemm(q, [q; k; v])
    q, s = quantize_per_token(attention(query, key, value))
    attended = int8_gemm(q, o)
    q, s, x = norm_quant(x, residual=attended)
    q, s = silu_mul_quant(int8_gemm(q, [gate; up]))
    delta = int8_gemm(q, down)

and likewise where attention and MLP stand side by side. Nothing is rounded to 16 bits between a
norm or an activation and its quantisation, so results differ from the modules' by that rounding:
they are the more exact ones. A layer in LLM.int8(), whose products take float inputs, is what its
modules compute, but q, k and v are one product, and so are gate and up: each input is quantised and
searched for outliers once. Float models, other schemes and layers left in float run by their
modules; `why_not_fused` says why.

Source: ZeroQuant (Yao et al., 2022), quantisation fused into what comes before a product.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.frozen_linear import FLOATS
from ..nn.joint_linear import (
    JointLinear,
    JointOutlierLinear,
    why_not_joint,
    why_not_joint_outliers,
)
from ..nn.outlier_linear import OutlierLinear
from ..quantize_ops import (
    gelu_quant,
    layer_norm_quant,
    quantize_per_token,
    relu_quant,
    rms_norm_quant,
    silu_mul_quant,
)
from .model import CausalLM, DecoderLayer, ForwardState, RMSNorm

_ACTIVATIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "silu": silu_mul_quant,
    "gelu": gelu_quant,
    "gelu_tanh": partial(gelu_quant, approximate="tanh"),
    "relu": relu_quant,
}
_lock = threading.Lock()  # while a model's layers share out their weights


def why_not_fused(model: CausalLM) -> str | None:
    """What keeps a model from the fused path, with the layer's name; None where nothing does."""
    reason = _why_modules(model)
    if reason is not None:
        return reason
    if any(_hooks(model)):
        return "its modules have hooks"
    if model.dtype not in FLOATS:
        return f"the model is {model.dtype}, expected float32, float16 or bfloat16"
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}"
        if type(layer) is not DecoderLayer:
            return f"{name} is a {type(layer).__name__}, expected a DecoderLayer"
        with_outliers = _has_outliers(layer)
        reason = None if with_outliers else _why_not_quantised_between(model, name, layer)
        if reason is not None:
            return reason
        for group in _groups(layer):
            linears = {f"{name}.{own}": layer.get_submodule(own) for own in group}
            reason = (why_not_joint_outliers if with_outliers else why_not_joint)(linears)
            if reason is not None:
                return reason
    return None


def _has_outliers(layer: DecoderLayer) -> bool:
    """Whether a layer is, or begins as if it were, in LLM.int8()."""
    return type(layer.self_attn.q_proj) is OutlierLinear


def _why_not_quantised_between(model: CausalLM, name: str, layer: DecoderLayer) -> str | None:
    """What keeps a layer's norms and activation from those that quantise."""
    if model.config.activation == "silu" and not model.config.mlp_gated:
        return "silu without a gate has no fused quantisation"
    for own in ("input_layernorm", "post_attention_layernorm"):
        norm = getattr(layer, own)
        if norm is None:
            continue
        if type(norm) not in (RMSNorm, nn.LayerNorm):
            kind = type(norm).__name__
            return f"{name}.{own} is a {kind}, expected a RMSNorm or LayerNorm"
        if norm.weight is None or norm.weight.dtype != model.dtype:
            return f"{name}.{own} has no weight in the model's dtype, {model.dtype}"
    return None


def up_to_date(model: CausalLM) -> FusedDecoder | None:
    """The model's fused layers, made anew where it has changed; None where it cannot be fused."""
    fused = model._fused
    if fused is not None and fused.is_current(model):
        return fused
    with _lock:
        fused = model._fused
        if fused is not None and fused.is_current(model):
            return fused  # another thread's
        model._fused = fused = None  # its memory is needed for the next
        reason = why_not_fused(model)
        if reason != model._why_not_fused:
            _log_choice(reason)
        model._why_not_fused = reason
        if reason is None:
            model._fused = FusedDecoder(model)
        return model._fused


def _log_choice(reason: str | None) -> None:
    """With FASTQ_LOG=dispatch: which path a model takes, and why."""
    if os.environ.get("FASTQ_LOG") == "dispatch":
        path = "fused" if reason is None else f"modules: {reason}"
        print(f"fastq: decoder -> {path}", file=sys.stderr)


def _why_modules(model: CausalLM) -> str | None:
    """What asks for the modules at the moment."""
    if not model.use_fused:
        return "use_fused is False"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return "gradients are asked for"
    return None


def _hooks(model: CausalLM) -> list[dict]:
    """Where the modules of the layers keep their hooks."""
    return [
        hooks
        for module in model.model.layers.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    ]


def _groups(layer: DecoderLayer) -> tuple[list[str], ...]:
    """The linear layers that have one product, by their names in the layer."""
    qkv = [f"self_attn.{x}_proj" for x in "qkv"]
    up = ["mlp.gate_proj", "mlp.up_proj"] if layer.mlp.gate_proj is not None else ["mlp.up_proj"]
    first = (qkv + up,) if layer.post_attention_layernorm is None else (qkv, up)
    return (*first, ["self_attn.o_proj"], ["mlp.down_proj"])


class FusedDecoder:
    """The layers of a model that `why_not_fused` has no reason against.

    Building it joins the weights of the layers that read one input (:class:`JointLinear`,
    :class:`JointOutlierLinear`); at its height that takes the memory of one more product's weight,
    or two where an OutlierLinear pads its rows.
    """

    def __init__(self, model: CausalLM) -> None:
        self._layers = [
            OutlierLayer(layer)
            if _has_outliers(layer)
            else FusedLayer(layer, model.config.activation)
            for layer in model.model.layers
        ]
        self._modules = [(model.model._modules, "layers", model.model.layers)]
        self._modules += [
            (module._modules, name, child)
            for module in model.model.layers.modules()
            for name, child in module._modules.items()
        ]
        self._hooks = _hooks(model)

    def is_current(self, model: CausalLM) -> bool:
        """Whether the model still consists of the modules and tensors that this was built of, and
        nothing asks for its modules."""
        return (
            _why_modules(model) is None
            and not any(self._hooks)
            and len(model.model.layers) == len(self._layers)
            and all(modules.get(name) is child for modules, name, child in self._modules)
            and all(joint.is_current() for layer in self._layers for joint in layer.joints)
        )

    def __call__(self, x: Tensor, state: ForwardState) -> Tensor:
        """The hidden states (batch, seqlen, hidden_size) after the last layer, of those before the
        first."""
        delta = None
        for layer in self._layers:
            x, delta = layer(x, delta, state)
        return x + delta


class FusedLayer:
    """One decoder layer in W8A8. It takes hidden states as x + delta and returns them so."""

    def __init__(self, layer: DecoderLayer, activation: str) -> None:
        self._attention = layer.self_attn
        self._norm = layer.input_layernorm
        self._post_norm = layer.post_attention_layernorm
        self._parallel = layer.parallel
        self._is_gated = layer.mlp.gate_proj is not None
        self._activation_name = activation
        self._activation = _ACTIVATIONS[activation]
        joints = [JointLinear([layer.get_submodule(n) for n in names]) for names in _groups(layer)]
        self.joints = joints
        self._first, self._o, self._down = joints[0], joints[-2], joints[-1]
        self._up = joints[1] if self._post_norm is not None else None

    def __call__(
        self, x: Tensor, delta: Tensor | None, state: ForwardState
    ) -> tuple[Tensor, Tensor]:
        q, s, x = _norm_quant(self._norm, x, delta, self._first.input_scale)
        query, key, value, *inner = self._first(q, s, x.dtype).split(self._first.sizes, -1)
        attended = self._attend(query, key, value, state)
        if not self._parallel:
            q, s, x = _norm_quant(self._post_norm, x, attended, self._up.input_scale)
            return x, self._mlp(q, s, x.dtype)
        if self._post_norm is None:
            q, s = self._activate(*inner)
            return x, self._down(q, s, x.dtype, residual=attended)
        q, s, _ = _norm_quant(self._post_norm, x, None, self._up.input_scale)
        return x, self._mlp(q, s, x.dtype, residual=attended)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, state: ForwardState) -> Tensor:
        out = self._attention.attend(query, key, value, state)
        return self._o(*quantize_per_token(out, scale=self._o.input_scale), out.dtype)

    def _mlp(self, q: Tensor, s: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
        scale = self._down.input_scale
        if self._is_gated or scale is None:
            q, s = self._activate(*self._up(q, s, dtype).split(self._up.sizes, -1))
        else:  # the product itself ends in the activation and its quantisation
            q = self._up(q, s, torch.int8, activation=self._activation_name, out_scale=scale)
            s = scale
        return self._down(q, s, dtype, **options)

    def _activate(self, x: Tensor, up: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._activation(x, up=up, scale=self._down.input_scale)


class OutlierLayer:
    """One decoder layer in LLM.int8(), which takes and returns what a :class:`FusedLayer` does."""

    def __init__(self, layer: DecoderLayer) -> None:
        self._attention = layer.self_attn
        self._norm = layer.input_layernorm
        self._post_norm = layer.post_attention_layernorm
        self._parallel = layer.parallel
        self._activation = layer.mlp.activation
        groups = _groups(layer)
        self.joints = [
            JointOutlierLinear([layer.get_submodule(own) for own in names]) for names in groups
        ]
        self._first, self._o, self._down = self.joints[0], self.joints[-2], self.joints[-1]
        self._up = self.joints[1] if self._post_norm is not None else None

    def __call__(
        self, x: Tensor, delta: Tensor | None, state: ForwardState
    ) -> tuple[Tensor, Tensor]:
        x = x if delta is None else x + delta
        query, key, value, *inner = self._first(self._norm(x)).split(self._first.sizes, -1)
        attended = self._o(self._attention.attend(query, key, value, state))
        if self._post_norm is None:
            return x + attended, self._mlp(*inner)
        before, x = x, x + attended
        normed = self._post_norm(before if self._parallel else x)
        return x, self._mlp(*self._up(normed).split(self._up.sizes, -1))

    def _mlp(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        activated = self._activation(x)
        return self._down(activated if up is None else activated * up)


def _norm_quant(
    norm: nn.Module, x: Tensor, residual: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, s, x + residual); detached, because the ops are called faster with plain tensors."""
    options = {"eps": norm.eps, "residual": residual, "scale": scale}
    if isinstance(norm, RMSNorm):
        got = rms_norm_quant(x, norm.weight.detach(), **options)
    else:
        bias = None if norm.bias is None else norm.bias.detach()
        got = layer_norm_quant(x, norm.weight.detach(), bias, **options)
    return got if residual is not None else (*got, x)
