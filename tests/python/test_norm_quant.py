"""rms_norm_quant and layer_norm_quant against float64, on every backend."""

from __future__ import annotations

import ctypes
import itertools
import math

import pytest
import torch

import c_abi
import fastq
import reference
from operands import FLOAT_DTYPES, LAYOUTS, generator, in_layout
from quantizations import ISAS, SCALES, random_rows, random_smooth, random_vector

EPS = {"rms": 1e-6, "layer": 1e-5}  # the defaults
TOLERANCE = 1e-5
norms = pytest.mark.parametrize("norm", ["rms", "layer"])
dtypes = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
scales = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
residuals = pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])


def call(norm, x, weight=None, bias=None, **options):
    function = {"rms": fastq.rms_norm_quant, "layer": fastq.layer_norm_quant}[norm]
    return function(x, weight, bias=bias, **options)


def check(norm, x, weight=None, bias=None, *, residual=None, eps=None, **options):
    """The op on x; its residual bit by bit, all else within TOLERANCE. Gives what the op gave."""
    given = options if eps is None else {"eps": eps, **options}
    given = given if residual is None else {"residual": residual, **given}
    before = [None if t is None else t.clone() for t in (x, residual)]
    got = call(norm, x, weight, bias, **given)
    assert torch.equal(x, before[0])
    h, quantized = reference.to_numpy(x), got
    if residual is not None:
        assert torch.equal(residual, before[1])
        *quantized, new_residual = got
        assert new_residual.is_contiguous()
        assert new_residual.dtype == x.dtype
        h = reference.round_to(h + reference.to_numpy(residual), x.dtype)
        reference.assert_same(new_residual, h)
        assert torch.equal(new_residual, x + residual)
    assert quantized[0].is_contiguous()
    eps = EPS[norm] if eps is None else eps
    y = reference.normalize(h, weight, bias, eps, is_layer_norm=norm == "layer")
    reference.assert_quantizes(tuple(quantized), y, TOLERANCE, **options)
    return got


@dtypes
@norms
@residuals
def test_equals_float64(device, has_residual, norm, dtype):
    shapes = [(1, 1), (1, 2), (3, 7), (5, 33), (33, 64), (3, 129), (17, 1000), (1, 4096), (5, 4097)]
    for rows, length in [*shapes, (2, 16384), (2, 20001), (2, 65536)]:
        x = random_rows(rows, length, device=device, dtype=dtype, seed=length)
        residual = None
        if has_residual:
            residual = random_rows(rows, length, device=device, dtype=dtype, seed=length + 1)
        check(norm, x, residual=residual)
        weight = random_vector(length, device=device, at=1.0)
        bias = random_vector(length, device=device, dtype=dtype, seed=1)
        check(norm, x, weight, residual=residual)
        check(norm, x, weight.to(dtype), bias, residual=residual)
        check(norm, x, None, bias.float(), residual=residual)


@scales
@norms
def test_every_way_to_quantise(device, norm, scale):
    for dtype, length in itertools.product(FLOAT_DTYPES, (32, 77, 1056, 16416, 65536)):
        x = random_rows(2, length, device=device, dtype=dtype, seed=length)
        vectors = [random_vector(length, device=device, seed=seed) for seed in (1, 2)]
        smooth = random_smooth(length, device=device, dtype=dtype)
        check(norm, x, *vectors, residual=x.flip(-1), **scale)
        check(norm, x, *vectors, smooth=smooth, **scale)
        if length % 32 == 0:
            check(norm, x, *vectors, rotation=32, **scale)
            check(norm, x, *vectors, residual=x.flip(-1), smooth=smooth, rotation=8, **scale)


@pytest.mark.parametrize("isa", ISAS)
@norms
def test_every_instruction_set(norm, isa, monkeypatch):
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    for dtype, length in itertools.product(FLOAT_DTYPES, (1, 15, 77, 512, 4099, 16400)):
        x = random_rows(5, length, device="cpu", dtype=dtype, seed=length)
        vectors = [random_vector(length, device="cpu", seed=seed) for seed in (1, 2)]
        check(norm, x, *vectors, residual=x.flip(-1))
        check(norm, x, *vectors, smooth=random_smooth(length, device="cpu"), asymmetric=True)
        if length % 16 == 0:
            check(norm, x, rotation=16)


@norms
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, layout, norm):
    for dtype, shape in itertools.product(FLOAT_DTYPES, ((1, 77), (9, 64), (40, 130), (70, 1024))):
        x, residual = (random_rows(*shape, device=device, dtype=dtype, seed=i) for i in (1, 2))
        vectors = [random_vector(shape[1], device=device, dtype=dtype, seed=i) for i in (3, 4)]
        smooth = random_smooth(shape[1], device=device)[None]
        check(norm, in_layout(x, layout), *vectors, residual=residual)
        vectors = [in_layout(vector[None], layout) for vector in vectors]
        residual, smooth = in_layout(residual, layout), in_layout(smooth, layout)
        check(norm, x, *vectors, residual=residual, smooth=smooth)
        check(norm, in_layout(x, layout), *vectors, residual=residual, asymmetric=True)


