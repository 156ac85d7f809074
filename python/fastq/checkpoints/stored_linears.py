"""Which tensors of a checkpoint hold which parameters of a model.

A model of the runtime is stored in its family's layout (`runtime/layout.py`): other names, and q, k
and v in one. Any other model, such as one of transformers, is stored as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Int8Linear, OutlierLinear
from .linear_state import LinearState, check_storable, join, state_of

QUANTISED = (Int8Linear, OutlierLinear)


@dataclass(frozen=True)
class _Same:
    """A tensor that is stored as the parameter that it is."""

    name: str
    transposed: bool = False

    def join(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameters[self.name]

    def split(self, tensor: Tensor, dtype: Any, device: Any) -> Iterator[tuple[str, Tensor]]:
        yield self.name, tensor.to(device=device, dtype=dtype, copy=True)

    @property
    def parts(self) -> tuple[str]:
        return (self.name,)


def stored_tensors(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The tensors of the model's checkpoint by name: the `parts` in each, and `join` of these."""
    from ..runtime.config import ModelConfig
    from ..runtime.families import family_of
    from ..runtime.layout import stored_tensors as family_tensors

    config = getattr(model, "config", None)
    if isinstance(config, ModelConfig):
        return family_tensors(family_of(config), config.head_dim, shapes)
    return {name: _Same(name) for name in shapes}


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer of the checkpoint, and the model's modules that it consists of.

    `weight` and `scale` are its tensors of (N, K) and of (N,), as :func:`stored_tensors` has them.
    """

    name: str
    modules: dict[str, nn.Module]
    weight: Any
    scale: Any

    @property
    def names(self) -> list[str]:
        """What config.json may call it: transformers 5 has a head of its own name in every family,
        whatever the checkpoint's."""
        return [self.name, *({"lm_head"} & self.modules.keys() - {self.name})]

    @property
    def is_quantised(self) -> bool:
        return isinstance(next(iter(self.modules.values())), QUANTISED)

    def state(self) -> LinearState:
        """The layer's state. Raises ValueError where its modules differ in more than rows."""
        states = {name: state_of(module) for name, module in self.modules.items()}
        return join(states, self._join_rows)

    def split_rows(self, tensor: Tensor, device: torch.device | str) -> dict[str, Tensor]:
        """Copies of each module's rows of an (N, K) or (N,) tensor of the layer, on the device."""
        stored = self.weight if tensor.dim() == 2 else self.scale
        pieces = stored.split(tensor, tensor.dtype, device)
        return {name.rpartition(".")[0]: piece for name, piece in pieces}

    def _join_rows(self, rows: dict[str, Tensor]) -> Tensor:
        is_weight = next(iter(rows.values())).dim() == 2
        stored, leaf = (self.weight, "weight") if is_weight else (self.scale, "weight_scale")
        return stored.join({f"{name}.{leaf}": part for name, part in rows.items()})


def stored_linears(model: nn.Module) -> dict[str, StoredLinear]:
    """The linear layers of the model's checkpoint, by name.

    Raises ValueError where one would be quantised in part, and NotImplementedError where a
    quantised one is not an ``nn.Linear`` in transformers.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *QUANTISED))
    }
    shapes = {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in modules.items()
    }
    scales = {f"{name}.weight_scale": (m.out_features,) for name, m in modules.items()}
    scales = stored_tensors(model, scales)
    linears = {}
    for stored, weight in stored_tensors(model, shapes).items():
        names = [part.removesuffix(".weight") for part in weight.parts]
        own = {name: modules[name] for name in names}
        kinds = {name: isinstance(module, QUANTISED) for name, module in own.items()}
        name = stored.removesuffix(".weight")
        if len(set(kinds.values())) > 1:
            quantised = [part for part, is_quantised in kinds.items() if is_quantised]
            raise ValueError(
                f"save_quantized: {', '.join(names)} are one layer in the family's checkpoints, "
                f"expected all of them quantised or none, got {', '.join(quantised)}"
            )
        linears[name] = StoredLinear(name, own, weight, scales[f"{name}.weight_scale"])
        if not linears[name].is_quantised:
            continue
        for part, module in own.items():
            check_storable(part, module)
        if weight.transposed:
            raise NotImplementedError(
                f"save_quantized: {name} is a Conv1D in transformers, which holds no INT8 weight; "
                "expected a family of nn.Linear layers"
            )
    return linears
