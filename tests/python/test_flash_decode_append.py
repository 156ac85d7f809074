"""flash_decode of new tokens that it appends itself: bit by bit what kv_append and then
flash_decode give, which have oracles of their own."""

from __future__ import annotations

import pytest
import torch

import fastq
import reference
from kv_caches import Kind, kinds, make_cache, random
from operands import FLOAT_DTYPES
from test_kv_append import WRITTEN, tables

each_kind = kinds(*FLOAT_DTYPES)
each_cache = pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])


def check(q, k, v, cache, out=None, rotation=None, **options):
    """Both ways, from copies of the same cache; and some of the sequences by themselves."""
    check_together(q, k, v, cache, out, rotation or {}, **options)
    for b in {0, q.shape[0] - 1} if q.shape[0] > 1 else ():
        own = slice(b, b + 1)
        shared = set(WRITTEN) if "block_table" in cache else set()
        alone = {name: x if name in shared else x[own] for name, x in cache.items()}
        its = dict(options)
        if "alibi_slopes" in options:
            its["alibi_slopes"] = options["alibi_slopes"][own]
        check_together(q[own], k[own], v[own], alone, None, rotation or {}, **its)


def check_together(q, k, v, cache, out, rotation, **options):
    apart = cache | {name: cache[name].clone() for name in cache.keys() & set(WRITTEN)}
    before = q.clone()
    rotated = fastq.kv_append(k, v, q=q if rotation else None, **apart, **rotation)
    expected = fastq.flash_decode(rotated if rotation else q, return_lse=True, **apart, **options)
    got = fastq.flash_decode(q, return_lse=True, k=k, v=v, out=out, **cache, **rotation, **options)
    for its, theirs in zip(got, expected, strict=True):
        reference.assert_same(its, reference.to_numpy(theirs))
    for name in cache.keys() & set(WRITTEN):
        reference.assert_same(cache[name], reference.to_numpy(apart[name]))
    reference.assert_same(q, reference.to_numpy(before))
    assert out is None or got[0] is out


def new_tokens(batch, seqlen, heads, heads_k, head_dim, kind):
    return [
        random(batch, seqlen, count, head_dim, kind=kind, seed=7 + i)
        for i, count in enumerate((heads, heads_k, heads_k))
    ]


@each_kind
@each_cache
@pytest.mark.parametrize("page_size", [0, 16, 64])
@pytest.mark.parametrize("seqlen", [1, 3])
def test_lengths(seqlen, page_size, is_int8, kind):
    lengths = (300, 0, 1, 2, 63, 64, 65, 77, 129)  # those below seqlen: padding on the left
    cache = make_cache(lengths, 2, 64, kind, page_size=page_size, is_int8=is_int8)
    tokens = new_tokens(len(lengths), seqlen, 4, 2, 64, kind)
    check(*tokens, cache)
    check(*tokens, cache, rotation=tables(300, 64, kind), out=torch.zeros_like(tokens[0]))


@each_kind
@each_cache
@pytest.mark.parametrize("length", [1, 64, 128, 513, 1500])
@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (32, 1), (5, 5)], ids=str)
def test_one_sequence(heads, length, is_int8, kind):
    """Whose keys the blocks of a cluster share, where there are clusters."""
    for page_size in (0, 64):
        cache = make_cache((length,), heads[1], 128, kind, page_size=page_size, is_int8=is_int8)
        check(*new_tokens(1, 1, *heads, 128, kind), cache, rotation=tables(length, 128, kind))


@each_kind
@each_cache
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [2, 22, 40])
@pytest.mark.parametrize("head_dim", [40, 80, 128, 160, 256])
def test_rotation(head_dim, rotary_dim, interleaved, is_int8, kind):
    cache = make_cache((50, 3, 21), 2, head_dim, kind, capacity=60, is_int8=is_int8)
    for heads in (2, 6, 40):  # 40: several tiles of a key head's queries
        tokens = new_tokens(3, 1, heads, 2, head_dim, kind)
        for dtype in (torch.float32, kind.dtype):
            rotation = tables(50, rotary_dim, kind, dtype)
            check(*tokens, cache, rotation=rotation | {"rotary_interleaved": interleaved})


@each_kind
@each_cache
def test_options(is_int8, kind):
    cache = make_cache((200, 33, 97), 3, 64, kind, is_int8=is_int8)
    tokens = new_tokens(3, 1, 6, 3, 64, kind)
    rotation = tables(200, 64, kind)
    slopes = torch.rand(3, 6, device=kind.device)
    check(*tokens, cache, rotation=rotation, window=(20, -1))
    check(*tokens, cache, rotation=rotation, causal=False, softcap=5.0)
    check(*tokens, cache, alibi_slopes=slopes, softmax_scale=0.3)