@norms
def test_any_rank_and_expanded_operands(device, norm):
    for shape in ((12,), (2, 3, 40), (2, 1, 3, 1, 8)):
        x = random_rows(*shape, device=device)
        check(norm, x, random_vector(shape[-1], device=device), residual=x)
    x, residual = (random_rows(3, 5, 4, 48, device=device, seed=seed) for seed in (1, 2))
    one = torch.full((1,), 0.3, device=device).expand(48)
    for order in ((1, 0, 2, 3), (2, 1, 0, 3)):
        check(norm, x.permute(order), one, residual=residual.permute(order), smooth=one)
    by_columns = residual.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    check(norm, x.permute(1, 0, 2, 3), one, one, residual=by_columns.transpose(0, 1))
    check(norm, x[:1].expand(3, 5, 4, 48), residual=residual[:, :1].expand(3, 5, 4, 48))


@norms
@pytest.mark.parametrize("eps", [0, 1e-12, 0.5, 100.0])
def test_eps(device, norm, eps):
    x = random_rows(7, 64, device=device)
    check(norm, x, eps=eps)
    check(norm, x * 1e-3, eps=eps)


@dtypes
@residuals
@pytest.mark.parametrize("has_weight", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize(("mean", "tolerance"), [(500, 1e-4), (2.6, TOLERANCE), (2.7, TOLERANCE)])
def test_means_far_from_zero(device, mean, tolerance, has_weight, has_residual, dtype):
    """mean(h ** 2) - mean(h) ** 2 would have lost all digits of the variance at 500; it has lost
    three bits at 2.65."""
    for length in (100, 4096, 30000):
        x = torch.randn(3, length, generator=generator(length)) + mean
        x[1] *= -1
        x = x.to(dtype).to(device)
        residual = x if has_residual else None
        vectors = (torch.ones_like(x[0]), torch.zeros_like(x[0])) if has_weight else (None, None)
        got = fastq.layer_norm_quant(x, vectors[0], bias=vectors[1], residual=residual)
        h = reference.to_numpy(x) * (2 if has_residual else 1)
        y = reference.normalize(h, None, None, 1e-5, is_layer_norm=True)
        reference.assert_quantizes(got[:2], y, tolerance)


@norms
def test_large_and_small_values(device, norm):
    """h ** 2 of these rows neither overflows nor underflows."""
    x = torch.randn(6, 1024, generator=generator(1)).to(device)
    check(norm, x * torch.logspace(-14, 15, 6)[:, None].to(device), eps=0)


@dtypes
@norms
def test_zeros_and_empty(device, norm, dtype):
    x = random_rows(5, 70, device=device, dtype=dtype)
    x[1], x[3] = 0.0, -0.0
    q, s = check(norm, x)
    assert (s[1], s[3]) == (1.0, 1.0)
    assert (q[1] == 0).all()
    check(norm, x, residual=-x)  # all rows
    bias = random_vector(70, device=device)
    q, s = check(norm, x, None, bias)
    assert torch.equal(q[1], fastq.quantize_per_token(bias)[0])
    for shape in ((0, 5), (2, 0, 4)):
        x = torch.empty(shape, dtype=dtype, device=device)
        q, s, _, h = call(norm, x, residual=x, asymmetric=True)
        assert (q.shape, s.shape, h.shape) == (shape, (*shape[:-1], 1), shape)
    x = torch.empty((3, 0), dtype=dtype, device=device)
    assert (call(norm, x)[1] == 1).all()


@dtypes
@norms
@residuals
@pytest.mark.parametrize("asymmetric", [False, True])
def test_nan_and_inf_rows(device, asymmetric, has_residual, norm, dtype):
    for length, position in ((2, 0), (5, 4), (64, 0), (513, 512), (20000, 9999), (20000, 19999)):
        x = random_rows(6, length, device=device, dtype=dtype)
        bad = torch.zeros_like(x) if has_residual else x
        for row, value in ((1, math.nan), (2, math.inf), (3, -math.inf), (4, -math.nan)):
            bad[row, position] = value
        weight = random_vector(length, device=device, at=4.0)
        residual = {"residual": bad} if has_residual else {}
        q, s, *rest = call(norm, x, weight, asymmetric=asymmetric, **residual)
        assert s[:, 0].isfinite().tolist() == [True, False, False, False, False, True]
        assert (q[1:5] == 0).all()
        assert not asymmetric or (rest[0][1:5] == 0).all()
        if has_residual:
            assert torch.equal(rest[-1].isfinite(), (x + bad).isfinite())
        rows = [0, 5]
        same = {name: t[rows] for name, t in residual.items()}
        good = call(norm, x[rows], weight, asymmetric=asymmetric, **same)
        assert all(torch.equal(got[rows], right) for got, right in zip((q, s), good, strict=False))
        static = call(norm, x, weight, scale=0.1, **residual)[0]
        assert (static[1:5, position] == -128).all()
        assert (static[rows] != -128).all()


def test_a_residual_that_overflows(device):
    x = torch.full((2, 40), 1.0, dtype=torch.float16, device=device)
    x[1, 7] = 6e4
    q, s, h = fastq.rms_norm_quant(x, residual=x)
    assert h[1, 7] == math.inf
    assert s.isfinite().tolist() == [[True], [False]]
    assert (q[1] == 0).all()


@norms
@residuals
def test_rows_do_not_depend_on_their_batch(device, has_residual, norm):
    for length in (300, 4096, 20000):
        x = random_rows(150, length, device=device, dtype=torch.bfloat16)
        weight = random_vector(length, device=device, dtype=torch.bfloat16)
        residual = {"residual": x.flip(1)} if has_residual else {}
        many = call(norm, x, weight, **residual)
        for row in (0, 7, 149):
            rows = slice(row, row + 1)
            same = {name: t[rows] for name, t in residual.items()}
            one = call(norm, x[rows], weight, **same)
            assert all(torch.equal(a[0], b[row]) for a, b in zip(one, many, strict=True))


@norms
def test_before_a_product(device, norm):
    """The block of a transformer: residual, norm, quantisation, product."""
    x, residual = (random_rows(20, 256, device=device, seed=seed) for seed in (1, 2))
    weight, bias = (random_vector(256, device=device, seed=seed) for seed in (3, 4))
    w = torch.randn(96, 256, generator=generator(5)).to(device)
    y = reference.normalize(
        *(reference.to_numpy(x + residual), weight, bias, EPS[norm]), is_layer_norm=norm == "layer"
    )
    exact = torch.from_numpy(y) @ w.double().cpu().t()
    for options in ({}, {"asymmetric": True}):
        q, s, *z, _ = call(norm, x, weight, bias, residual=residual, **options)
        qw, sw = fastq.quantize_per_channel(w)
        points = {"zero_point": z[0]} if z else {}
        got = fastq.int8_gemm(q, qw.t(), s, sw, out_dtype=torch.float32, **points).cpu()
        assert (got - exact).abs().max() < 0.02 * exact.abs().max()


def c_call(x, q, s, residual, residual_out, **quantization):
    """fastq_norm_quant, rms, eps 1e-6."""
    quantize = c_abi.with_size(
        c_abi.QuantizeArgs,
        x=c_abi.view(x),
        q=c_abi.view(q),
        scale=c_abi.view(s),
        **{name: c_abi.view(t) for name, t in quantization.items()},
    )
    args = c_abi.with_size(
        c_abi.NormQuantArgs,
        quantize=ctypes.pointer(quantize),
        residual=c_abi.view(residual),
        residual_out=c_abi.view(residual_out),
        eps=1e-6,
    )
    return c_abi.library.fastq_norm_quant(ctypes.byref(args))


@dtypes
def test_in_place_and_poisoned_outputs_through_the_c_abi(dtype):
    """residual_out may be residual; every element is written, and nothing beside."""
    x, residual = (random_rows(5, 77, device="cpu", dtype=dtype, seed=seed) for seed in (1, 2))
    wanted = fastq.rms_norm_quant(x, residual=residual, asymmetric=True)
    for in_place, strided in itertools.product((False, True), repeat=2):
        step = 2 if strided else 1
        q = torch.full((5, 77 * step + 3), -77, dtype=torch.int8)
        s, z = torch.full((15,), -77.0), torch.full((15,), -77, dtype=torch.int32)
        h = torch.full((5, 77 * step + 3), -77.0, dtype=dtype)
        views = [t[:, : 77 * step : step] for t in (q, h)] + [t[::3] for t in (s, z)]
        if in_place:
            views[1].copy_(residual)
        source = views[1] if in_place else residual
        status = c_call(x, views[0], views[2], source, views[1], zero_point=views[3])
        assert status == 0, c_abi.last_error()
        for view, right in zip((views[0], *views[2:], views[1]), wanted, strict=True):
            assert torch.equal(view, right.view(view.shape))
        for t, view in zip((q, h, s, z), views, strict=True):
            view.fill_(-77)
            assert (t == -77).all()


def test_overlaps_through_the_c_abi():
    memory = torch.full((11, 77), -77.0)
    x, residual, out = memory[:5], memory[4:9], memory[5:10]
    q, s = torch.full((5, 77), -77, dtype=torch.int8), torch.full((5,), -77.0)
    assert c_call(x.clone(), q, s, residual, out) == c_abi.INVALID_VALUE
    assert c_abi.last_error() == (
        "norm_quant: residual_out overlaps residual in memory; it may be residual itself, with the "
        "same strides, or lie apart from it"
    )
    assert c_call(x, q, s, residual, residual) == c_abi.INVALID_VALUE
    assert c_abi.last_error() == "norm_quant: residual_out overlaps x in memory"
    assert (memory == -77).all()
    assert (q == -77).all()
    assert (s == -77).all()
