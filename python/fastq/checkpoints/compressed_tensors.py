"""The format "int-quantized" of compressed-tensors, as llm-compressor writes it.

A quantised linear layer is `weight` int8 (N, K), `weight_scale` (N, 1) or (1,) and, where the
activations' scale is static, `input_scale` (1,), all multipliers: x = q * scale. config.json says
under `quantization_config` which layers are quantised, and how: groups with targets, each a class
("Linear"), a module's name or a pattern ("re:.*mlp.*"), and a list of what to ignore.

Source: compressed-tensors 0.20 (quantization/quant_args.py, utils/match.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .linear_state import LinearState, Stored

METHOD = "compressed-tensors"
_FORMAT = "int-quantized"
_FORMATS = (_FORMAT, "naive-quantized")
_VERSION = "0.20.0"
_CLASSES = ("Linear", "Module")  # those that a layer of the runtime belongs to
_PRESETS = ("W8A8", "INT8")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_INTEGERS = frozenset({"I8", "I32", "I64"})

# scheme -> how its activations are quantised
_ACTIVATIONS = {
    "w8a8": {"strategy": "token", "dynamic": True},
    "w8a8_tensor": {"strategy": "tensor", "dynamic": True},
    "w8a8_static": {"strategy": "tensor", "dynamic": False},
}


@dataclass(frozen=True)
class Group:
    """Layers with one scheme, or, where it is None, not quantised."""

    name: str
    targets: tuple[str, ...]
    scheme: str | None
    per_channel: bool = True


@dataclass(frozen=True)
class CompressedTensors:
    """Which layers of a checkpoint are quantised, and how."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    source: str

    @classmethod
    def from_config(cls, raw: dict[str, Any], source: str) -> CompressedTensors:
        """Reads the `quantization_config` of a config.json; `source` is named in the messages.

        Raises ValueError where it is malformed, and NotImplementedError for a quantisation that
        is not W8A8 with symmetric integers.
        """
        groups = raw.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ValueError(
                f"{source}: quantization_config has config_groups {groups!r}, expected an object "
                "with at least one group"
            )
        _check_whole(raw, source)
        return cls(
            tuple(_read_group(name, group, raw, source) for name, group in groups.items()),
            tuple(raw.get("ignore") or ()),
            source,
        )

    def group_of(self, name: str) -> Group | None:
        """The group of the linear layer with this name, its checkpoint's; None: not quantised."""
        matching = {t: g for g in self.groups for t in g.targets if _matches(name, t)}
        if not matching or any(_matches(name, pattern) for pattern in self.ignore):
            return None
        # An exact name comes before a pattern, and that before a class.
        group = matching[min(matching, key=lambda t: (t in _CLASSES, t.startswith("re:"), t))]
        return group if group.scheme is not None else None

    def quantizes(self, name: str, dtype: str | None) -> bool:
        """Whether the linear layer is quantised; `dtype` is that of its stored weight."""
        return self.group_of(name) is not None

    def tensors(self, name: str, n: int, k: int, bias: bool) -> dict[str, Stored]:
        """The tensors that a quantised linear layer of (n, k) consists of."""
        group = self.group_of(name)
        scales = ((n, 1), (n,)) if group.per_channel else ((1,), (), (1, 1))
        points = {"shapes": scales, "dtypes": _INTEGERS | _FLOATS, "required": False}
        stored = {
            "weight": Stored(((n, k),), frozenset({"I8"})),
            "weight_scale": Stored(scales, _FLOATS),
            "weight_zero_point": Stored(**points),
        }
        if bias:
            stored["bias"] = Stored(((n,),), _FLOATS)
        if group.scheme == "w8a8_static":
            stored["input_scale"] = Stored(((1,), (), (1, 1)), _FLOATS)
            points["shapes"] = ((1,), (), (1, 1))
            stored["input_zero_point"] = Stored(**points)
        return {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}

    def read(self, name: str, tensor: Callable[[str], Tensor | None]) -> LinearState:
        """The layer, from what `tensor` gives for the names of :meth:`tensors`.

        Raises ValueError for a scale that is not positive and finite, and NotImplementedError for
        a zero point that is not zero.
        """
        group = self.group_of(name)
        for leaf in ("weight_zero_point", "input_zero_point"):
            point = tensor(f"{name}.{leaf}")
            if point is not None and bool(point.any()):
                raise NotImplementedError(
                    f"{self.source}: {name}.{leaf} is not zero; expected a symmetric quantisation"
                )
        weight = tensor(f"{name}.weight")
        scale = self._scale(name, "weight_scale", tensor)
        bias = tensor(f"{name}.bias")
        static = group.scheme == "w8a8_static"
        return LinearState(
            group.scheme,
            weight,
            scale.expand(weight.shape[0]).contiguous(),
            None if bias is None else bias.float(),
            self._scale(name, "input_scale", tensor).reshape(()) if static else None,
        )

    def _scale(self, name: str, leaf: str, tensor: Callable[[str], Tensor | None]) -> Tensor:
        scale = tensor(f"{name}.{leaf}").flatten().float()
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(
                f"{self.source}: {name}.{leaf} has elements that are not positive and finite"
            )
        return scale


