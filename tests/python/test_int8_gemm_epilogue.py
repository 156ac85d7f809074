"""What int8_gemm does after the sums: zero points, activation, residual and int8 output, alone and
together, on every backend. Bit by bit, but for the activations, which have bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastq
import reference
from operands import (
    FLOAT_DTYPES,
    LAYOUTS,
    generator,
    in_layout,
    random_floats,
    random_gemm,
    random_int8,
    random_scales,
    random_zero_points,
)

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
INEXACT = ACTIVATIONS[1:]
SHAPES = [(1, 1, 1), (1, 130, 70), (7, 33, 31), (64, 64, 128), (130, 100, 65)]


def check(problem, out_dtype, *, out=None, **options):
    a, b, sa, sb = problem
    got = fastq.int8_gemm(a, b, sa, sb, out_dtype=out_dtype, out=out, **options)
    assert got.dtype == out_dtype
    assert got.device == a.device
    if options.get("activation") in INEXACT:
        bounds = reference.int8_gemm_bounds(a, b, sa, sb, out_dtype=out_dtype, **options)
        reference.assert_between(got, bounds)
    else:
        options.pop("column_sums", None)
        expected = reference.int8_gemm(a, b, sa, sb, out_dtype=out_dtype, **options)
        reference.assert_same(got, expected)
    return got


def moderate(problem):
    """The same problem with results that mostly lie between -10 and 10."""
    factor = 1e-3 / math.sqrt(max(1, problem.a.shape[-1]))
    return problem._replace(sb=problem.sb * factor)


def as_product(values):
    """Operands whose product is exactly `values`, a vector along N, in each of three rows."""
    ones = torch.ones(3, 1, dtype=torch.int8, device=values.device)
    row = torch.ones(1, values.numel(), dtype=torch.int8, device=values.device)
    return ones, row, 1.0, values


# --- activations -------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", [*FLOAT_DTYPES, torch.int8], ids=str)
def test_activation(device, activation, out_dtype):
    options = {"out_scale": 0.05} if out_dtype == torch.int8 else {}
    for shape in SHAPES:
        problem = moderate(random_gemm(*shape, device=device))
        check(problem, out_dtype, activation=activation, **options)


def all_magnitudes():
    """Both signs of values from the smallest subnormal to the largest float32, densest where an
    activation bends."""
    powers = 2.0 ** torch.linspace(-149, 127.99, 3001, dtype=torch.float64)
    dense = torch.linspace(0, 120, 12001, dtype=torch.float64)
    near = torch.linspace(0, 8, 8001, dtype=torch.float64)
    values = torch.cat([powers, dense, near, torch.tensor([0.0])]).float()
    special = torch.tensor([math.inf, math.nan])
    return torch.cat([values, -values, special, -special])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_every_magnitude(device, activation):
    got = check(as_product(all_magnitudes().to(device)), torch.float32, activation=activation)
    inf, nan, minus_inf, minus_nan = got[0, -4:].tolist()
    assert inf == math.inf
    assert minus_inf == 0
    assert math.isnan(nan)
    assert math.isnan(minus_nan)
    assert (got == got[:1]).all(0).logical_or(got.isnan().all(0)).all()


def test_activations_agree_with_torch(device):
    y = torch.linspace(-12, 12, 4001, device=device)
    functional = torch.nn.functional
    for activation, function in {
        "relu": functional.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "silu": functional.silu,
    }.items():
        got = fastq.int8_gemm(*as_product(y), activation=activation, out_dtype=torch.float32)
        torch.testing.assert_close(got[0].double(), function(y.double()), rtol=2e-6, atol=1e-12)


def test_relu_keeps_minus_zero_and_nan(device):
    values = torch.tensor([-0.0, 0.0, math.nan, -1.0, 2.0], device=device)
    got = fastq.int8_gemm(*as_product(values), activation="relu", out_dtype=torch.float32)[0]
    assert got.isnan().tolist() == [False, False, True, False, False]
    assert got[[0, 1, 3, 4]].tolist() == [0, 0, 0, 2]
    assert torch.signbit(got[[0, 1, 3]]).tolist() == [True, False, False]


# --- residual ----------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_residual(device, dtype, out_dtype):
    for shape in SHAPES:
        M, N, _ = shape
        problem = random_gemm(*shape, device=device)
        residual = random_floats(M, N, device=device, dtype=dtype)
        check(problem, out_dtype, residual=residual)
        check(problem, out_dtype, residual=residual, bias=random_scales(N, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_any_layout_of_the_residual(device, dtype, layout):
    for M, N, K in ((1, 40, 33), (18, 40, 64), (130, 200, 96)):
        problem = random_gemm(M, N, K, device=device)
        residual = in_layout(random_floats(M, N, device=device, dtype=dtype), layout)
        check(problem, torch.bfloat16, residual=residual)
        out = in_layout(torch.zeros(M, N, device=device), layout)
        check(problem, torch.float32, residual=residual, out=out)


def test_a_residual_that_repeats_itself(device):
    problem = random_gemm(20, 40, 32, device=device)
    row = random_floats(1, 40, device=device)
    column = random_floats(20, 1, device=device)
    check(problem, torch.float32, residual=row.expand(20, 40))
    check(problem, torch.float32, residual=column.expand(20, 40))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_accumulates_in_place(device, dtype, layout):
    """residual and out are one tensor."""
    for M, N, K in ((1, 40, 33), (33, 50, 64), (150, 200, 96)):
        problem = random_gemm(M, N, K, device=device)
        before = random_floats(M, N, device=device, dtype=dtype)
        out = in_layout(before, layout)
        got = fastq.int8_gemm(*problem, residual=out, out=out)
        assert got is out
        expected = reference.int8_gemm(*problem, out_dtype=dtype, residual=before)
        reference.assert_same(out, expected)
        # Another tensor object of the same memory; strides of a dimension of size 1 mean nothing.
        out.copy_(before)
        same = out.as_strided(out.shape, out.stride()) if M > 1 else out[0][None]
        fastq.int8_gemm(*problem, residual=same, out=out)
        reference.assert_same(out, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_of_the_residual_reach_the_output(device, bad):
    problem = random_gemm(20, 40, 32, device=device)
    residual = random_floats(20, 40, device=device)
    residual[3, 7] = bad
    for activation in (None, *ACTIVATIONS):
        got = check(problem, torch.float32, residual=residual, activation=activation)
        assert (~got.isfinite()).nonzero().tolist() == [[3, 7]]


# --- int8 output -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_output(device, layout):
    for M, N, K in (*SHAPES, (150, 200, 96)):
        problem = moderate(random_gemm(M, N, K, device=device))
        bias = random_floats(N, device=device)
        out = in_layout(random_int8(M, N, device=device), layout)
        check(problem, torch.int8, out_scale=0.031, bias=bias, out=out)
        residual = random_floats(M, N, device=device, dtype=torch.float16)
        check(problem, torch.int8, out_scale=0.031, residual=residual, out=out)


def test_int8_output_rounds_half_to_even_and_saturates(device):
    values = [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -126.5, -127.5, 1e30, -1e30, math.inf]
    expected = [0, 2, 2, 0, -2, 126, 127, -126, -127, 127, -127, 127]
    values += [-math.inf, math.nan, -math.nan, -0.0, 1e-45, 126.49999, 4194305.5]
    expected += [-127, -128, -128, 0, 0, 126, 127]
    product = as_product(torch.tensor(values, device=device))
    got = check(product, torch.int8, out_scale=1.0)
    assert got[0].tolist() == expected
    doubled = as_product(2 * torch.tensor(values, device=device))
    assert torch.equal(check(doubled, torch.int8, out_scale=2.0)[:, :16], got[:, :16])


def test_forms_of_out_scale(device):
    problem = moderate(random_gemm(9, 20, 30, device=device))
    expected = check(problem, torch.int8, out_scale=0.25)
    for shape in ((), (1,), (1, 1)):
        scale = torch.full(shape, 0.25, device=device)
        assert torch.equal(fastq.int8_gemm(*problem, out_scale=scale), expected)
        out = torch.empty_like(expected)
        assert fastq.int8_gemm(*problem, out_scale=scale, out=out) is out
        assert torch.equal(out, expected)
    for scale in (3e-39, 1e38, math.inf, math.nan):
        check(problem, torch.int8, out_scale=scale)


def test_int8_output_quantises_the_float_output(device):
    """Static quantisation of what a float32 output would be (SmoothQuant O3)."""
    problem = moderate(random_gemm(40, 60, 80, device=device))
    y = fastq.int8_gemm(*problem, activation="gelu", out_dtype=torch.float32)
    scale = y.abs().max() / 127
    q = fastq.int8_gemm(*problem, activation="gelu", out_scale=scale)
    assert q.dtype == torch.int8
    assert q.abs().max() == 127
    assert torch.equal(q, (y / scale).round().clamp(-127, 127).char())


# --- asymmetric activations --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4), (2, 3, 4, 1), (24,), (24, 1)], ids=str)
def test_shapes_of_zero_point(device, shape):
    a = random_int8(2, 3, 4, 40, device=device)
    _, b, _, sb = random_gemm(1, 10, 40, device=device)
    problem = (a, b, random_scales(2, 3, 4, 1, device=device), sb)
    zero_point = random_zero_points(*shape, device=device)
    sums = b.sum(0, dtype=torch.int32)
    check(problem, torch.float32, zero_point=zero_point)
    check(problem, torch.float32, zero_point=zero_point, column_sums=sums)
    check(problem, torch.float32, zero_point=zero_point, column_sums=sums[None])
    stepped = torch.zeros(3 * 10, dtype=torch.int32, device=device)[::3].copy_(sums)
    check(problem, torch.bfloat16, zero_point=zero_point, column_sums=stepped)
    check((a, b, None, None), torch.int32, zero_point=zero_point, column_sums=sums)


def test_zero_point_as_an_int(device):
    problem = random_gemm(9, 20, 30, device=device)
    for value in (-128, 0, 5, 127):
        check(problem, torch.float32, zero_point=value)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "stepped"])
def test_zero_point_in_many_shapes(device, layout):
    for M, N, K in (*SHAPES, (3, 5, 0), (33, 127, 64), (0, 5, 7), (4, 0, 7)):
        a, b, sa, sb = random_gemm(M, N, K, device=device)
        problem = (in_layout(a, layout), in_layout(b, layout), sa, sb)
        check(problem, torch.float32, zero_point=random_zero_points(M, 1, device=device))
        raw = (problem[0], problem[1], None, None)
        check(raw, torch.int32, zero_point=random_zero_points(M, device=device))


def test_longest_sums_with_a_zero_point(device):
    """255 * 128 * 65535 is the largest sum there can be."""
    for M, N in ((1, 1), (2, 17), (33, 5)):
        for value, point, weight in ((-128, 127, -128), (127, -128, -128), (-128, 127, 127)):
            a = torch.full((M, 65535), value, dtype=torch.int8, device=device)
            b = torch.full((N, 65535), weight, dtype=torch.int8, device=device).t()
            got = fastq.int8_gemm(a, b, None, None, zero_point=point, out_dtype=torch.int32)
            assert (got == (value - point) * weight * 65535).all()


def test_zero_point_makes_unsigned_activations_exact(device):
    """uint8 activations with their own zero point, both shifted by 128 into int8."""
    numbers = generator()
    unsigned = torch.randint(0, 256, (12, 64), dtype=torch.int32, generator=numbers).to(device)
    zero_point = torch.randint(0, 256, (12, 1), dtype=torch.int32, generator=numbers).to(device)
    b = random_int8(64, 30, device=device)
    a, point = (unsigned - 128).to(torch.int8), zero_point - 128
    got = fastq.int8_gemm(a, b, None, None, zero_point=point, out_dtype=torch.int32)
    expected = (unsigned - zero_point).double() @ b.double()
    assert torch.equal(got.double(), expected)


def test_packed_weights_take_column_sums():
    device = torch.device("cpu")
    a, b, sa, sb = random_gemm(20, 50, 70, device=device)
    points, sums = random_zero_points(20, device=device), b.sum(0, dtype=torch.int32)
    packed = fastq.pack_weight(b)
    for options in ({}, {"activation": "relu"}, {"out_scale": 9.0}):
        got = fastq.int8_gemm(a, packed, sa, sb, zero_point=points, column_sums=sums, **options)
        plain = fastq.int8_gemm(a, b, sa, sb, zero_point=points, **options)
        assert torch.equal(got, plain)


# --- all of it ---------------------------------------------------------------------------------


def all_options(M, N, *, device, activation="relu", seed=0):
    return {
        "bias": random_floats(N, device=device, seed=seed),
        "zero_point": random_zero_points(M, 1, device=device, seed=seed + 1),
        "activation": activation,
        "residual": random_floats(M, N, device=device, seed=seed + 2),
    }


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("out_dtype", [*FLOAT_DTYPES, torch.int8], ids=str)
def test_everything_at_once(device, out_dtype, activation):
    for shape in (*SHAPES, (200, 300, 400), (2, 3, 0)):
        problem = moderate(random_gemm(*shape, device=device))
        options = all_options(*shape[:2], device=device, activation=activation)
        if out_dtype == torch.int8:
            options["out_scale"] = 0.04
        check(problem, out_dtype, **options)


def test_leading_dimensions_that_do_not_fold(device):
    _, b, _, sb = random_gemm(1, 24, 40, device=device)
    a = random_int8(5, 3, 7, 40, device=device)
    sa = random_scales(7, 3, 5, device=device).permute(2, 1, 0)
    points = random_zero_points(3, 5, 7, device=device).transpose(0, 1)
    residual = random_floats(7, 5, 3, 24, device=device).permute(1, 2, 0, 3)
    options = {"zero_point": points, "residual": residual, "activation": "relu"}
    check((a, b, sa, sb), torch.float32, **options)
    out = torch.full((5, 9, 7, 26), -7.0, device=device)[:, 1:4, :, :24]
    check((a, b, sa, sb), torch.float32, out=out, **options)
    check((a, b, sa, sb), torch.float32, **{**options, "zero_point": points.flatten()})
    check((a, b, sa, sb), torch.int8, **options, out_scale=9.0)
    out.copy_(residual)
    expected = fastq.int8_gemm(a, b, sa, sb, out_dtype=torch.float32, **options)
    fastq.int8_gemm(a, b, sa, sb, out=out, **{**options, "residual": out})
    assert torch.equal(out, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_has_the_same_bits_in_every_batch(device, activation):
    a, b, sa, sb = moderate(random_gemm(300, 200, 352, device=device))
    options = all_options(300, 200, device=device, activation=activation)

    def product(rows):
        parts = {name: options[name][rows] for name in ("zero_point", "residual")}
        return fastq.int8_gemm(a[rows], b, sa[rows], sb, **{**options, **parts})

    whole = product(slice(None))
    for row in (0, 1, 63, 64, 150, 299):
        for count in (1, 2, 16, 65, 130):
            rows = slice(max(0, row + 1 - count), row + 1)
            assert torch.equal(product(rows)[-1], whole[row])


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_writes_all_of_out_and_nothing_else(device, out_dtype):
    poison = 99 if out_dtype == torch.int8 else -12288.0
    for shape in ((1, 67, 65), (7, 50, 30), (70, 140, 64)):
        M, N, _ = shape
        problem = moderate(random_gemm(*shape, device=device))
        options = all_options(M, N, device=device)
        if out_dtype == torch.int8:
            options["out_scale"] = 1000.0  # the poison is out of reach
        for pad in (1, 3, 8, 64):
            canvas = torch.full((M + 2, N + pad), poison, dtype=out_dtype, device=device)
            view = canvas[1 : 1 + M, pad : pad + N]
            check(problem, out_dtype, out=view, **options)
            view.fill_(poison)
            assert (canvas == poison).all()
        canvas = torch.full((N + 2, M + 3), poison, dtype=out_dtype, device=device)
        view = canvas[1 : 1 + N, 2 : 2 + M].t()
        check(problem, out_dtype, out=view, **options)
        view.fill_(poison)
        assert (canvas == poison).all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 7), (0, 0, 0)], ids=str)
def test_empty_out(device, shape):
    M, N, _ = shape
    problem = random_gemm(*shape, device=device)
    options = all_options(M, N, device=device)
    assert check(problem, torch.float32, **options).shape == (M, N)
    assert check(problem, torch.int8, out_scale=1.0, **options).shape == (M, N)


def test_nan_never_becomes_a_number(device):
    a, b, sa, sb = moderate(random_gemm(20, 40, 32, device=device))
    sa[3], sb[5] = math.nan, math.nan
    for activation in (None, *ACTIVATIONS):
        got = fastq.int8_gemm(a, b, sa, sb, activation=activation, out_dtype=torch.float32)
        affected = torch.zeros(20, 40, dtype=torch.bool, device=device)
        affected[3], affected[:, 5] = True, True
        assert torch.equal(got.isnan(), affected)
        q = fastq.int8_gemm(a, b, sa, sb, activation=activation, out_scale=0.1)
        assert torch.equal(q == -128, affected)


@pytest.mark.cuda
def test_exact_options_give_the_same_bits_on_both_backends():
    cpu = torch.device("cpu")
    for shape in ((1, 256, 512), (65, 64, 144), (333, 777, 555)):
        problem = moderate(random_gemm(*shape, device=cpu))
        options = all_options(*shape[:2], device=cpu)
        for extra in ({}, {"out_scale": 0.04}, {"out_dtype": torch.float32}):
            expected = fastq.int8_gemm(*problem, **options, **extra)
            moved = {k: v.cuda() if torch.is_tensor(v) else v for k, v in options.items()}
            got = fastq.int8_gemm(*(t.cuda() for t in problem), **moved, **extra)
            assert torch.equal(got.cpu(), expected)


def test_the_oracle_of_the_activations():
    """Its formulas, free of cancellation, against 13 digits that mpmath gave for the plain ones."""
    y = np.array([-12.0, -3.0, -0.5, 0.25, 2.0], np.float32)
    digits = {
        "gelu": "-2.131778534493e-32 -0.00404969409489 -0.154268769363 0.1496765814207 "
        "1.954499736104",
        "gelu_tanh": "-1.635985449353e-61 -0.003637392081773 -0.1542859901749 0.1496753507017 "
        "1.954597694088",
        "silu": "-7.373009522658e-5 -0.1422776195327 -0.1887703343991 0.1405441252214 "
        "1.761594155956",
    }
    for activation, expected in digits.items():
        got = reference.activate(y, activation)
        np.testing.assert_allclose(got, [float(x) for x in expected.split()], rtol=1e-12)
