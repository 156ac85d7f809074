"""Which linear layers of a model are quantised, and by which scheme."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

# The output head is small beside the rest, often shares the embedding's weight, and is the layer
# that rounding hurts most.
DEFAULT_SKIP = ("lm_head",)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# How each scheme treats a linear layer, by Int8Linear's or OutlierLinear's name of it.
LINEAR_SCHEMES = {
    "w8a8": "w8a8",
    "w8a8_tensor": "w8a8_tensor",
    "w8a8_static": "w8a8_static",
    "smoothquant_o1": "w8a8",
    "smoothquant_o2": "w8a8_tensor",
    "smoothquant_o3": "w8a8_static",
    "llm_int8": "llm_int8",
}
SCHEMES = tuple(LINEAR_SCHEMES)


@dataclass
class Target:
    """A linear layer to quantise: every name that it is registered under, and the scheme."""

    linear: nn.Linear
    scheme: str
    names: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def linear_scheme(self) -> str:
        return LINEAR_SCHEMES[self.scheme]

    @property
    def is_smoothed(self) -> bool:
        return self.scheme.startswith("smoothquant")


def check_scheme(op: str, scheme: object, name: str = "scheme") -> None:
    if scheme not in SCHEMES:
        raise ValueError(
            f"{op}: {name} is {scheme!r}, expected one of {', '.join(map(repr, SCHEMES))}"
        )


def select(
    model: nn.Module,
    scheme: str,
    skip: Iterable[str],
    overrides: Mapping[str, str | None] | None,
) -> dict[str, Target]:
    """The layers to quantise by their first name, in the model's order; see :func:`quantize`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model is a {type(model).__name__}, expected a torch.nn.Module")
    check_scheme("quantize", scheme)
    if isinstance(skip, str):
        raise TypeError(f"quantize: skip is the string {skip!r}, expected a list of patterns")
    overrides = dict(overrides or {})
    for pattern, other in overrides.items():
        if other is not None:
            check_scheme("quantize", other, f"overrides[{pattern!r}]")
    rules = [*dict.fromkeys(skip, None).items(), *overrides.items()]
    unmatched = {pattern for pattern, _ in rules} - (set(DEFAULT_SKIP) - set(overrides))
    last = {"": -1}  # the last rule that matches a module or one that it is in
    targets: dict[nn.Module, Target] = {}
    is_any_left_out = False
    for name, module in model.named_modules(remove_duplicate=False):
        matching = [i for i, (pattern, _) in enumerate(rules) if name and _matches(name, pattern)]
        unmatched -= {rules[i][0] for i in matching}
        last[name] = max([last[name.rpartition(".")[0]], *matching])
        own = scheme if last[name] < 0 else rules[last[name]][1]
        is_any_left_out |= own is None
        if own is None:
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            raise NotImplementedError(
                f"quantize: {name or 'model'} is a torch.nn.TransformerEncoderLayer, whose fused "
                "inference path reads the weights of its linear layers; expected it in skip"
            )
        if type(module) is nn.Linear:
            if module.weight.dtype not in _FLOATS:  # before anything is replaced
                raise TypeError(
                    f"quantize: {name or 'model'} has a weight of dtype {module.weight.dtype}, "
                    "expected float32, float16 or bfloat16"
                )
            targets.setdefault(module, Target(module, own)).names.append(name)
    if unmatched:
        pattern = min(unmatched)
        where = "overrides" if pattern in overrides else "skip"
        raise ValueError(f"quantize: {where} holds {pattern!r}, which matches no module")
    if not targets:
        raise ValueError(
            f"quantize: {type(model).__name__} has no torch.nn.Linear to quantise"
            + (" outside of skip" if is_any_left_out else "")
        )
    return {target.name: target for target in targets.values()}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
