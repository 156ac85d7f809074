"""How a family's checkpoint holds the canonical parameters, and the way between them and back.

A tensor of a checkpoint is a canonical parameter under another name, or transposed, or q, k and v
in one, as `families.py` tables it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig
from .families import Family, family_of

_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint: its name and shape there, and the canonical parameters in it.

    `head_dim` is 0 but for q, k and v by heads.
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, tuple[int, ...]]
    transposed: bool
    head_dim: int

    @property
    def is_plain(self) -> bool:
        """Whether it is one canonical parameter as it stands."""
        return len(self.parts) == 1 and not self.transposed

    def split(
        self,
        tensor: Tensor,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """The canonical parameters in the stored tensor, one after the other: contiguous copies,
        each the only allocation made for it. None keeps the tensor's dtype or device."""
        tensor = tensor.t() if self.transposed else tensor
        if self.head_dim:
            views = tensor.unflatten(0, (-1, len(self.parts), self.head_dim)).unbind(1)
        else:
            views = tensor.split([shape[0] for shape in self.parts.values()])
        for (name, shape), view in zip(self.parts.items(), views, strict=True):
            copy = torch.empty(
                view.shape, dtype=dtype or tensor.dtype, device=device or tensor.device
            )
            yield name, copy.copy_(view).view(shape)

    def join(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The stored tensor from the canonical parameters: `split` back."""
        pieces = [parameters[name] for name in self.parts]
        if self.head_dim:
            pieces = [piece.unflatten(0, (-1, self.head_dim)) for piece in pieces]
            tensor = torch.stack(pieces, dim=1).flatten(0, 2)
        else:
            tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return tensor.t().contiguous() if self.transposed else tensor


def stored_module(family: Family, module: str) -> str:
    """The family's name of a canonical module: "model.layers.3.mlp.up_proj" is
    "transformer.h.3.mlp.c_fc" to a GPT-2. A fused module's name stands for q, k and v."""
    outer = family.canonical_layers + "."
    if not module.startswith(outer):
        return family.names.get(module, module)
    layer, _, inner = module.removeprefix(outer).partition(".")
    if family.fused and inner in _QKV:
        inner = "self_attn.qkv_proj"
    return f"{family.layers}.{layer}.{family.names.get(inner, inner)}"


def stored_tensors(
    family: Family, head_dim: int, shapes: Mapping[str, Iterable[int]]
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, from canonical parameters' names and shapes, in their
    order."""
    tensors: dict[str, StoredTensor] = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        stored = f"{stored_module(family, module)}.{kind}"
        parts = tensors[stored].parts if stored in tensors else {}
        tensors[stored] = _stored(stored, parts | {name: tuple(shape)}, family, head_dim)
    return tensors


def _stored(
    name: str, parts: dict[str, tuple[int, ...]], family: Family, head_dim: int
) -> StoredTensor:
    first, *others = parts
    shape = (sum(shape[0] for shape in parts.values()), *parts[first][1:])
    transposed = (
        family.transposed
        and len(shape) == 2
        and first.startswith(family.canonical_layers)
        and first.endswith(".weight")
    )
    by_heads = family.fused == "heads" and bool(others)
    shape = shape[::-1] if transposed else shape
    return StoredTensor(name, shape, parts, transposed, head_dim if by_heads else 0)


def to_checkpoint(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a checkpoint of the config's family holds, from a model's `state_dict`.

    A tied head is left out. Transposed and fused tensors are copies, the others are not.
    """
    state = dict(state)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    tensors = stored_tensors(family_of(config), config.head_dim, shapes)
    return {name: tensor.join(state) for name, tensor in tensors.items()}


def from_checkpoint(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The canonical state dict of a checkpoint's tensors: `to_checkpoint` back.

    Raises ValueError for a tensor that the family does not have.
    """
    from .model import CausalLM

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CausalLM(config).state_dict().items()}
    known = stored_tensors(family_of(config), config.head_dim, shapes)
    state = {}
    for name, tensor in tensors.items():
        if name not in known:
            raise ValueError(f"from_checkpoint: {config.family!r} has no tensor {name}")
        if tuple(tensor.shape) != known[name].shape:
            raise ValueError(
                f"from_checkpoint: {name} has shape {tuple(tensor.shape)}, expected "
                f"{known[name].shape}"
            )
        state.update(known[name].split(tensor))
    return state
