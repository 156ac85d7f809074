"""kv_append against the oracle, bit by bit, and the numbers that it must not touch."""

from __future__ import annotations

import pytest
import torch

import fastq
import reference
from kv_caches import CPU, empty_cache, kinds, random
from operands import FLOAT_DTYPES

PAGE_SIZES = [0, 16, 64]
each_kind = kinds(*FLOAT_DTYPES)
WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")


def tables(tokens, rotary_dim, kind=CPU, dtype=torch.float32):
    """rotary_cos and rotary_sin by name."""
    frequencies = 10000 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.outer(torch.arange(tokens), frequencies)
    return {
        "rotary_cos": angles.cos().to(kind.device, dtype),
        "rotary_sin": angles.sin().to(kind.device, dtype),
    }


def check(k, v, out=None, **arguments):
    """Appends, and holds the whole cache and the rotated q against the oracle. `out` may be "q"."""
    expected = reference.kv_append(k, v, **arguments)
    q = arguments.get("q")
    got = fastq.kv_append(k, v, out=q if out == "q" else out, **arguments)
    for name, its in zip(WRITTEN, expected, strict=False):
        if its is not None:
            reference.assert_same(arguments[name], its)
    if q is None:
        assert got is None
    else:
        assert got is q if out == "q" else out is None or got is out
        assert (got.dtype, got.device) == (q.dtype, q.device)
        reference.assert_same(got, expected[4])


@each_kind
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("seqlen_new", [1, 5, 40])
def test_append(seqlen_new, page_size, is_int8, kind):
    lengths = (100, 0, 1, 40, 17)  # those below seqlen_new: padding on the left
    cache = empty_cache(lengths, 3, 40, kind, capacity=100, page_size=page_size, is_int8=is_int8)
    k, v = (random(5, seqlen_new, 3, 40, kind=kind, seed=i) for i in (1, 2))
    check(k, v, **cache)


@each_kind
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [2, 22, 64])
def test_rotation(rotary_dim, interleaved, is_int8, kind):
    cache = empty_cache((50, 3, 21), 2, 64, kind, capacity=60, page_size=16, is_int8=is_int8)
    k, v, q = (random(3, 4, heads, 64, kind=kind, seed=heads) for heads in (2, 2, 6))
    options = {**cache, "rotary_interleaved": interleaved, "q": q}
    check(k, v, **options, **tables(50, rotary_dim, kind))
    check(k, v, **options, **tables(50, rotary_dim, kind, kind.dtype))
    check(k, v, out=torch.full_like(q, 77), **options, **tables(50, rotary_dim, kind))
    check(k, v, out="q", **options, **tables(50, rotary_dim, kind))
