"""Caches of keys and values for the tests: contiguous or pages in any order, float or int8. What no
sequence has is NaN, or of an int8 cache has scale NaN."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

import reference


class Kind(NamedTuple):
    device: str
    dtype: torch.dtype

    def __str__(self):
        return f"{self.device}-{str(self.dtype).removeprefix('torch.')}"


CPU = Kind("cpu", torch.float32)


def kinds(*cpu_dtypes):
    """A parameter for every dtype on every device."""
    params = [Kind("cpu", dtype) for dtype in cpu_dtypes]
    for dtype in (torch.float16, torch.bfloat16):
        params.append(pytest.param(Kind("cuda", dtype), marks=pytest.mark.cuda))
    return pytest.mark.parametrize("kind", params, ids=str)


def random(*shape, kind=CPU, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(kind.device, kind.dtype)


def page_table(lengths, capacity, page_size, seed=0):
    """(batch, max_pages) and the number of pages: each in use once, in no order; the entries that
    no sequence uses name one that none has."""
    max_pages = -(-capacity // page_size)
    used = [-(-length // page_size) for length in lengths]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(used) + 3, generator=generator).tolist()
    table = torch.full((len(lengths), max_pages), order.pop(), dtype=torch.int32)
    for b, count in enumerate(used):
        for i in range(count):
            table[b, i] = order.pop()
    return table, sum(used) + 3


def make_cache(
    lengths, heads_k, head_dim, kind=CPU, *, capacity=None, page_size=0, is_int8=False, seed=0
):
    """The cache's arguments of flash_decode and kv_append, by name."""
    capacity = max(lengths) if capacity is None else capacity
    table, shape = None, (len(lengths), capacity)
    if page_size > 0:
        table, num_pages = page_table(lengths, capacity, page_size, seed)
        shape = (num_pages, page_size)
    cache = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=kind.device)}
    if table is not None:
        cache["block_table"] = table.to(kind.device)
    for at, name in enumerate(("k", "v")):
        x = torch.full((*shape, heads_k, head_dim), math.nan)
        for b, length in enumerate(lengths):
            rows = random(length, heads_k, head_dim, seed=1000 * seed + 10 * b + at)
            if table is None:
                x[b, :length] = rows
                continue
            for i in range(0, length, page_size):
                x[table[b, i // page_size], : min(page_size, length - i)] = rows[i : i + page_size]
        if is_int8:
            q, scale = (torch.from_numpy(part) for part in reference.quantize(x))
            cache[f"{name}_cache"] = q.to(kind.device)
            cache[f"{name}_scale"] = scale.to(kind.device)
        else:
            cache[f"{name}_cache"] = x.to(kind.device, kind.dtype)
    return cache


def empty_cache(lengths, heads_k, head_dim, kind=CPU, *, capacity, page_size=0, is_int8=False):
    """As make_cache, but nothing is in it yet: 77 everywhere, for lengths to come."""
    cache = make_cache(
        lengths, heads_k, head_dim, kind, capacity=capacity, page_size=page_size, is_int8=is_int8
    )
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if name in cache:
            cache[name].fill_(77)
    return cache
