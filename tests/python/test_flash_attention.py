"""flash_attention against float64, within twice the error of the plain formula in torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastq
import reference
from attention_formula import assert_close, torch_attention
from operands import FLOAT_DTYPES

SEQLENS = [(1, 1), (1, 239), (799, 3), (127, 512), (113, 203), (1024, 1023)]
LONG = [(2048, 2048), (4224, 4224)]
HEAD_DIMS = [1, 8, 32, 64, 80, 96, 100, 128, 160, 192, 256]


class Kind(NamedTuple):
    device: str
    dtype: torch.dtype
    kernels: str = ""  # FASTQ_KERNELS

    def __str__(self):
        parts = (self.device, str(self.dtype).removeprefix("torch."), self.kernels)
        return "-".join(part for part in parts if part)


def kinds(*cpu_dtypes):
    """A parameter for every dtype on every device; on a GPU also the kernels for all of them."""
    params = [Kind("cpu", dtype) for dtype in cpu_dtypes]
    for dtype in (torch.float16, torch.bfloat16):
        for kernels in ("", "sm80"):
            params.append(pytest.param(Kind("cuda", dtype, kernels), marks=pytest.mark.cuda))
    return pytest.mark.parametrize("kind", params, ids=str)


@pytest.fixture(autouse=True)
def forced_kernels(request, monkeypatch):
    callspec = getattr(request.node, "callspec", None)
    kind = callspec.params.get("kind") if callspec is not None else None
    if kind is not None and kind.kernels:
        monkeypatch.setenv("FASTQ_KERNELS", kind.kernels)


CPU = Kind("cpu", torch.float32)
each_kind = kinds(*FLOAT_DTYPES)


def qkv(batch, seqlen_q, seqlen_k, heads, heads_k, head_dim, kind=CPU, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((seqlen_q, heads), (seqlen_k, heads_k), (seqlen_k, heads_k))
    return tuple(
        torch.randn(batch, rows, h, head_dim, generator=generator).to(kind.device, kind.dtype)
        for rows, h in shapes
    )


def check(q, k, v, **options):
    out, lse = fastq.flash_attention(q, k, v, return_lse=True, **options)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    expected, expected_lse = reference.flash_attention(q, k, v, **options)
    assert_close(out, expected, torch_attention(q, k, v, **options))
    assert lse.dtype == torch.float32
    np.testing.assert_allclose(lse.cpu().numpy(), expected_lse, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@each_kind
@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
def test_seqlens(seqlens, kind, causal):
    check(*qkv(2, *seqlens, 3, 3, 64, kind), causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlens", LONG, ids=str)
@kinds()
def test_long_sequences(seqlens, kind, causal, head_dim):
    check(*qkv(1, *seqlens, 1, 1, head_dim, kind), causal=causal)


@each_kind
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, kind):
    check(*qkv(1, 65, 130, 2, 2, head_dim, kind), causal=True)
    check(*qkv(1, 300, 290, 1, 1, head_dim, kind), window=(100, 30))


@kinds(torch.bfloat16)
@pytest.mark.parametrize("heads", [(6, 6), (6, 3), (6, 2), (6, 1), (40, 8)], ids=str)
@pytest.mark.parametrize("seqlens", [(1, 77), (33, 100)], ids=str)
def test_grouped_heads(heads, seqlens, kind):
    check(*qkv(2, *seqlens, *heads, 32, kind), causal=True)


@kinds(torch.float32)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "window", [(-1, -1), (0, 0), (16, -1), (-1, 16), (100, 7), (2**62, 5000)], ids=str
)
def test_windows(window, causal, kind):
    for seqlens in ((100, 300), (300, 100), (257, 257)):
        check(*qkv(1, *seqlens, 2, 1, 40, kind), window=window, causal=causal)


@kinds(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_softcap_scale_and_alibi(kind, head_dim):
    q, k, v = qkv(2, 90, 150, 4, 2, head_dim, kind)
    check(3 * q, k, v, softcap=5.0)
    check(q, k, v, softmax_scale=0.3, causal=True)
    check(q, k, v, softmax_scale=-0.05)
    slopes = torch.tensor([0.5, 0.25, 0.01, 0.0], device=q.device)
    check(q, k, v, alibi_slopes=slopes)
    check(q, k, v, alibi_slopes=torch.stack([slopes, slopes.flip(0)]), causal=True, softcap=20.0)


@each_kind
def test_packed_sequences(kind):
    lengths = [(5, 9), (0, 4), (130, 300), (3, 0), (64, 64), (0, 0), (200, 100)]
    cu_q, cu_k = (
        torch.tensor([0, *np.cumsum([pair[i] for pair in lengths])], dtype=torch.int32)
        for i in (0, 1)
    )
    cu_q, cu_k = cu_q.to(kind.device), cu_k.to(kind.device)
    used = int(cu_q[-1])
    q, k, v = (x[0] for x in qkv(1, used + 3, int(cu_k[-1]) + 2, 4, 2, 48, kind))
    slopes = torch.rand(7, 4).to(kind.device)
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    out = torch.full_like(q, 7)
    got, lse = fastq.flash_attention(
        q, k, v, causal=True, alibi_slopes=slopes, out=out, return_lse=True, **packed
    )
    assert got is out
    assert lse.shape == (4, used + 3)
    assert (out[used:] == 7).all()  # past the last sequence
    expected, expected_lse = reference.flash_attention(
        q, k, v, causal=True, alibi_slopes=slopes, **packed
    )
    np.testing.assert_allclose(lse[:, :used].cpu(), expected_lse[:, :used], rtol=2e-6, atol=2e-5)
    for b, (n_q, n_k) in enumerate(lengths):
        rows, keys = (
            slice(int(cu_q[b]), int(cu_q[b]) + n_q),
            slice(int(cu_k[b]), int(cu_k[b]) + n_k),
        )
        alone = (q[None, rows], k[None, keys], v[None, keys])
        options = {"causal": True, "alibi_slopes": slopes[b]}
        check(*alone, **options)
        assert torch.equal(fastq.flash_attention(*alone, **options)[0], out[rows])
    error = np.abs(out[:used].double().cpu().numpy() - expected[:used]).max()
    assert error <= (1e-5 if kind.dtype == torch.float32 else 2e-2)


@kinds(torch.float32)
def test_max_seqlen_may_be_given(kind):
    cu = torch.tensor([0, 3, 10], dtype=torch.int32, device=kind.device)
    q, k, v = (x[0] for x in qkv(1, 10, 10, 2, 2, 16, kind))
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    expected = fastq.flash_attention(q, k, v, **options)
    got = fastq.flash_attention(q, k, v, max_seqlen_q=7, max_seqlen_k=1000, **options)
    assert torch.equal(got, expected)


@kinds(torch.float32)
def test_rows_that_attend_to_nothing(kind):
    q, k, v = qkv(1, 6, 2, 2, 2, 24, kind)
    out, lse = fastq.flash_attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :4] == 0).all()
    assert (lse[:, :, :4] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, 4:]).all()
    out, lse = fastq.flash_attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert fastq.flash_attention(q[:, :0], k, v).shape == (1, 0, 2, 24)
    assert fastq.flash_attention(q[:0], k[:0], v[:0]).shape == (0, 6, 2, 24)


@each_kind
def test_any_strides(kind):
    q, k, v = qkv(2, 37, 70, 4, 2, 40, kind)
    expected = fastq.flash_attention(q, k, v, causal=True)
    for i, j in ((1, 2), (1, 3), (0, 1)):
        views = [x.transpose(i, j).contiguous().transpose(i, j) for x in (q, k, v)]
        assert torch.equal(fastq.flash_attention(*views, causal=True), expected)
    fused = torch.cat([q[:, :, :2], k[:, :37], v[:, :37]], dim=2)
    parts = fused.split([2, 2, 2], dim=2)
    plain = [x.contiguous() for x in parts]
    assert torch.equal(fastq.flash_attention(*parts), fastq.flash_attention(*plain))
    shared = [x[:1].expand(2, -1, -1, -1) for x in (k, v)]
    whole = [x.contiguous() for x in shared]
    assert torch.equal(fastq.flash_attention(q, *shared), fastq.flash_attention(q, *whole))


@kinds(torch.bfloat16)
@pytest.mark.parametrize("head_dim", [20, 24])
def test_out_is_written_wholly_and_alone(kind, head_dim):
    q, k, v = qkv(2, 33, 50, 3, 3, head_dim, kind)
    expected = fastq.flash_attention(q, k, v)
    held = torch.full((2, 35, 5, head_dim + 16), 77, dtype=kind.dtype, device=kind.device)
    out = held[:, 1:-1, 1:-1, 8:-8]
    assert fastq.flash_attention(q, k, v, out=out) is out
    assert torch.equal(out, expected)
    out.fill_(77)
    assert (held == 77).all()


@kinds(torch.float32)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_show(value, kind):
    q, k, v = qkv(1, 40, 90, 1, 1, 16, kind)
    v_bad = v.clone()
    v_bad[0, 20, 0, 3] = value
    out = fastq.flash_attention(q, k, v_bad)
    assert not torch.isfinite(out[..., 3]).any()
    assert torch.isfinite(out[..., 4:]).all()
    q_bad = q.clone()
    q_bad[0, 20, 0, 3] = value
    is_finite = torch.isfinite(fastq.flash_attention(q_bad, k, v)).all(-1)[0, :, 0]
    assert not is_finite[20]
    assert is_finite.sum() == 39
    k_bad = k.clone()
    k_bad[0, 20, 0, 3] = value
    scores = q[0, :, 0] @ k_bad[0, :, 0].T  # one of -inf is that of a key without weight
    shows = (scores.isnan() | (scores == math.inf)).any(1)
    is_finite = torch.isfinite(fastq.flash_attention(q, k_bad, v)).all(-1)[0, :, 0]
    assert torch.equal(~is_finite, shows)


@kinds(torch.float32)
def test_only_scores_of_minus_inf_give_nan(kind):
    shapes = ((1, 1, 1, 4), (1, 70, 1, 4), (1, 70, 1, 4))
    q, k, v = (torch.ones(shape, device=kind.device, dtype=kind.dtype) for shape in shapes)
    k.fill_(-math.inf)
    assert fastq.flash_attention(q, k, v).isnan().all()


def test_a_row_has_its_bits_whatever_the_threads():
    q, k, v = qkv(2, 300, 300, 4, 2, 64, Kind("cpu", torch.bfloat16))
    threads = fastq.get_num_threads()
    got = []
    try:
        for count in (1, 2, 5):
            fastq.set_num_threads(count)
            got.append(fastq.flash_attention(q, k, v, causal=True))
    finally:
        fastq.set_num_threads(threads)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512vnni", "amx", "neon"])
def test_every_instruction_set(monkeypatch, isa):
    if isa not in fastq.describe()["cpu"]["available"]:
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    for dtype in FLOAT_DTYPES:
        operands = qkv(1, 70, 140, 4, 2, 72, Kind("cpu", dtype))
        check(*operands, causal=True, window=(90, -1), softcap=8.0)


def test_equals_torch_sdpa():
    q, k, v = qkv(2, 128, 128, 4, 4, 64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    )
    got = fastq.flash_attention(q, k, v, causal=True).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@kinds(*FLOAT_DTYPES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_properties(data, kind):
    draw = data.draw
    heads_k, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    sizes = (draw(st.integers(1, 3)), draw(st.integers(0, 90)), draw(st.integers(0, 200)))
    head_dim = draw(st.integers(1, 130))
    # Errors are compared with another formula's: of a few outputs that says nothing.
    least = -(-512 // max(sizes[1] * heads_k * group * head_dim, 1))
    sizes = (max(sizes[0], least), *sizes[1:])
    options = {
        "causal": draw(st.booleans()),
        "window": (draw(st.integers(-1, 150)), draw(st.integers(-1, 150))),
        "softcap": draw(st.sampled_from([0.0, 2.0, 30.0])),
    }
    check(*qkv(*sizes, heads_k * group, heads_k, head_dim, kind, seed=sum(sizes)), **options)


def bad(message, error=ValueError, **changes):
    q, k, v = qkv(2, 5, 7, 4, 2, 16)
    with pytest.raises(error, match=message):
        fastq.flash_attention(**{"q": q, "k": k, "v": v} | changes)


def test_bad_shapes_and_dtypes():
    q, k, v = qkv(2, 5, 7, 4, 2, 16)
    bad("q is a list, expected a torch.Tensor", TypeError, q=[1])
    bad(r"q has shape \(5, 4, 16\), expected \(batch, seqlen, heads, head_dim\)", q=q[0])
    three = k.new_zeros(2, 7, 3, 16)
    bad(r"k has shape \(2, 7, 3, 16\).*divides q's 4", k=three, v=three)
    bad("v has shape .* as k has", v=v[:, :6])
    bad("k has shape .*, expected batch 2", k=k[:1], v=v[:1])
    bad("k has shape .*, expected head_dim 16", k=k[..., :8], v=v[..., :8])
    wide = k.new_zeros(2, 7, 2, 257)
    bad("head_dim from 1 to 256", q=q.new_zeros(2, 5, 4, 257), k=wide, v=wide)
    bad("k has dtype float16, expected float32", TypeError, k=k.half())
    bad("q has dtype int32", TypeError, q=q.int(), k=k.int(), v=v.int())
    bad("out has shape", out=torch.zeros(2, 5, 4, 8))
    bad("out overlaps q", q=q, out=q)
    bad("alibi_slopes has shape", alibi_slopes=torch.zeros(3))


def test_bad_options():
    q, _, _ = qkv(2, 5, 7, 4, 2, 16)
    bad("q requires grad", q=q.clone().requires_grad_())
    bad("softmax_scale is 0", softmax_scale=0.0)
    bad("softmax_scale is nan", softmax_scale=math.nan)
    bad("softcap is -1", softcap=-1.0)
    bad("window is 5, expected two ints", TypeError, window=5)
    bad("max_seqlen_q is 5, and there are no cu_seqlens", max_seqlen_q=5)


def test_bad_cu_seqlens():
    q, k, v = qkv(2, 5, 7, 4, 2, 16)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    packed = {"q": q[0], "k": k[0, :5], "v": v[0, :5], "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    fastq.flash_attention(**packed)
    bad("only one of cu_seqlens_q", cu_seqlens_q=cu)
    bad(r"q has shape .*, expected \(total, heads, head_dim\)", **packed | {"q": q})
    bad("ends with 9, expected at most 5", **packed | {"cu_seqlens_k": torch.tensor([0, 9]).int()})
    bad("begins with 1", **packed | {"cu_seqlens_q": torch.tensor([1, 5]).int()})
    bad("length -1", **packed | {"cu_seqlens_q": torch.tensor([0, -1]).int(), "max_seqlen_q": 5})
    bad("length 5, expected 0 to max_seqlen = 4", **packed, max_seqlen_q=4)
    bad("cu_seqlens_q has dtype int64", TypeError, **packed | {"cu_seqlens_q": cu.long()})


def check_heads(out, q, k, v, heads, **options):
    """Some heads (batch, head) of a call that had all of q, k and v."""
    for batch, head in heads:
        key = head // (q.shape[2] // k.shape[2])
        part = [x[batch : batch + 1, :, i : i + 1] for x, i in ((q, head), (k, key), (v, key))]
        expected, _ = reference.flash_attention(*part, **options)
        its = out[batch : batch + 1, :, head : head + 1]
        assert_close(its, expected, torch_attention(*part, **options))
    assert torch.isfinite(out).all()


# Few and many keys: CUDA has kernels for either.
many_tiles = pytest.mark.parametrize("seqlen_k", [530, 6500])


@pytest.mark.cuda
@many_tiles
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_more_tiles_than_multiprocessors(head_dim, causal, seqlen_k):
    q, k, v = qkv(3, 517, seqlen_k, 40, 8, head_dim, Kind("cuda", torch.bfloat16))
    out, lse = fastq.flash_attention(q, k, v, causal=causal, return_lse=True)
    check_heads(out, q, k, v, ((0, 0), (1, 7), (2, 39)), causal=causal)
    assert torch.isfinite(lse).all()
    assert torch.equal(fastq.flash_attention(q[1:], k[1:], v[1:], causal=causal), out[1:])


@kinds()
def test_scores_that_grow_by_far(kind):
    """Each block of keys has larger scores than those before, from right to left, and so anew."""
    q, k, v = qkv(1, 130, 700, 2, 2, 64, kind)
    growing = torch.linspace(40, 0.5, 700, device=q.device)[:, None, None].to(k.dtype)
    check(q, k * growing, v)
    check(q, k * growing.flip(0), v)
    check(q, k * growing, v, softmax_scale=20.0)


@pytest.mark.cuda
@many_tiles
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_that_grow_in_some_of_many_tiles(head_dim, causal, seqlen_k):
    """Tiles that a kernel does again, among others, and the last one."""
    q, k, v = qkv(2, 517, seqlen_k, 60, 60, head_dim, Kind("cuda", torch.float16))
    growing = torch.ones(60, 1, device="cuda", dtype=k.dtype)
    growing[::7] = growing[-1] = 60
    k[:, 200:400] *= growing
    out = fastq.flash_attention(q, k, v, causal=causal)
    check_heads(out, q, k, v, [(1, head) for head in (0, 1, 7, 58, 59)], causal=causal)
    assert torch.equal(fastq.flash_attention(q[1:], k[1:], v[1:], causal=causal), out[1:])


@pytest.mark.cuda
def test_neighbours_of_packed_sequences_stay_out():
    kind = Kind("cuda", torch.bfloat16)
    q, k, v = (x[0] for x in qkv(1, 300, 300, 2, 2, 64, kind))
    cu = torch.tensor([0, 100, 170, 300], dtype=torch.int32, device="cuda")
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    expected = fastq.flash_attention(q, k, v, **packed)
    for x in (k, v):
        x[100:170] = math.nan
    got = fastq.flash_attention(q, k, v, **packed)
    assert got[100:170].isnan().all()
    assert torch.equal(got[:100], expected[:100])
    assert torch.equal(got[170:], expected[170:])


@pytest.mark.cuda
def test_cuda_has_no_kernel_for_float32():
    q, k, v = qkv(1, 4, 4, 1, 1, 16, Kind("cuda", torch.float32))
    with pytest.raises(NotImplementedError, match="q has dtype float32, expected float16 or bf"):
        fastq.flash_attention(q, k, v)


@pytest.mark.cuda
def test_a_forced_family_that_does_not_take_it(monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is no Hopper")
    q, k, v = qkv(1, 4, 4, 1, 1, 16, Kind("cuda", torch.float16))
    monkeypatch.setenv("FASTQ_KERNELS", "sm90")
    fastq.flash_attention(q, k, v)
    with pytest.raises(NotImplementedError, match="FASTQ_KERNELS=sm90, but softcap, ALiBi"):
        fastq.flash_attention(q, k, v, softcap=30.0)
    with pytest.raises(NotImplementedError, match="FASTQ_KERNELS=sm90, but rows do not begin"):
        fastq.flash_attention(q[..., :12], k[..., :12], v[..., :12])


@pytest.mark.cuda
def test_offsets_past_int32():
    """Rows of k and v whose offsets, in elements, are past 2**31."""
    storage = torch.empty(2**31 + 2**27, dtype=torch.bfloat16, device="cuda")
    views = [storage.as_strided((1, 33, 1, 64), (0, 2**26, 64, 1), at) for at in (0, 4096)]
    q, *small = qkv(1, 70, 33, 1, 1, 64, Kind("cuda", torch.bfloat16))
    for view, x in zip(views, small, strict=True):
        view.copy_(x)
    assert torch.equal(fastq.flash_attention(q, *views), fastq.flash_attention(q, *small))
    out = storage.as_strided((1, 70, 1, 64), (0, 2**24 + 2**23, 64, 1), 8192)
    fastq.flash_attention(q, *small, out=out)
    assert torch.equal(out, fastq.flash_attention(q, *small))


@kinds()
def test_equal_bits_over_many_runs(kind):
    q, k, v = qkv(2, 300, 513, 4, 2, 128, kind)
    expected = fastq.flash_attention(q, k, v, causal=True, return_lse=True)
    for _ in range(200):
        got = fastq.flash_attention(q, k, v, causal=True, return_lse=True)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@kinds()
def test_replay_of_a_graph(kind):
    q, k, v = qkv(1, 100, 200, 2, 1, 64, kind)
    fastq.flash_attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fastq.flash_attention(q, k, v)
    for x, new in zip((q, k, v), qkv(1, 100, 200, 2, 1, 64, kind, seed=5), strict=True):
        x.copy_(new)
    got.zero_()
    graph.replay()
    assert torch.equal(got, fastq.flash_attention(q, k, v))