@kinds(torch.float32, torch.bfloat16)
@each_cache
def test_any_strides(is_int8, kind):
    cache = make_cache((20, 3, 6), 2, 40, kind, is_int8=is_int8)
    joint = random(3, 1, 8, 40, kind=kind)
    for name in cache.keys() & set(WRITTEN):
        cache[name] = cache[name].transpose(1, 2).contiguous().transpose(1, 2)
    check(*joint.split([4, 2, 2], dim=2), cache, rotation=tables(20, 32, kind))
    for name in ("k_cache", "v_cache"):  # rows at odd addresses
        wide = torch.zeros(*cache[name].shape[:3], 41, dtype=cache[name].dtype, device=kind.device)
        wide[..., 1:] = cache[name]
        cache[name] = wide[..., 1:]
    check(*joint.split([4, 2, 2], dim=2), cache, rotation=tables(20, 32, kind))


@pytest.mark.cuda
@each_cache
@pytest.mark.parametrize("length", [3, 200])
def test_many_sequences_in_a_graph(length, is_int8):
    """Step by step, lengths that only the device knows."""
    kind = Kind("cuda", torch.float16)
    lengths = [length + 7 * i for i in range(20)]
    caches = [
        make_cache(lengths, 4, 128, kind, capacity=400, page_size=16, is_int8=is_int8)
        for _ in range(2)
    ]
    q, k, v = new_tokens(20, 1, 8, 4, 128, kind)
    rotation = tables(400, 128, kind)

    def step(cache):
        cache["cache_seqlens"].add_(1)
        return fastq.flash_decode(q, k=k, v=v, **cache, **rotation)

    for cache in caches:
        cache["block_table"] = torch.arange(20 * 25, device="cuda").int().view(20, 25)
        shape = (20 * 25, *cache["k_cache"].shape[1:])
        generator = torch.Generator("cuda").manual_seed(0)
        for name in cache.keys() & set(WRITTEN):
            its = torch.rand(shape[: cache[name].dim()], generator=generator, device="cuda") * 9
            cache[name] = its.to(cache[name].dtype)
    step(caches[0]), step(caches[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(caches[0])
    for _ in range(5):
        graph.replay()
        reference.assert_same(replayed, reference.to_numpy(step(caches[1])))


def test_nothing_to_attend():
    cache = make_cache((7, 5), 2, 16)
    q, k, v = new_tokens(2, 0, 4, 2, 16, Kind("cpu", torch.float32))
    assert fastq.flash_decode(q, k=k, v=v, **cache).shape == (2, 0, 4, 16)


def bad(message, error=ValueError, **changes):
    cache = make_cache((40, 7), 2, 16)
    q, k, v = new_tokens(2, 3, 4, 2, 16, Kind("cpu", torch.float32))
    with pytest.raises(error, match=message):
        fastq.flash_decode(**({"q": q, "k": k, "v": v} | cache | changes))


def test_bad_tokens():
    k = random(2, 3, 2, 16)
    bad("flash_decode: only one of k and v is given", v=None)
    bad("flash_decode: k is a list, expected a torch.Tensor", TypeError, k=[1])
    bad("flash_decode: k has dtype float16, expected float32", TypeError, k=k.half())
    bad(r"flash_decode: k has shape .*expected \(2, 3, heads, head_dim\) as q has", k=k[:, :2])
    bad("v has shape", v=k[:, :, :1])
    bad("heads as k has", k=k[:, :, :1], v=k[:, :, :1])
    held = torch.zeros(2, 3, 4, 16)
    bad("flash_decode: out overlaps k in memory", k=held[:, :, :2], out=held)
    held = torch.zeros(2, 40, 2, 16)
    bad("k_cache overlaps v in memory", k_cache=held, v=held[:, :3])
    bad("k_cache overlaps q in memory", k_cache=held, q=held.view(2, 20, 4, 16)[:, :3])


def test_bad_rotation():
    cos = torch.zeros(40, 8)
    bad(
        "flash_decode: a rotary table is given, but k and v are not", k=None, v=None, rotary_cos=cos
    )
    bad("only one of rotary_cos and rotary_sin is given", rotary_cos=cos)
    short = {"rotary_cos": cos[:30], "rotary_sin": cos[:30]}
    bad(r"cache_seqlens\[0\] is 40, but rotary_cos has rows for 30 tokens", **short)
