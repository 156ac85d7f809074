"""Smoothed, asymmetric and static quantisation per token against the oracle, bit by bit, on every
backend, and what a product of their results gives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fastq
import reference
from operands import FLOAT_DTYPES, LAYOUTS, generator, in_layout, random_floats
from quantizations import ISAS, SCALES, random_rows, random_smooth

scales = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
dtypes = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def check(x, **options):
    """The op on x, and what it gives: q, s and zero_point without its last dimension."""
    q, s, *z = fastq.quantize_per_token(x, **options)
    assert q.is_contiguous()
    expected_q, expected_s, expected_z = reference.quantize_with(reference.to_numpy(x), **options)
    if "scale" not in options:
        assert s.shape == (*x.shape[:-1], 1)
        s, z = s[..., 0], [point[..., 0] for point in z]
    reference.assert_same(s, expected_s)
    assert len(z) == (expected_z is not None)
    for point in z:
        reference.assert_same(point, expected_z)
    reference.assert_same(q, expected_q)
    return q, s, *z


@dtypes
@scales
@pytest.mark.parametrize("is_smooth", [False, True], ids=["plain", "smooth"])
def test_equals_reference(device, is_smooth, scale, dtype):
    for length in (1, 2, 7, 8, 16, 33, 64, 129, 1000, 4096, 4097, 16384, 40001):
        smooth = random_smooth(length, device=device) if is_smooth else None
        for rows in (1, 5) if length > 5000 else (1, 5, 33):
            x = random_rows(rows, length, device=device, dtype=dtype, seed=length)
            check(x, smooth=smooth, **scale)


@scales
@pytest.mark.parametrize("rotation", [2, 8, 32])
def test_with_rotation(device, rotation, scale):
    for dtype, length in itertools.product(FLOAT_DTYPES, (32, 96, 1056, 16416, 32768)):
        x = random_rows(5, length, device=device, dtype=dtype)
        smooth = random_smooth(length, device=device, dtype=dtype)
        check(x, rotation=rotation, **scale)
        check(x, rotation=rotation, smooth=smooth, **scale)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    for scale, dtype in itertools.product(SCALES.values(), FLOAT_DTYPES):
        for length in (1, 15, 77, 512, 4099, 16400):
            x = random_rows(5, length, device="cpu", dtype=dtype, seed=length)
            smooth = random_smooth(length, device="cpu")
            check(x, **scale)
            check(x, smooth=smooth, **scale)
            if length % 16 == 0:
                check(x, smooth=smooth, rotation=16, **scale)


@scales
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, layout, scale):
    for dtype, shape in itertools.product(FLOAT_DTYPES, ((1, 77), (9, 64), (40, 130), (70, 1024))):
        x = in_layout(random_rows(*shape, device=device, dtype=dtype), layout)
        smooth = in_layout(random_smooth(shape[1], device=device, dtype=dtype)[None], layout)
        check(x, smooth=smooth, **scale)


@scales
def test_any_rank_and_expanded_vectors(device, scale):
    for shape in ((12,), (2, 3, 40), (2, 1, 3, 1, 8)):
        smooth = random_smooth(shape[-1], device=device)
        check(random_rows(*shape, device=device), smooth=smooth, **scale)
    x = random_rows(3, 5, 4, 48, device=device)
    smooth = torch.full((1,), 0.3, device=device).expand(48)
    for order in ((1, 0, 2, 3), (2, 1, 0, 3)):
        check(x.permute(order), smooth=smooth, **scale)
    check(x[::2, 1:4, ::3, 3:45], smooth=smooth[3:45], **scale)
    check(x[:1, 0, :, :].expand(6, 4, 48), **scale)


@dtypes
@scales
def test_zeros_and_empty(device, scale, dtype):
    x = random_rows(5, 70, device=device, dtype=dtype)
    x[1], x[3] = 0.0, -0.0
    q, s, *z = check(x, **scale)
    zero = 0
    if "scale" not in scale:
        assert (s[1], s[3]) == (1.0, 1.0)
    if z:
        zero = z[0] if "scale" in scale else -128
        assert "scale" in scale or z[0][1] == z[0][3] == -128
    assert (q[1] == zero).all()
    for shape in ((0, 5), (3, 0), (0, 0), (2, 0, 4)):
        check(torch.empty(shape, dtype=dtype, device=device), **scale)


@dtypes
@pytest.mark.parametrize("scale", [{}, {"asymmetric": True}], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("length", [1, 5, 64, 513, 20000])
def test_nan_and_inf_rows(device, length, scale, dtype):
    smooth = random_smooth(length, device=device)
    for position in {0, length // 2, length - 1}:
        x = random_rows(6, length, device=device, dtype=dtype)
        x[1, position] = math.nan
        x[2, position] = math.inf
        x[3, position] = -math.inf
        x[4, 0], x[4, length - 1] = math.inf, math.nan
        x[5, position] = -math.nan
        for options in (scale, {"smooth": smooth, **scale}):
            q, s, *z = check(x, **options)
            assert s.isnan().tolist() == [False, True, False, False, True, True]
            assert s.isinf().tolist() == [False, False, True, True, False, False]
            assert (q[1:] == 0).all()
            assert all((point[1:] == 0).all() for point in z)


@dtypes
@pytest.mark.parametrize("length", [1, 5, 64, 513, 20000])
def test_nan_and_inf_of_a_static_scale(device, length, dtype):
    positions = {0, length // 2, length - 1}
    for position, points in itertools.product(positions, ({}, {"zero_point": 9})):
        x = random_rows(5, length, device=device, dtype=dtype).clamp(-9, 9)
        for row, value in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
            x[row, position] = value
        q, _, *_ = check(x, scale=0.11, **points)
        least = -128 if points else -127
        assert q[:4, position].tolist() == [-128, -128, 127, least]
        others = q.clone()
        others[:4, position] = 0
        assert (others > -100).all()


def test_static_values_out_of_range_are_clamped(device):
    x = torch.tensor([[1e9, -1e9, 3e38, -3e38, 63.6, -63.6, 0.25, 0.75]], device=device)
    q, _ = check(x, scale=0.5)
    assert q.tolist() == [[127, -127, 127, -127, 127, -127, 0, 2]]
    q, _, _ = check(x, scale=0.5, zero_point=-128)
    assert q.tolist() == [[127, -128, 127, -128, -1, -128, -128, -126]]
    q, _, _ = check(x, scale=0.5, zero_point=127)
    assert q.tolist() == [[127, -128, 127, -128, 127, 0, 127, 127]]
    check(x, scale=2.0**-149)
    check(x, scale=3e38, zero_point=5)


def test_extremes_of_an_asymmetric_row(device):
    rows = [[3.4e38, -3.4e38, 1.0], [1e-45, 0.0, 0.0], [5.0, 6.0, 7.0], [-5.0, -6.0, -7.0]]
    rows += [[-1e-38, 1e-44, 0.0], [2e-38, 1e-36, -1e-37], [255.0, 0.5, 1.5], [0.0, -255.0, -2.5]]
    q, _, z = check(torch.tensor(rows, device=device), asymmetric=True)
    assert z[2:4].tolist() == [-128, 127]
    assert q[6].tolist() == [127, -128, -126]  # scale 1; ties go to even
    assert q[7].tolist() == [127, -128, 125]


def test_the_divisions_are_true_ones(device):
    """Each of the roundings shows next to a tie."""
    x = torch.linspace(-1, 1.7, 20001) * torch.logspace(-3, 3, 37)[:, None]
    x = x.to(device)
    smooth = random_smooth(20001, device=device)
    for scale in SCALES.values():
        check(x, **scale)
        check(x, smooth=smooth, **scale)


def test_static_scales_come_back_as_they_are(device):
    x = random_rows(3, 16, device=device)
    scale = torch.tensor([[0.25]], device=device)
    point = torch.tensor([3], dtype=torch.int32, device=device)
    q, s, z = fastq.quantize_per_token(x, scale=scale, zero_point=point, asymmetric=True)
    assert s is scale
    assert z is point
    assert torch.equal(q, (x / 0.25).round().add(3).clamp(-128, 127).char())
    for same in ({"scale": 0.25, "zero_point": 3}, {"scale": scale, "zero_point": 3}):
        again, s, z = fastq.quantize_per_token(x, **same)
        assert torch.equal(again, q)
        assert (s.dtype, s.device, s.item()) == (torch.float32, x.device, 0.25)
        assert (z.dtype, z.device, z.item()) == (torch.int32, x.device, 3)


def test_rows_do_not_depend_on_their_batch(device):
    x = random_rows(200, 300, device=device, dtype=torch.bfloat16)
    smooth = random_smooth(300, device=device)
    many = fastq.quantize_per_token(x, asymmetric=True, smooth=smooth)
    for row in (0, 7, 199):
        one = fastq.quantize_per_token(x[row : row + 1], asymmetric=True, smooth=smooth)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(one, many, strict=True))


def product_error(x, w, *, smooth=None, **options):
    """Of a W8A8 product against float64, in root mean square."""
    exact = x.double() @ w.double().t()
    q, s, *z = fastq.quantize_per_token(x, smooth=smooth, **options)
    qw, sw = fastq.quantize_per_channel(w if smooth is None else w * smooth)
    points = {"zero_point": z[0]} if z else {}
    y = fastq.int8_gemm(q, qw.t(), s, sw, out_dtype=torch.float32, **points)
    return ((y - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def test_asymmetric_products(device):
    """Values on one side of 0 get half the step, and half the error; w has none."""
    x = random_floats(64, 256, device=device).abs()
    w = torch.randint(-127, 128, (96, 256), generator=generator(2)).float().to(device)
    w[:, 0] = 127
    high = x.max().item()
    errors = {
        "symmetric": product_error(x, w),
        "asymmetric": product_error(x, w, asymmetric=True),
        "static": product_error(x, w, scale=high / 255, zero_point=-128),
    }
    assert errors["asymmetric"] < 0.55 * errors["symmetric"]
    assert errors["static"] < errors["symmetric"]
    assert errors["symmetric"] < 0.01


def test_asymmetric_products_are_those_of_what_q_stands_for(device):
    x, w = random_floats(33, 128, device=device) + 4, random_floats(24, 128, device=device)
    q, s, z = fastq.quantize_per_token(x, asymmetric=True)
    qw, sw = fastq.quantize_per_channel(w)
    y = fastq.int8_gemm(q, qw.t(), s, sw, zero_point=z, out_dtype=torch.float32)
    stands_for = (q.double() - z) * s.double()
    exact = stands_for @ (qw.double() * sw.double()[:, None]).t()
    assert (y - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (stands_for - x).abs().max() < 0.51 * s.max()


def test_smoothing_takes_outliers_out_of_the_activations(device):
    """Columns that are 50 times as large as the others; alpha = 0.5 as in SmoothQuant."""
    x = torch.randn(64, 512, generator=generator(1))
    x[:, 3::64] *= 50
    x, w = x.to(device), torch.randn(96, 512, generator=generator(2)).to(device)
    smooth = (x.abs().amax(0) / w.abs().amax(0)).sqrt()
    assert product_error(x, w, smooth=smooth) < product_error(x, w) / 2
