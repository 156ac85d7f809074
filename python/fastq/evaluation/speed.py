"""How fast a model reads and generates, and in how much memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..runtime import CausalLM, cache_bytes, generate_tokens


@dataclass
class Speed:
    """Medians. Tokens are those of all sequences together; `peak_bytes` is the device's memory
    at its height, on a CPU that of the whole process."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes: int
    cache_bytes: int
    peak_bytes: int


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, a shared one counted once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def measure_speed(
    model: CausalLM,
    *,
    batch_size: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    kv_cache: str | None = None,
    repeats: int = 3,
    on_progress: Callable[[int], None] | None = None,
) -> Speed:
    """Times generation from random prompts, greedy and without a stop token.

    Prefill is the time to the first token, decoding all that follows. Everything runs once before
    it is timed; `on_progress` is called with 1 after that run and after each of the `repeats`.

    Raises ValueError for fewer than 2 new tokens, and what `generate_tokens` raises.
    """
    if new_tokens < 2:
        raise ValueError(f"bench: new_tokens is {new_tokens}, expected at least 2")
    if repeats < 1:
        raise ValueError(f"bench: repeats is {repeats}, expected at least 1")
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, prompt_tokens)
    prompts = torch.randint(model.config.vocab_size, shape, generator=generator)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    prefill, decode = [], []
    for run in range(repeats + 1):
        begin = time.perf_counter()
        steps = generate_tokens(
            model, prompts, max_new_tokens=new_tokens, stop_token_ids=(), kv_cache=kv_cache
        )
        next(steps)  # has waited for the device
        first = time.perf_counter()
        for _ in steps:
            pass
        if run > 0:
            prefill.append(first - begin)
            decode.append(time.perf_counter() - first)
        if on_progress is not None:
            on_progress(1)
    seconds = statistics.median(prefill)
    return Speed(
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_seconds=seconds,
        prefill_tokens_per_second=batch_size * prompt_tokens / seconds,
        decode_tokens_per_second=batch_size * (new_tokens - 1) / statistics.median(decode),
        weight_bytes=weight_bytes(model),
        cache_bytes=cache_bytes(
            model.config,
            batch_size,
            prompt_tokens + new_tokens,
            dtype=model.dtype,
            kv_cache=kv_cache,
        ),
        peak_bytes=_peak_bytes(model.device),
    )


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
