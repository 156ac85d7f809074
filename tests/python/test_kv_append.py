"""kv_append against the oracle, bit by bit, and the numbers that it must not touch."""

from __future__ import annotations

import math

import pytest
import torch

import fastq
import reference
from kv_caches import CPU, Kind, empty_cache, kinds, random
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


@each_kind
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("head_dim", [1, 40, 64, 80, 96, 128, 160, 256])
def test_head_dims(head_dim, is_int8, kind):
    cache = empty_cache((9, 4), 2, head_dim, kind, capacity=9, is_int8=is_int8)
    k, v, q = (random(2, 5, heads, head_dim, kind=kind, seed=heads) for heads in (2, 2, 4))
    if head_dim == 1:
        check(k, v, **cache)
        return
    check(k, v, q=q, **cache, **tables(9, head_dim // 2 // 2 * 2 or 2, kind))
    check(k, v, q=q, rotary_interleaved=True, **cache, **tables(9, head_dim // 2 * 2, kind))


@each_kind
@pytest.mark.parametrize("head_dim", [12, 64, 256])
def test_many_heads(head_dim, kind):
    """More than the rows that a block of threads has."""
    for is_int8 in (False, True):
        cache = empty_cache((3, 0), 33, head_dim, kind, capacity=3, is_int8=is_int8)
        k, v, q = (random(2, 2, heads, head_dim, kind=kind, seed=heads) for heads in (33, 33, 99))
        check(k, v, q=q, **cache, **tables(3, head_dim, kind))


@each_kind
def test_rotated_numbers_are_quantised_before_they_are_rounded(kind):
    """The scale has more digits than k's dtype."""
    cache = empty_cache((8,), 1, 32, kind, capacity=8, is_int8=True)
    k, v = (random(1, 8, 1, 32, kind=kind, seed=seed) for seed in (1, 2))
    check(k, v, **cache, **tables(8, 32, kind))
    if kind.dtype != torch.float32:
        largest = cache["k_scale"] * 127
        assert not torch.equal(largest.to(kind.dtype).float(), largest)


@each_kind
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e-44])
def test_rows_that_are_special(value, kind):
    """Only the head that has the value shows it; rows of zeros have scale 1, tiny ones FLT_MIN."""
    k, v = (random(2, 3, 2, 24, kind=kind, seed=seed) for seed in (1, 2))
    k[0, 1, 1] = 0
    v[0, 1, 0] = 0
    k[0, 1, 1, 5] = value
    v[0, 1, 0, 23] = value
    for is_int8 in (False, True):
        cache = empty_cache((3, 6), 2, 24, kind, capacity=8, is_int8=is_int8)
        check(k, v, **cache)
        check(k, v, q=k.clone(), **cache, **tables(6, 24, kind))


@kinds(torch.float32, torch.bfloat16)
def test_any_strides(kind):
    def moved(x, i, j):
        return x.transpose(i, j).contiguous().transpose(i, j)

    fused = random(3, 6, 8, 40, kind=kind)
    for is_int8, page_size in ((False, 0), (True, 0), (False, 16), (True, 16)):
        cache = empty_cache(
            (20, 3, 6), 2, 40, kind, capacity=20, page_size=page_size, is_int8=is_int8
        )
        cos = {name: moved(x, 0, 1) for name, x in tables(20, 32, kind).items()}
        q, k, v = fused.clone().split([4, 2, 2], dim=2)
        check(k, v, q=q, out="q", **cache, **cos)  # beside k and v in memory
        for name in cache.keys() & set(WRITTEN):
            cache[name] = moved(cache[name], 1, 2)
        cache["cache_seqlens"] = torch.stack([cache["cache_seqlens"]] * 2, dim=1)[:, 0]
        for i, j in ((1, 2), (1, 3), (0, 1)):
            check(moved(k, i, j), moved(v, i, j), q=moved(q, i, j), **cache, **cos)
        both = torch.stack([cache["k_cache"], cache["v_cache"]], dim=1)
        check(k, v, **cache | {"k_cache": both[:, 0], "v_cache": both[:, 1]})
        both = torch.stack([cache["k_cache"], cache["v_cache"]], dim=2)
        check(k, v, **cache | {"k_cache": both[:, :, 0], "v_cache": both[:, :, 1]})


@kinds(torch.float32)
def test_nothing_to_do(kind):
    cache = empty_cache((7, 5), 2, 16, kind, capacity=8)
    k = random(2, 3, 2, 16, kind=kind)
    assert fastq.kv_append(k[:, :0], k[:, :0], **cache) is None
    q = fastq.kv_append(k[:, :0], k[:, :0], q=k[:, :0], **cache, **tables(8, 16, kind))
    assert q.shape == (2, 0, 2, 16)
    none = {name: tensor[:0] for name, tensor in cache.items()}
    assert fastq.kv_append(k[:0], k[:0], **none) is None
    assert all((cache[name] == 77).all() for name in ("k_cache", "v_cache"))
    full = empty_cache((0, 0), 2, 16, kind, capacity=0)
    check(k, k, q=k, **full, **tables(8, 16, kind))  # only padding


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512vnni", "amx", "neon"])
def test_every_instruction_set(monkeypatch, isa):
    if isa not in fastq.describe()["cpu"]["available"]:
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    for dtype in FLOAT_DTYPES:
        kind = Kind("cpu", dtype)
        for is_int8 in (False, True):
            cache = empty_cache((90, 7), 3, 72, kind, capacity=90, page_size=16, is_int8=is_int8)
            k, v, q = (random(2, 20, heads, 72, kind=kind, seed=heads) for heads in (3, 3, 6))
            for interleaved in (False, True):
                options = {"q": q, "rotary_interleaved": interleaved, **tables(90, 70)}
                check(k, v, **cache, **options)


@pytest.mark.cuda
@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "paged"])
def test_offsets_past_int32(is_paged):
    """Tokens of the cache whose offsets, in elements, are past 2**31."""
    kind = Kind("cuda", torch.bfloat16)
    k, v = (random(1, 48, 1, 64, kind=kind, seed=seed) for seed in (1, 2))
    storage = torch.empty(2**31 + 2**28, dtype=torch.bfloat16, device="cuda")
    cache = {"cache_seqlens": torch.tensor([48], dtype=torch.int32, device="cuda")}
    for name, at in (("k_cache", 0), ("v_cache", 4096)):
        if is_paged:
            cache[name] = storage.as_strided((3, 16, 1, 64), (2**30, 64, 64, 1), at)
        else:
            cache[name] = storage.as_strided((1, 48, 1, 64), (0, 2**25 + 2**24, 64, 1), at)
    if is_paged:
        cache["block_table"] = torch.arange(3, dtype=torch.int32, device="cuda")[None]
    fastq.kv_append(k, v, **cache)
    for name, x in (("k_cache", k), ("v_cache", v)):
        assert torch.equal(cache[name].reshape(48, 64), x[0, :, 0])


