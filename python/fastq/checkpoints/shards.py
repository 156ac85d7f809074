"""Writes tensors as safetensors: one file, or shards and their index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Part:
    """Tensors that are made together, such as a layer's: how many bytes, and what makes them."""

    num_bytes: int
    make: Callable[[], dict[str, Tensor]]


def bytes_of(size: int | str) -> int:
    """A number of bytes, from one or from text such as "5GB" or "200 MiB".

    Raises ValueError for another text or a number below 1.
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", str(size).upper().strip())
    count = int(match[1]) * _UNITS[match[2] or ""] if match else 0
    if count < 1:
        raise ValueError(
            f"save_quantized: max_shard_size is {size!r}, expected a number of bytes or text such "
            "as '5GB'"
        )
    return count


def write_shards(folder: Path, parts: Iterable[Part], max_bytes: int) -> None:
    """Writes model.safetensors, or shards of at most `max_bytes` beside
    model.safetensors.index.json; a part that is larger has a shard of its own.

    One shard at a time is in memory.
    """
    from safetensors.torch import save_file  # here: importing fastq must stay light

    shards: list[list[Part]] = [[]]
    for part in parts:
        filled = sum(own.num_bytes for own in shards[-1])
        if shards[-1] and filled + part.num_bytes > max_bytes:
            shards.append([])
        shards[-1].append(part)
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        tensors = {name: t for part in shard for name, t in part.make().items()}
        # Copies of what shares memory or has gaps: a file holds each tensor by itself.
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        tensors = _unshared(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result
