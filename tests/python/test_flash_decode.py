"""flash_decode against float64, within twice the error of the plain formula in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastq
import reference
from attention_formula import assert_close, torch_attention
from kv_caches import kinds, make_cache, random
from operands import FLOAT_DTYPES

PAGE_SIZES = [0, 16, 64, 256]
LENGTHS = (300, 0, 1, 64, 65, 77)
HEAD_DIMS = [1, 40, 64, 80, 96, 128, 160, 256]
each_kind = kinds(*FLOAT_DTYPES)
paged = pytest.mark.parametrize("page_size", PAGE_SIZES)


def torch_decode(q, *, causal=True, alibi_slopes=None, **arguments):
    """The plain formula with torch in q's dtype, the keys of an int8 cache rounded to it."""
    names = ("k_cache", "v_cache", "cache_seqlens", "block_table", "k_scale", "v_scale")
    cache = {name: arguments.pop(name) for name in names if name in arguments}
    out = []
    for b in range(q.shape[0]):
        k, v = (x.to(q.device, q.dtype) for x in reference.sequence(b, **cache))
        slopes = (
            alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        )
        its = torch_attention(q[b : b + 1], k, v, causal=causal, alibi_slopes=slopes, **arguments)
        out.append(its)
    return torch.cat(out)


def check(q, **arguments):
    out, lse = fastq.flash_decode(q, return_lse=True, **arguments)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    expected, expected_lse = reference.flash_decode(q, **arguments)
    assert_close(out, expected, torch_decode(q, **arguments))
    assert lse.dtype == torch.float32
    np.testing.assert_allclose(lse.cpu().numpy(), expected_lse, rtol=2e-6, atol=2e-5)


@each_kind
@paged
@pytest.mark.parametrize("seqlen_q", [1, 3, 17, 70])
def test_lengths(seqlen_q, page_size, kind):
    cache = make_cache(LENGTHS, 2, 64, kind, page_size=page_size)
    check(random(len(LENGTHS), seqlen_q, 4, 64, kind=kind), **cache)
