"""Reads the quantised layers of a checkpoint; `runtime/checkpoint.py` reads the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import bitsandbytes, compressed_tensors
from .bitsandbytes import BitsAndBytes
from .compressed_tensors import CompressedTensors
from .linear_state import Stored, split
from .stored_linears import StoredLinear, stored_linears

Quantization = CompressedTensors | BitsAndBytes


def quantization_of(config: dict[str, Any], source: str) -> Quantization | None:
    """Which layers of a checkpoint are quantised, and how; None where it is a float one.

    Args:
        config: the parsed config.json.
        source: what to name in messages, such as the file's path.

    Raises:
        ValueError: a quantization_config that is malformed.
        NotImplementedError: a format or a quantisation that fastq does not compute.
    """
    raw = config.get("quantization_config")
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ValueError(f"{source}: quantization_config is {raw!r}, expected an object")
    is_old = "load_in_8bit" in raw  # bitsandbytes' before it had a name
    method = raw.get("quant_method", bitsandbytes.METHOD if is_old else None)
    if method == compressed_tensors.METHOD:
        return CompressedTensors.from_config(raw, source)
    if method == bitsandbytes.METHOD:
        return BitsAndBytes.from_config(raw, source)
    raise NotImplementedError(
        f"{source}: the checkpoint is quantised by {method!r}; expected "
        f"{compressed_tensors.METHOD!r} or {bitsandbytes.METHOD!r}, or a float one"
    )


def quantised_linears(
    quantization: Quantization, model: nn.Module, dtype_of: Callable[[str], str | None]
) -> list[StoredLinear]:
    """The quantised ones among the linear layers of a float model's checkpoint.

    `dtype_of` gives the stored dtype of a tensor, in safetensors' names, or None. A head that is
    tied to the embedding is none of them.

    Raises NotImplementedError for a family whose layers are no ``nn.Linear`` in transformers.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = []
    for name, linear in stored_linears(model).items():
        if any(id(module.weight) in embeddings for module in linear.modules.values()):
            continue
        dtype = dtype_of(f"{name}.weight")
        if not all(quantization.quantizes(alias, dtype) for alias in linear.names):
            continue
        if linear.weight.transposed:
            raise NotImplementedError(
                f"{quantization.source}: {name} is quantised, but a Conv1D in transformers; "
                "expected a family of nn.Linear layers"
            )
        linears.append(linear)
    return linears


def expected_tensors(quantization: Quantization, linear: StoredLinear) -> dict[str, Stored]:
    """What the checkpoint holds of a quantised layer, by name."""
    modules = list(linear.modules.values())
    rows = sum(module.out_features for module in modules)
    columns, has_bias = modules[0].in_features, modules[0].bias is not None
    return quantization.tensors(linear.name, rows, columns, has_bias)


def build_linears(
    quantization: Quantization,
    linear: StoredLinear,
    tensor: Callable[[str], Tensor | None],
    device: torch.device | str,
) -> dict[str, nn.Module]:
    """The modules of a quantised layer on the device, by their names in the model.

    `tensor` gives what the checkpoint holds under a name of :func:`expected_tensors`, in one of the
    shapes and dtypes there, or None.

    Raises ValueError and NotImplementedError for values that are no scales.
    """
    state = quantization.read(linear.name, tensor)
    parts = split(state, partial(linear.split_rows, device=device), device)
    return {name: part.to_module() for name, part in parts.items()}
