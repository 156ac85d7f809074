"""How many bytes a cache takes, and what to say when they are not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .config import ModelConfig

_MEMORY_INFO = Path("/proc/meminfo")
# How torch's CPU allocator says so; it raises a plain RuntimeError.
_CPU_MESSAGES = ("can't allocate memory", "not enough memory")


def cache_bytes(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    *,
    dtype: torch.dtype = torch.float32,
    kv_cache: str | None = None,
) -> int:
    """Bytes of the keys and values of `batch_size` sequences of `max_length` positions.

    In `dtype`, or with kv_cache="int8" in a byte each and a float32 scale for each token and head.
    """
    head = config.head_dim + 4 if kv_cache == "int8" else config.head_dim * dtype.itemsize
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    return token * batch_size * max_length


def free_bytes(device: torch.device | str) -> int | None:
    """Memory that can still be taken on a device; None where nothing tells."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    with suppress(OSError, ValueError):
        for line in _MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def out_of_memory_message(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    *,
    dtype: torch.dtype,
    kv_cache: str | None,
    device: torch.device | str,
    free: int | None,
) -> str:
    """What was asked for, and which batch or length `free` bytes hold."""
    asked = cache_bytes(config, batch_size, max_length, dtype=dtype, kv_cache=kv_cache)
    stored = "int8" if kv_cache == "int8" else str(dtype).removeprefix("torch.")
    text = (
        f"generate: out of memory on {device}: the cache of keys and values takes "
        f"{_amount(asked)} for {batch_size} sequences x {max_length} positions x "
        f"{config.num_hidden_layers} layers x 2 x {config.num_key_value_heads} heads x "
        f"{config.head_dim} in {stored}"
    )
    if free is None:
        return text
    position = cache_bytes(config, 1, 1, dtype=dtype, kv_cache=kv_cache)
    batch, length = free // (position * max_length), free // (position * batch_size)
    text += f"; {_amount(free)} are free"
    fits = []
    if 1 <= batch < batch_size:
        fits.append(f"{batch} sequences of this length")
    if 1 <= length < max_length:
        fits.append(f"{length} positions at this batch size")
    if fits:
        return text + f", which hold at most {' or '.join(fits)}"
    if asked > free:
        return text + ", which do not hold one position of each sequence"
    return text + ", which hold the cache but not the activations beside it: try a smaller batch"


@contextmanager
def explained_out_of_memory(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    *,
    dtype: torch.dtype,
    kv_cache: str | None,
    device: torch.device | str,
) -> Iterator[None]:
    """Raises torch.OutOfMemoryError with `out_of_memory_message` for any failed allocation."""
    try:
        yield
    except RuntimeError as error:
        is_cuda = isinstance(error, torch.OutOfMemoryError)
        if not is_cuda and not any(text in str(error) for text in _CPU_MESSAGES):
            raise
        message = out_of_memory_message(
            config,
            batch_size,
            max_length,
            dtype=dtype,
            kv_cache=kv_cache,
            device=device,
            free=free_bytes(device),
        )
        raise torch.OutOfMemoryError(message) from error


def _amount(size: int) -> str:
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:.2f} {unit}"
    return f"{size} bytes"
