"""What flash_decode says of arguments that it does not take."""

from __future__ import annotations

import math

import pytest
import torch

import fastq
from kv_caches import make_cache, random


def good(page_size=0, is_int8=False):
    return {"q": random(2, 3, 4, 16)} | make_cache(
        (40, 7), 2, 16, page_size=page_size, is_int8=is_int8
    )


def bad(message, error=ValueError, page_size=0, is_int8=False, **changes):
    arguments = good(page_size, is_int8) | changes
    with pytest.raises(error, match=f"flash_decode: {message}"):
        fastq.flash_decode(**arguments)


def test_bad_queries():
    g = good()
    bad("q is a list, expected a torch.Tensor", TypeError, q=[1])
    bad("q requires grad", q=g["q"].clone().requires_grad_())
    bad("q has dtype int32", TypeError, q=g["q"].int())
    bad(r"q has shape \(3, 4, 16\), expected \(batch, seqlen, heads, head_dim\)", q=g["q"][0])
    wide = g["k_cache"].new_zeros(2, 40, 2, 257)
    bad("q has shape .*head_dim from 1 to 256", q=random(2, 3, 4, 257), k_cache=wide, v_cache=wide)
    bad("out has shape", out=torch.zeros(2, 3, 4, 8))
    bad("out has dtype float16", TypeError, out=torch.zeros(2, 3, 4, 16).half())
    bad("out has stride 2 along head_dim", out=torch.zeros(2, 3, 4, 32)[..., ::2])
    bad("out overlaps q in memory", q=g["q"], out=g["q"])
    held = g["k_cache"].nan_to_num()
    bad("out overlaps k_cache", k_cache=held, out=held.view(-1)[:384].view(2, 3, 4, 16))
    bad("out of shape .* overlaps itself", out=torch.zeros(1, 3, 4, 16).expand(2, 3, 4, 16))


def test_bad_options():
    bad("softmax_scale is 0", softmax_scale=0.0)
    bad("softmax_scale is nan", softmax_scale=math.nan)
    bad("softcap is -1", softcap=-1.0)
    bad("window is 5, expected two ints", TypeError, window=5)
    bad("alibi_slopes has shape", alibi_slopes=torch.zeros(3))
    bad("alibi_slopes has dtype float16", TypeError, alibi_slopes=torch.zeros(4).half())


def test_bad_caches():
    g = good()
    k, v = g["k_cache"], g["v_cache"]
    bad("k_cache is a NoneType", TypeError, k_cache=None)
    bad("k_cache has dtype float16, expected float32 or int8", TypeError, k_cache=k.half())
    bad("v_cache has dtype int8, expected float32", TypeError, v_cache=v.nan_to_num().char())
    bad(r"k_cache has shape .*expected \(batch, capacity, heads, head_dim\)", k_cache=k[0])
    bad("v_cache has shape .* as k_cache has", v_cache=v[:, 1:])
    bad("k_cache has shape .*expected batch 2 as q has", k_cache=k[:1], v_cache=v[:1])
    bad("k_cache has shape .*head_dim 16 as q has", k_cache=k[..., :8], v_cache=v[..., :8])
    three = k.new_zeros(2, 40, 3, 16)
    bad("k_cache has shape .*a number of heads that divides q's 4", k_cache=three, v_cache=three)
    stepped = k.repeat_interleave(2, -1)[..., ::2]
    bad("k_cache has stride 2 along head_dim, expected 1", k_cache=stepped)
    bad("v_cache has stride 2 along head_dim, expected 1", v_cache=stepped)
    bad("k_scale is given, but the cache is float32", k_scale=torch.ones(2, 40, 2))
    bad("k_scale is missing, and the cache is int8", is_int8=True, k_scale=None)
    bad("v_scale is missing, and the cache is int8", is_int8=True, v_scale=None)
    bad("v_scale has dtype float16", TypeError, is_int8=True, v_scale=torch.ones(2, 40, 2).half())
    bad(r"k_scale has shape .*\(2, 40, 2\)", is_int8=True, k_scale=torch.ones(2, 2, 40))
    bad(r"k_scale has shape .*\(2, 40, 2\)", is_int8=True, k_scale=torch.ones(2, 40, 2, 1))


def test_bad_lengths_and_pages():
    g = good(16)
    table = g["block_table"]
    lengths = g["cache_seqlens"]
    bad("cache_seqlens has dtype int64", TypeError, cache_seqlens=lengths.long())
    bad(r"cache_seqlens has shape \(3,\), expected \(batch,\)", cache_seqlens=torch.ones(3).int())
    bad(r"cache_seqlens\[1\] is -1, expected 0 to 40", cache_seqlens=torch.tensor([40, -1]).int())
    bad(r"cache_seqlens\[0\] is 41, expected 0 to 40", cache_seqlens=torch.tensor([41, 7]).int())
    bad(r"cache_seqlens\[1\] is 49.*to 48", page_size=16, cache_seqlens=torch.tensor([4, 49]).int())
    bad("block_table has dtype int64", TypeError, page_size=16, block_table=table.long())
    bad(r"block_table has shape \(3,\)", page_size=16, block_table=table[0])
    bad("block_table has stride 2", page_size=16, block_table=table.repeat_interleave(2, 1)[:, ::2])
    for size in (8, 24):
        pages = g["k_cache"].new_zeros(7, size, 2, 16)
        bad("k_cache has shape .*a page_size", page_size=16, k_cache=pages, v_cache=pages)
    for page in (-1, len(g["k_cache"])):
        wrong = table.clone()
        wrong[1, 0] = page
        bad(
            rf"block_table\[1, 0\] is {page}, expected 0 to 6.*1 has 7 tokens",
            block_table=wrong,
            page_size=16,
        )
    unused = table.clone()
    unused[1, 1:] = -5
    fastq.flash_decode(**g | {"block_table": unused})


@pytest.mark.cuda
def test_mixed_devices():
    g = good(16, True)
    for name in g.keys() - {"q"}:
        with pytest.raises(
            TypeError, match=f"flash_decode: {name} is on cuda:0, expected cpu as q"
        ):
            fastq.flash_decode(**g | {name: g[name].cuda()})