@kinds()
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
def test_replay_of_a_graph_with_other_lengths(is_int8, kind):
    lengths = (60, 64, 50)
    cache = empty_cache(lengths, 2, 64, kind, capacity=64, page_size=16, is_int8=is_int8)
    k, v, q = (random(3, 1, heads, 64, kind=kind, seed=heads) for heads in (2, 2, 4))
    options = {**cache, **tables(64, 64, kind), "q": q}
    cache["cache_seqlens"].fill_(1)
    fastq.kv_append(k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fastq.kv_append(k, v, **options)
    for new in (lengths, (1, 0, 17)):
        cache["cache_seqlens"].copy_(torch.tensor(new))
        for x in (k, v, q):
            x.copy_(random(*x.shape, kind=kind, seed=new[0]))
        expected = reference.kv_append(k, v, **options)
        graph.replay()
        for name, its in zip(WRITTEN, expected, strict=False):
            if its is not None:
                reference.assert_same(cache[name], its)
        reference.assert_same(got, expected[4])


@pytest.mark.cuda
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
def test_cuda_leaves_out_what_lies_past_the_cache(is_int8):
    kind = Kind("cuda", torch.bfloat16)
    cache = empty_cache((5, 8), 2, 16, kind, capacity=8, is_int8=is_int8)
    held = {
        name: torch.full_like(torch.cat([cache[name]] * 2), 77)
        for name in cache.keys() & set(WRITTEN)
    }
    for name, whole in held.items():
        cache[name] = whole[:2]
    k = random(2, 4, 2, 16, kind=kind)
    cache["cache_seqlens"][1] = 10
    fastq.kv_append(k, k, **cache)
    torch.cuda.synchronize()
    assert all((whole[2:] == 77).all() for whole in held.values())


def good(page_size=0, is_int8=False):
    cache = empty_cache((40, 7), 2, 16, capacity=40, page_size=page_size, is_int8=is_int8)
    k = random(2, 3, 2, 16)
    return {"k": k, "v": k + 1, "q": random(2, 3, 4, 16)} | cache | tables(40, 8)


def bad(message, error=ValueError, page_size=0, is_int8=False, **changes):
    arguments = good(page_size, is_int8) | changes
    with pytest.raises(error, match=f"kv_append: {message}"):
        fastq.kv_append(**arguments)
    for name in set(WRITTEN) & arguments.keys() - changes.keys():
        assert (arguments[name] == 77).all()


def test_bad_rows():
    g = good()
    bad("k is a list, expected a torch.Tensor", TypeError, k=[1])
    bad("k requires grad", k=g["k"].clone().requires_grad_())
    bad("k has dtype int32", TypeError, k=g["k"].int())
    bad("v has dtype float16, expected float32", TypeError, v=g["v"].half())
    bad(r"k has shape \(3, 2, 16\), expected \(batch, seqlen, heads, head_dim\)", k=g["k"][0])
    bad("v has shape .* as k has", v=g["v"][:, :2])
    bad("q has dtype float16, expected float32", TypeError, q=g["q"].half())
    bad(r"q has shape .*expected \(2, 3, heads, 16\) as k has", q=g["q"][:, :2])
    bad("k_cache has shape .*a number of heads that divides q's 3", q=g["q"][:, :, :3])
    bad("q is given, but there is no rotary_cos", rotary_cos=None, rotary_sin=None)
    bad("out is given, but q is not", q=None, out=g["q"])


def test_bad_tables():
    g = good()
    cos = g["rotary_cos"]
    bad("only one of rotary_cos and rotary_sin", rotary_sin=None)
    bad("only one of rotary_cos and rotary_sin", rotary_cos=None, q=None)
    bad("rotary_cos has dtype float16, expected float32", TypeError, rotary_cos=cos.half())
    bad("rotary_sin has dtype float16, expected float32", TypeError, rotary_sin=cos.half())
    bad(r"rotary_cos has shape \(40,\)", rotary_cos=cos[:, 0])
    bad("rotary_sin has shape .* as rotary_cos has", rotary_sin=cos[:, :2])
    for wrong in (cos[:0], cos[:, :0], torch.ones(40, 9)):
        bad("rotary_cos has shape .*rotary_dim from 2 to head_dim = 16", rotary_cos=wrong)
    bad(
        r"cache_seqlens\[0\] is 40, but rotary_cos has rows for 39 tokens",
        rotary_cos=cos[:39],
        rotary_sin=cos[:39],
    )


def test_bad_caches():
    g = good()
    k = g["k_cache"]
    three = k.new_zeros(2, 40, 4, 16)
    bad("k_cache has shape .*expected 2 heads as k has", k_cache=three, v_cache=three + 1)
    bad("k_cache has dtype float16, expected float32 or int8", TypeError, k_cache=k.half())
    bad("k_cache has shape .*expected batch 2 as k has", k_cache=k[:1], v_cache=k[:1])
    bad("v_scale is missing, and the cache is int8", is_int8=True, v_scale=None)
    bad("k_scale is given, but the cache is float32", k_scale=torch.ones(2, 40, 2))
    bad(r"cache_seqlens\[1\] is -1, expected 0 to 40", cache_seqlens=torch.tensor([40, -1]).int())
    bad(r"cache_seqlens\[0\] is 41, expected 0 to 40", cache_seqlens=torch.tensor([41, 7]).int())
    table = good(16)["block_table"]
    wrong = table.clone()
    wrong[0, :2] = -1  # no token of the call is there
    fastq.kv_append(**good(16) | {"block_table": wrong})
    wrong[0, 2] = 99
    bad(r"block_table\[0, 2\] is 99, expected 0 to .*has 40", page_size=16, block_table=wrong)


def test_overlaps():
    g = good()
    k, v = g["k_cache"], g["v_cache"]
    held = torch.full((3, 40, 2, 16), 77.0)
    bad("k_cache of shape .* overlaps itself", k_cache=k[:1].expand(2, -1, -1, -1))
    bad("v_cache overlaps k_cache in memory", k_cache=k, v_cache=k)
    bad("v_cache overlaps k_cache in memory", k_cache=held[:2], v_cache=held[1:])
    bad("k_cache overlaps k in memory", k_cache=k, k=k[:, :3])
    bad("v_cache overlaps q in memory", v_cache=v, q=v.view(2, 20, 4, 16)[:, :3])
    bad("k_cache overlaps cache_seqlens", k_cache=k, cache_seqlens=k.view(torch.int32)[0, 0, 0, :2])
    rows = random(2, 4, 4, 16)
    bad("out overlaps q in memory", q=rows[:, :3], out=rows[:, 1:])
    bad("out overlaps k in memory", k=rows[:, :3, 1:3], out=rows[:, :3])
    bad("out overlaps v_cache in memory", v_cache=v, out=v.view(2, 20, 4, 16)[:, :3])
    scale = good(is_int8=True)["k_scale"]
    bad("v_scale overlaps k_scale in memory", is_int8=True, k_scale=scale, v_scale=scale)


@pytest.mark.cuda
def test_mixed_devices():
    g = good(16, True)
    for name in g.keys() - {"k"}:
        with pytest.raises(TypeError, match=f"kv_append: {name} is on cuda:0, expected cpu as k"):
            fastq.kv_append(**g | {name: g[name].cuda()})
