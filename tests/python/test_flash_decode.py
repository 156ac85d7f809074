"""flash_decode against float64, within twice the error of the plain formula in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastq
import reference
from attention_formula import assert_close, torch_attention
from kv_caches import Kind, empty_cache, kinds, make_cache, random
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


@kinds(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_long_sequences(seqlen_q, is_int8, kind):
    """Keys that are divided among processors, at the edges of what one takes."""
    lengths = (2048, 600, 1100, 511, 512, 513)
    cache = make_cache(lengths, 2, 64, kind, page_size=64, is_int8=is_int8)
    check(random(6, seqlen_q, 2, 64, kind=kind), **cache)


@kinds(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("seqlen_q", [1, 3, 20])
@pytest.mark.parametrize("heads", [(32, 1), (6, 2), (5, 5), (32, 8), (12, 12)], ids=str)
def test_grouped_heads(heads, seqlen_q, is_int8, kind):
    cache = make_cache((200, 33, 97), heads[1], 32, kind, is_int8=is_int8)
    check(random(3, seqlen_q, heads[0], 32, kind=kind), **cache)


@each_kind
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, page_size, kind):
    for is_int8 in (False, True):
        cache = make_cache((130, 65), 2, head_dim, kind, page_size=page_size, is_int8=is_int8)
        for seqlen_q, heads in ((1, 4), (17, 6)):
            check(random(2, seqlen_q, heads, head_dim, kind=kind), **cache)


@each_kind
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("megabytes", [100, 1000, 8000])
def test_large_caches(megabytes, head_dim, is_int8, kind):
    """Few tokens, but a table of pages for many: by that CUDA chooses its kernel."""
    token_bytes = 2 * 3 * head_dim * (1 if is_int8 else kind.dtype.itemsize)
    capacity = (megabytes << 20) // token_bytes // 16 * 16
    cache = make_cache(
        (900, 0, 77), 1, head_dim, kind, capacity=capacity, page_size=16, is_int8=is_int8
    )
    for seqlen_q, heads in ((1, 8), (1, 16), (1, 32), (3, 20)):
        check(random(3, seqlen_q, heads, head_dim, kind=kind), **cache)


@each_kind
@paged
def test_int8(page_size, kind):
    cache = make_cache(LENGTHS, 2, 64, kind, page_size=page_size, is_int8=True)
    for seqlen_q in (1, 3, 17, 70):
        check(random(len(LENGTHS), seqlen_q, 4, 64, kind=kind), **cache)


@each_kind
def test_int8_is_near_to_what_was_quantised(kind):
    """Normal keys and values: the output is at most 1 % off."""
    q = random(2, 3, 4, 128, kind=kind)
    whole = make_cache((300, 200), 2, 128)
    expected, _ = reference.flash_decode(q.float().cpu(), **whole)
    out = fastq.flash_decode(q, **make_cache((300, 200), 2, 128, kind, is_int8=True))
    error = out.double().cpu().numpy() - expected
    assert np.sqrt(np.mean(error**2)) <= 0.01 * np.sqrt(np.mean(expected**2))


@kinds(torch.float32)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "window", [(-1, -1), (0, 0), (16, -1), (-1, 16), (100, 7), (700, -1), (2**62, 5000)], ids=str
)
def test_windows(window, causal, kind):
    for seqlen_q, is_int8 in ((1, False), (3, True), (70, False), (70, True)):
        cache = make_cache((900, 5, 0, 130), 1, 40, kind, page_size=16, is_int8=is_int8)
        check(random(4, seqlen_q, 2, 40, kind=kind), window=window, causal=causal, **cache)


@kinds(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("seqlen_q", [1, 30])
def test_softcap_scale_and_alibi(seqlen_q, kind):
    q = random(2, seqlen_q, 4, 64, kind=kind)
    slopes = torch.tensor([0.5, 0.25, 0.01, 0.0], device=q.device)
    for is_int8 in (False, True):
        cache = make_cache((150, 90), 2, 64, kind, page_size=64, is_int8=is_int8)
        check(3 * q, softcap=5.0, **cache)
        check(q, softmax_scale=0.3, **cache)
        check(q, softmax_scale=-0.05, causal=False, **cache)
        check(q, alibi_slopes=slopes, **cache)
        check(q, alibi_slopes=torch.stack([slopes, slopes.flip(0)]), softcap=20.0, **cache)


@each_kind
@pytest.mark.parametrize("batch", [1, 2])
def test_a_cache_without_room(batch, kind):
    cache = make_cache((0,) * batch, 2, 24, kind, capacity=0)
    out, lse = fastq.flash_decode(random(batch, 3, 4, 24, kind=kind), return_lse=True, **cache)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@kinds(torch.float32)
@pytest.mark.parametrize("seqlen_q", [6, 50])
def test_rows_that_attend_to_nothing(seqlen_q, kind):
    """Padding on the left, and sequences without a token."""
    cache = make_cache((2, 0, 9), 2, 24, kind, capacity=20)
    q = random(3, seqlen_q, 2, 24, kind=kind)
    q[0, : seqlen_q - 2] = torch.nan  # padding
    out, lse = fastq.flash_decode(q, return_lse=True, **cache)
    for b, length in enumerate((2, 0, 9)):
        padding = max(seqlen_q - length, 0)
        assert (out[b, :padding] == 0).all()
        assert (lse[b, :, :padding] == -torch.inf).all()
        assert torch.isfinite(out[b, padding:]).all()
        assert torch.isfinite(lse[b, :, padding:]).all()


@kinds(torch.float32)
def test_nothing_to_do(kind):
    q = random(2, 3, 4, 16, kind=kind)
    cache = make_cache((7, 5), 2, 16, kind)
    assert fastq.flash_decode(q[:, :0], **cache).shape == (2, 0, 4, 16)
    none = {name: tensor[:0] for name, tensor in cache.items()}
    assert fastq.flash_decode(q[:0], **none).shape == (0, 3, 4, 16)
    headless = cache | {
        "k_cache": cache["k_cache"][:, :, :0],
        "v_cache": cache["v_cache"][:, :, :0],
    }
    assert fastq.flash_decode(q[:, :, :0], **headless).shape == (2, 3, 0, 16)
    out, lse = fastq.flash_decode(q, return_lse=True, **make_cache((0, 0), 2, 16, kind))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@kinds(torch.float32)
@pytest.mark.parametrize("seqlen_q", [3, 60])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_scale_of_nan_shows_where_it_is_attended_to(name, seqlen_q, kind):
    cache = make_cache((100, 90), 1, 16, kind, is_int8=True)
    cache[name][0, 98] = torch.nan
    q = random(2, seqlen_q, 2, 16, kind=kind)
    out = fastq.flash_decode(q, **cache)
    attends = torch.arange(seqlen_q, device=q.device) >= seqlen_q - 2
    assert torch.equal(out[0].isnan().all(-1).all(-1), attends)
    assert torch.equal(out[0].isnan().any(-1).any(-1), attends)
    assert torch.isfinite(out[1]).all()
    out = fastq.flash_decode(q[:1], window=(0, 0), **{n: x[:1] for n, x in cache.items()})
    assert torch.equal(out[0].isnan().any(-1).any(-1), attends & ~attends.roll(1))


@kinds(torch.float32)
@pytest.mark.parametrize("seqlen_q", [3, 60])
def test_scales_of_zero(seqlen_q, kind):
    """As of tokens that are all zeros, in a cache that another wrote."""
    cache = make_cache((100, 90), 1, 16, kind, is_int8=True)
    q = 30 * random(2, seqlen_q, 2, 16, kind=kind)
    for name, rows in (
        ("k_scale", slice(40, 60)),
        ("v_scale", slice(30, 90)),
        ("v_scale", slice(100)),
    ):
        cache[name][:, rows] = 0
        cache[name][1, 90:] = torch.nan
        check(q, **cache)
    assert (fastq.flash_decode(q, **cache) == 0).all()


@kinds(torch.float32)
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_nan_and_inf_show(seqlen_q, kind):
    q = random(1, seqlen_q, 1, 16, kind=kind)
    for value in (torch.nan, torch.inf, -torch.inf):
        cache = make_cache((90,), 1, 16, kind)
        cache["v_cache"][0, 20, 0, 3] = value
        out = fastq.flash_decode(q, **cache)
        assert not torch.isfinite(out[..., 3]).any()
        assert torch.isfinite(out[..., 4:]).all()
    cache = make_cache((90,), 1, 16, kind)
    cache["k_cache"][0, 20, 0, 3] = torch.nan
    assert fastq.flash_decode(q, **cache).isnan().all()


@kinds(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("seqlen_q", [1, 33])
@pytest.mark.parametrize("head_dim", [20, 64])
def test_out_is_written_wholly_and_alone(head_dim, seqlen_q, kind):
    q = random(3, seqlen_q, 4, head_dim, kind=kind)
    cache = make_cache((600, 0, 50), 2, head_dim, kind)
    expected = fastq.flash_decode(q, **cache)
    shape = (5, seqlen_q + 2, 6, head_dim + 16)
    held = torch.full(shape, 77, dtype=kind.dtype, device=kind.device)
    out = held[1:-1, 1:-1, 1:-1, 8:-8]
    assert fastq.flash_decode(q, out=out, **cache) is out
    assert torch.equal(out, expected)
    out.fill_(77)
    assert (held == 77).all()


@each_kind
@pytest.mark.parametrize("seqlen_q", [1, 37])
def test_any_strides(seqlen_q, kind):
    q = random(3, seqlen_q, 4, 40, kind=kind)
    for is_int8, page_size in ((False, 0), (True, 0), (False, 16), (True, 16)):
        cache = make_cache((70, 3, 64), 2, 40, kind, page_size=page_size, is_int8=is_int8)
        expected = fastq.flash_decode(q, **cache)
        moved = dict(cache)
        for name in moved.keys() & {"k_cache", "v_cache", "k_scale", "v_scale"}:
            moved[name] = cache[name].transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(fastq.flash_decode(q, **moved), expected)
        both = torch.stack([cache["k_cache"], cache["v_cache"]], dim=1)
        beside = cache | {"k_cache": both[:, 0], "v_cache": both[:, 1]}
        beside["cache_seqlens"] = torch.stack([cache["cache_seqlens"]] * 2, dim=1)[:, 0]
        assert torch.equal(fastq.flash_decode(q, **beside), expected)
        for i, j in ((1, 2), (1, 3), (0, 1)):
            view = q.transpose(i, j).contiguous().transpose(i, j)
            assert torch.equal(fastq.flash_decode(view, **cache), expected)


def test_a_row_has_its_bits_whatever_the_threads():
    threads = fastq.get_num_threads()
    for seqlen_q, heads_k in ((1, 8), (40, 2)):
        q = random(2, seqlen_q, 8, 64)
        cache = make_cache((3000, 1500), heads_k, 64)
        got = []
        try:
            for count in (1, 2, 5):
                fastq.set_num_threads(count)
                got.append(fastq.flash_decode(q, window=(2900, -1), **cache))
        finally:
            fastq.set_num_threads(threads)
        assert torch.equal(got[0], got[1])
        assert torch.equal(got[0], got[2])


@kinds(torch.float32, torch.bfloat16)
def test_equal_bits_over_many_runs(kind):
    for is_int8 in (False, True):
        q = random(2, 1, 8, 64, kind=kind)
        cache = make_cache((1500, 700), 2, 64, kind, page_size=64, is_int8=is_int8)
        expected = fastq.flash_decode(q, return_lse=True, **cache)
        for _ in range(200):
            got = fastq.flash_decode(q, return_lse=True, **cache)
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512vnni", "amx", "neon"])
def test_every_instruction_set(monkeypatch, isa):
    if isa not in fastq.describe()["cpu"]["available"]:
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    for dtype in FLOAT_DTYPES:
        kind = Kind("cpu", dtype)
        for is_int8, head_dim in ((False, 72), (True, 72), (False, 64), (True, 64)):
            cache = make_cache((600, 70), 2, head_dim, kind, page_size=16, is_int8=is_int8)
            for seqlen_q in (1, 4, 40):
                q = random(2, seqlen_q, 6, head_dim, kind=kind)
                check(q, window=(560, -1), softcap=8.0, **cache)


@each_kind
@pytest.mark.parametrize("page_size", [0, 64])
def test_what_was_appended_is_attended_to(page_size, kind):
    """Token after token into a cache, then some at once, against flash_attention of all of them."""
    k, v = (random(2, 150, 2, 64, kind=kind, seed=seed) for seed in (1, 2))
    q = random(2, 150, 6, 64, kind=kind)
    expected = fastq.flash_attention(q, k, v, causal=True)
    limit = max(torch.finfo(kind.dtype).eps, 1e-6)  # CPUs with AMX round exponentials
    for is_int8 in (False, True):
        cache = empty_cache(
            (150, 150), 2, 64, kind, capacity=160, page_size=page_size, is_int8=is_int8
        )
        begin = 0
        for end in (100, 101, 102, 103, 150):
            cache["cache_seqlens"].fill_(end)
            fastq.kv_append(k[:, begin:end], v[:, begin:end], **cache)
            got = fastq.flash_decode(q[:, begin:end], **cache)
            its = expected[:, begin:end].float()
            assert (got.float() - its).norm() <= (limit + 0.01 * is_int8) * its.norm()
            begin = end


@kinds(*FLOAT_DTYPES)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_properties(data, kind):
    draw = data.draw
    heads_k, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(0, 200), min_size=1, max_size=3))
    seqlen_q, head_dim = draw(st.integers(1, 90)), draw(st.integers(1, 130))
    # Errors are compared with another formula's: of a few outputs that says nothing.
    lengths *= max(1, -(-512 // (len(lengths) * seqlen_q * heads_k * group * head_dim)))
    options = {
        "causal": draw(st.booleans()),
        "window": (draw(st.integers(-1, 150)), draw(st.integers(-1, 150))),
        "softcap": draw(st.sampled_from([0.0, 2.0, 30.0])),
    }
    cache = make_cache(
        lengths,
        heads_k,
        head_dim,
        kind,
        capacity=max(lengths) + draw(st.integers(0, 40)),
        page_size=draw(st.sampled_from([0, 0, 16, 32])),
        is_int8=draw(st.booleans()),
        seed=seqlen_q,
    )
    check(random(len(lengths), seqlen_q, heads_k * group, head_dim, kind=kind), **cache, **options)


@pytest.mark.cuda
def test_cuda_has_no_kernel_for_float32():
    kind = Kind("cuda", torch.float32)
    with pytest.raises(NotImplementedError, match=r"flash_decode: .*float32"):
        fastq.flash_decode(random(1, 1, 1, 16, kind=kind), **make_cache((4,), 1, 16, kind))


@pytest.mark.cuda
@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "paged"])
def test_offsets_past_int32(is_paged):
    """Keys and values whose offsets, in elements, are past 2**31."""
    kind = Kind("cuda", torch.bfloat16)
    q, small = random(1, 3, 2, 64, kind=kind), make_cache((48,), 1, 64, kind)
    expected = fastq.flash_decode(q, **small)
    storage = torch.empty(2**31 + 2**28, dtype=torch.bfloat16, device="cuda")
    far = dict(small)
    for name, at in (("k_cache", 0), ("v_cache", 4096)):
        if is_paged:
            far[name] = storage.as_strided((3, 16, 1, 64), (2**30, 64, 64, 1), at)
            far[name].copy_(small[name].view(3, 16, 1, 64))
        else:
            far[name] = storage.as_strided((1, 48, 1, 64), (0, 2**25 + 2**24, 64, 1), at)
            far[name].copy_(small[name])
    if is_paged:
        far["block_table"] = torch.arange(3, dtype=torch.int32, device="cuda")[None]
    assert torch.equal(fastq.flash_decode(q, **far), expected)


@kinds()
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
def test_replay_of_a_graph_with_other_lengths(is_int8, kind):
    """Also longer ones than those of the capture."""
    lengths = (900, 1000, 1000)
    cache = make_cache(lengths, 2, 64, kind, page_size=64, is_int8=is_int8)
    q = random(3, 2, 8, 64, kind=kind)
    cache["cache_seqlens"].copy_(torch.tensor([5, 0, 70]))
    fastq.flash_decode(q, **cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, lse = fastq.flash_decode(q, return_lse=True, **cache)
    for new in ((900, 1, 1000), (0, 64, 513), (5, 0, 70)):
        cache["cache_seqlens"].copy_(torch.tensor(new))
        cache["block_table"].copy_(cache["block_table"])
        q.copy_(random(3, 2, 8, 64, kind=kind, seed=new[0]))
        got.fill_(77)
        lse.fill_(77)
        graph.replay()
        expected = fastq.flash_decode(q, return_lse=True, **cache)
        assert torch.equal(got, expected[0])
        assert torch.equal(lse, expected[1])
        check(q, **cache)
