"""A quantised linear layer between a module and the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..nn import Int8Linear, OutlierLinear


@dataclass(frozen=True)
class Stored:
    """A tensor as a checkpoint may hold it: its shape, one of `shapes`, and its dtype, one of
    `dtypes` in safetensors' names."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: frozenset[str]
    required: bool = True


@dataclass(frozen=True)
class LinearState:
    """What every format keeps of a quantised layer.

    `scheme` is "w8a8", "w8a8_tensor", "w8a8_static" or "llm_int8"; `weight` int8 (N, K),
    `weight_scale` float32 (N,), `bias` float32 (N,) or None, `input_scale` a float32 scalar with
    "w8a8_static"; `threshold` is that of "llm_int8".
    """

    scheme: str
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    threshold: float = 0.0

    def to_module(self) -> nn.Module:
        """An :class:`fastq.nn.Int8Linear` or :class:`fastq.nn.OutlierLinear` of these tensors."""
        sizes = (self.weight.shape[1], self.weight.shape[0], self.bias is not None)
        if self.scheme == "llm_int8":
            module: nn.Module = OutlierLinear(*sizes, threshold=self.threshold, device="meta")
        else:
            module = Int8Linear(*sizes, scheme=self.scheme, device="meta")
        state = {"weight": self.weight, "weight_scale": self.weight_scale, "bias": self.bias}
        state["input_scale"] = self.input_scale
        tensors = {name: tensor for name, tensor in state.items() if tensor is not None}
        module.load_state_dict(tensors, assign=True)
        return module.eval()


def check_storable(name: str, module: Int8Linear | OutlierLinear) -> None:
    """Raises NotImplementedError for what no format of checkpoints has a place for."""
    if isinstance(module, OutlierLinear):
        if module.outlier_columns is not None:
            raise NotImplementedError(
                f"save_quantized: {name} keeps {module.outlier_columns.numel()} float columns of "
                "its weight, for which bitsandbytes' format has no place; expected "
                "keep_outlier_weights=False"
            )
        return
    for option, value in (("rotation", module.rotation), ("smooth", module.smooth)):
        if value is not None:
            raise NotImplementedError(
                f"save_quantized: {name} has {option}, for which the compressed-tensors format "
                "has no place; expected a layer without"
            )


def state_of(module: Int8Linear | OutlierLinear) -> LinearState:
    """The state of a module that is storable."""
    if isinstance(module, OutlierLinear):
        state = LinearState("llm_int8", module.weight, module.weight_scale, module.bias)
        return replace(state, threshold=module.threshold)
    scales = (module.weight_scale, module.bias, module.input_scale)
    return LinearState(module.scheme, module.weight, *scales)


def join(
    states: Mapping[str, LinearState], rows: Callable[[dict[str, Tensor]], Tensor]
) -> LinearState:
    """The states of layers with one input as the state of one layer; `rows` makes its (N, K) and
    (N,) tensors from theirs.

    Raises ValueError where they differ in more than their rows.
    """
    names = list(states)
    first = states[names[0]]
    for name in names[1:]:
        for what in ("scheme", "threshold", "input_scale"):
            one, other = getattr(first, what), getattr(states[name], what)
            if one is not other and one != other:
                raise ValueError(
                    f"save_quantized: {names[0]} and {name} are one layer in the family's "
                    f"checkpoints, expected the same {what}, got {one} and {other}"
                )
    has_bias = first.bias is not None
    return replace(
        first,
        weight=rows({name: state.weight for name, state in states.items()}),
        weight_scale=rows({name: state.weight_scale for name, state in states.items()}),
        bias=rows({name: state.bias for name, state in states.items()}) if has_bias else None,
    )


def split(
    state: LinearState, rows: Callable[[Tensor], dict[str, Tensor]], device: torch.device | str
) -> dict[str, LinearState]:
    """:func:`join` back: `rows` copies each layer's part of an (N, K) or (N,) tensor to the
    device."""
    weights, scales = rows(state.weight), rows(state.weight_scale)
    biases = rows(state.bias) if state.bias is not None else dict.fromkeys(weights)
    parts = {}
    for name, weight in weights.items():
        scale = None if state.input_scale is None else state.input_scale.to(device, copy=True)
        parts[name] = replace(
            state, weight=weight, weight_scale=scales[name], bias=biases[name], input_scale=scale
        )
    return parts