def write_config(schemes: dict[str, str], floats: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model: linear layer -> scheme, and those left in float."""
    distinct = list(dict.fromkeys(schemes.values()))
    groups = {}
    for i, scheme in enumerate(distinct):
        # One scheme is that of the class; several need the layers' names.
        names = [name for name, own in schemes.items() if own == scheme]
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(distinct) == 1 else names,
            "weights": _args(strategy="channel", dynamic=False),
            "input_activations": _args(**_ACTIVATIONS[scheme]),
            "output_activations": None,
            "format": _FORMAT,
        }
    return {
        "version": _VERSION,
        "quant_method": METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": floats,
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def write(name: str, state: LinearState, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer, but for its bias."""
    tensors = {
        f"{name}.weight": state.weight,
        f"{name}.weight_scale": state.weight_scale[:, None].to(scale_dtype),
    }
    if state.input_scale is not None:
        tensors[f"{name}.input_scale"] = state.input_scale.reshape(1).to(scale_dtype)
    return tensors


def _args(strategy: str, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "group_size": None,
        "strategy": strategy,
        "dynamic": dynamic,
    }


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name or target in _CLASSES


def _check_whole(raw: dict[str, Any], source: str) -> None:
    """Refuses what concerns the checkpoint as a whole."""
    status = raw.get("quantization_status", "compressed")
    if status != "compressed":
        raise NotImplementedError(
            f"{source}: quantization_status {status!r} is not supported; expected 'compressed'"
        )
    sparsity = (raw.get("sparsity_config") or {}).get("format", "dense")
    for name, value in (
        ("sparsity_config", None if sparsity == "dense" else sparsity),
        ("transform_config", raw.get("transform_config")),
        ("kv_cache_scheme", raw.get("kv_cache_scheme")),
    ):
        if value:
            raise NotImplementedError(f"{source}: {name} {value!r} is not supported; expected none")


def _read_group(name: str, group: Any, raw: dict[str, Any], source: str) -> Group:
    where = f"{source}: quantization_config.config_groups.{name}"
    if isinstance(group, list):  # a preset's name and its targets
        if name.upper() not in _PRESETS:
            raise NotImplementedError(f"{where} is not supported; expected {' or '.join(_PRESETS)}")
        return Group(name, tuple(group), "w8a8")
    if not isinstance(group, dict) or not _are_strings(group.get("targets")):
        raise ValueError(f"{where} is {group!r}, expected an object with a list of targets")
    targets = tuple(group["targets"])
    weights, inputs = group.get("weights"), group.get("input_activations")
    if group.get("output_activations"):
        raise NotImplementedError(f"{where}.output_activations is not supported; expected none")
    if not weights and not inputs:
        return Group(name, targets, None)
    if not weights or not inputs:
        given, absent = ("weights", "input_activations")[:: 1 if weights else -1]
        raise NotImplementedError(f"{where} has {given} without {absent}; expected both: W8A8")
    kind = group.get("format") or raw.get("format")
    if kind not in _FORMATS:
        raise NotImplementedError(
            f"{where}: format {kind!r} is not supported; expected {_FORMAT!r}"
        )
    strategy = _check_args(f"{where}.weights", weights, ("channel", "tensor"))
    if weights.get("dynamic"):
        raise NotImplementedError(f"{where}.weights: dynamic is not supported; expected static")
    return Group(
        name, targets, _read_scheme(f"{where}.input_activations", inputs), strategy[0] == "c"
    )


def _read_scheme(where: str, inputs: dict[str, Any]) -> str:
    strategy = _check_args(where, inputs, ("token", "tensor"))
    dynamic = inputs.get("dynamic", False)
    for scheme, kind in _ACTIVATIONS.items():
        if kind == {"strategy": strategy, "dynamic": dynamic}:
            return scheme
    raise NotImplementedError(
        f"{where}: strategy {strategy!r} with dynamic {dynamic!r} is not supported; expected "
        "'token' with true, or 'tensor'"
    )


def _check_args(where: str, args: Any, strategies: Iterable[str]) -> str:
    """Raises unless they are symmetric 8-bit integers; returns the strategy."""
    if not isinstance(args, dict):
        raise ValueError(f"{where} is {args!r}, expected an object")
    size = args.get("group_size")
    strategy = args.get("strategy") or ("channel" if size == -1 else "group" if size else "tensor")
    found = {"num_bits": args.get("num_bits", 8), "type": args.get("type", "int")}
    found["symmetric"] = args.get("symmetric", True)
    for key, wanted in (("num_bits", 8), ("type", "int"), ("symmetric", True)):
        if found[key] != wanted:
            raise NotImplementedError(
                f"{where}: {key} {found[key]!r} is not supported; expected {wanted!r}"
            )
    if strategy not in strategies:
        names = " or ".join(map(repr, strategies))
        raise NotImplementedError(
            f"{where}: strategy {strategy!r} is not supported; expected {names}"
        )
    return strategy


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
