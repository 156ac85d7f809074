"""int8_gemm against the oracle, bit by bit, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

import fastq
import reference
from operands import (
    FLOAT_DTYPES,
    LAYOUTS,
    OUT_DTYPES,
    in_layout,
    random_gemm,
    random_int8,
    random_scales,
)

# (M, N, K): sizes at, below and above vectors, tiles and K blocks; odd ones; big enough for several
# tiles and threads.
SHAPES = [
    *((1, 1, 1), (1, 1, 17), (1, 16, 64), (1, 129, 255), (1, 257, 1000), (1, 1000, 128)),
    *((2, 3, 7), (3, 2, 2), (7, 33, 31), (15, 17, 16), (16, 16, 16), (16, 64, 257)),
    *((17, 15, 63), (31, 1, 65), (33, 127, 64), (63, 65, 129), (64, 64, 128), (65, 63, 127)),
    *((127, 31, 33), (128, 128, 256), (129, 255, 15), (255, 7, 3), (257, 129, 66), (1000, 1, 1)),
    *((1000, 33, 17), (100, 1000, 48), (200, 300, 400)),
]


def check(problem, out_dtype, *, bias=None, out=None):
    a, b, sa, sb = problem
    got = fastq.int8_gemm(a, b, sa, sb, bias=bias, out_dtype=out_dtype, out=out)
    assert got.dtype == out_dtype
    assert got.device == a.device
    reference.assert_same(got, reference.int8_gemm(a, b, sa, sb, bias, out_dtype))
    return got


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(device, shape, layout, out_dtype):
    problem = random_gemm(*shape, device=device, out_dtype=out_dtype, seed=sum(shape))
    check(problem._replace(b=in_layout(problem.b, layout)), out_dtype)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_large_problem(device, layout, out_dtype):
    problem = random_gemm(512, 768, 1024, device=device, out_dtype=out_dtype)
    check(problem._replace(b=in_layout(problem.b, layout)), out_dtype)


@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_any_layout_of_the_operands(device, a_layout, b_layout):
    for M, N, K in ((1, 70, 130), (5, 33, 48), (67, 130, 80)):
        a, b, sa, sb = random_gemm(M, N, K, device=device)
        problem = (in_layout(a, a_layout), in_layout(b, b_layout), sa, sb)
        check(problem, torch.bfloat16)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_out(device, layout, out_dtype):
    for M, N, K in ((1, 40, 33), (18, 40, 64), (130, 200, 96)):
        problem = random_gemm(M, N, K, device=device, out_dtype=out_dtype)
        out = in_layout(torch.zeros(M, N, dtype=out_dtype, device=device), layout)
        got = check(problem, out_dtype, out=out)
        assert got is out


def test_what_lies_behind_a_row_is_not_read(device):
    """Rows of 65 in rows of 80: copies of 16 bytes reach over the end, into values that are set."""
    for K in (1, 65, 79):
        a = random_int8(33, 80, device=device, seed=K)[:, :K]
        b = random_int8(64, 80, device=device, seed=K + 1)[:, :K].t()
        sa, sb = random_scales(33, device=device), random_scales(64, device=device)
        for x, y in ((a, b), (a.contiguous(), b), (a, b.contiguous())):
            check((x, y, sa, sb), torch.bfloat16)


def test_expanded_operands(device):
    a, b, sa, sb = random_gemm(20, 30, 40, device=device)
    one_row = a[:1].expand(20, 40)
    check((one_row, b, sa, sb), torch.float32)
    check((a, b[:, :1].expand(40, 30), sa, sb), torch.float32)
    check((a[:, :1].expand(20, 40), b[:1].expand(40, 30), sa, sb), torch.float32)
    check((a, b, sa[:1].expand(20, 1), sb[:1].expand(30)), torch.float32)


def test_strided_scales_and_bias(device):
    a, b, _, _ = random_gemm(20, 30, 40, device=device)
    sa = random_scales(20, 7, device=device)[:, 3:4]
    sb = random_scales(30, 3, device=device)[:, 1]
    bias = random_scales(90, device=device)[::3]
    check((a, b, sa, sb), torch.float32, bias=bias)
    check((a, b, sa, sb), torch.bfloat16, bias=bias.to(torch.bfloat16).expand(1, 30))


@pytest.mark.parametrize(
    "leading",
    [(1,), (5,), (2, 3), (4, 1, 3), (1, 2, 1, 2, 1, 3)],
    ids=str,
)
def test_batched(device, leading):
    a = random_int8(*leading, 6, 40, device=device)
    _, b, _, sb = random_gemm(1, 24, 40, device=device)
    sa = random_scales(*leading, 6, 1, device=device)
    got = check((a, b, sa, sb), torch.bfloat16)
    assert got.shape == (*leading, 6, 24)


def test_leading_dimensions_that_do_not_fold(device):
    _, b, _, sb = random_gemm(1, 24, 40, device=device)
    base = random_int8(5, 3, 7, 2, 40, device=device)
    scales = random_scales(5, 3, 7, 2, 1, device=device)
    for order in ((0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (3, 1, 0, 2, 4), (2, 3, 1, 0, 4)):
        check((base.permute(order), b, scales.permute(order), sb), torch.float32)
    check((base[:, ::2, 1:6], b, scales[:, ::2, 1:6], sb), torch.float32)
    # Dimensions of a and of its scale that fold differently, and an out that folds in neither way.
    a, sa = base[:, :, :, 0], random_scales(7, 3, 5, device=device).permute(2, 1, 0)
    out = torch.full((5, 9, 7, 26), -7.0, device=device)[:, 1:4, :, :24]
    check((a, b, sa, sb), torch.float32, out=out)
    check((a[:1].expand(5, 3, 7, 40), b, sa[:, :1].expand(5, 3, 7), sb), torch.float32)


def test_a_has_the_largest_rank(device):
    a = random_int8(1, 2, 1, 2, 1, 1, 3, 20, device=device)
    _, b, _, sb = random_gemm(1, 10, 20, device=device)
    check((a, b, random_scales(*a.shape[:-1], device=device), sb), torch.float32)


@pytest.mark.parametrize("bias_shape", [(24,), (1, 24)], ids=str)
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
def test_bias(device, out_dtype, bias_shape):
    problem = random_gemm(9, 24, 40, device=device)
    bias = 100 * random_scales(*bias_shape, device=device) - 50
    check(problem, out_dtype, bias=bias)
    check(problem, out_dtype, bias=bias.to(out_dtype))


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (1, 1), (2, 3, 4), (2, 3, 4, 1), (24,), (24, 1)],
    ids=str,
)
def test_shapes_of_sa(device, shape):
    a = random_int8(2, 3, 4, 40, device=device)
    _, b, _, sb = random_gemm(1, 10, 40, device=device)
    check((a, b, random_scales(*shape, device=device), sb), torch.float32)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (10,), (1, 10)], ids=str)
def test_shapes_of_sb(device, shape):
    a, b, sa, _ = random_gemm(24, 10, 40, device=device)
    check((a, b, sa, random_scales(*shape, device=device)), torch.float32)


def test_python_scalars_as_scales(device):
    a, b, sa, sb = random_gemm(24, 10, 40, device=device)
    check((a, b, 0.1, sb), torch.float32)
    check((a, b, sa, 0.3), torch.bfloat16)
    check((a, b, 2, 0.3), torch.float16)


def test_default_out_dtype_is_bfloat16(device):
    a, b, sa, sb = random_gemm(3, 5, 16, device=device)
    assert fastq.int8_gemm(a, b, sa, sb).dtype == torch.bfloat16
    out = torch.empty(3, 5, dtype=torch.float16, device=device)
    assert fastq.int8_gemm(a, b, sa, sb, out=out) is out


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 7), (0, 0, 7), (0, 0, 0), (0, 5, 0)], ids=str)
def test_empty_out(device, shape, out_dtype):
    M, N, _ = shape
    problem = random_gemm(*shape, device=device, out_dtype=out_dtype)
    assert check(problem, out_dtype).shape == (M, N)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 64), (130, 130)], ids=str)
def test_k_of_zero_gives_the_bias(device, shape):
    M, N = shape
    a, b, sa, sb = random_gemm(M, N, 0, device=device)
    bias = random_scales(N, device=device)
    for out_dtype in FLOAT_DTYPES:
        out = torch.full((M, N), math.nan, dtype=out_dtype, device=device)
        check((a, b, sa, sb), out_dtype, out=out)
        check((a, b, sa, sb), out_dtype, bias=bias, out=out)
    out = torch.full((M, N), 99, dtype=torch.int32, device=device)
    check((a, b, None, None), torch.int32, out=out)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 67, 65), (7, 50, 30), (70, 140, 64)], ids=str)
def test_writes_all_of_out_and_nothing_else(device, shape, out_dtype):
    M, N, _ = shape
    problem = random_gemm(*shape, device=device, out_dtype=out_dtype)
    poison = 12345 if out_dtype == torch.int32 else math.nan
    for pad in (1, 3, 8, 64):
        canvas = torch.full((M + 2, N + pad), poison, dtype=out_dtype, device=device)
        for left in {0, pad}:
            canvas.fill_(poison)
            view = canvas[1 : 1 + M, left : left + N]
            check(problem, out_dtype, out=view)
            view.fill_(poison)
            untouched = canvas == poison if out_dtype == torch.int32 else canvas.isnan()
            assert untouched.all()
    canvas = torch.full((N + 2, M + 3), poison, dtype=out_dtype, device=device)
    view = canvas[1 : 1 + N, 2 : 2 + M].t()
    check(problem, out_dtype, out=view)
    view.fill_(poison)
    assert (canvas == poison if out_dtype == torch.int32 else canvas.isnan()).all()


@pytest.mark.parametrize("values", [(-128, -128), (-128, 127), (127, 127)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_longest_sums_are_exact(device, layout, values):
    """-128 * -128 * 131071 = 2**31 - 16384 is the largest sum there can be."""
    for M, N in ((1, 1), (2, 17), (33, 5)):
        a = torch.full((M, 131071), values[0], dtype=torch.int8, device=device)
        b = in_layout(torch.full((131071, N), values[1], dtype=torch.int8, device=device), layout)
        got = fastq.int8_gemm(a, b, None, None, out_dtype=torch.int32)
        assert (got == values[0] * values[1] * 131071).all()
        got = fastq.int8_gemm(a, b, 1.0, 1.0, out_dtype=torch.float32)
        assert (got == float(torch.tensor(values[0] * values[1] * 131071).float())).all()


def test_sums_beyond_float32_round_to_even(device):
    """An odd number above 2**24 lies between two float32: converting the sum is a rounding."""
    a = torch.tensor([[127] * 1040 + [1] * 25], dtype=torch.int8, device=device)
    b = torch.full((1065, 40), 127, dtype=torch.int8, device=device)
    b[1064] = 8 + torch.arange(40, dtype=torch.int8, device=device)
    sums = fastq.int8_gemm(a, b, None, None, out_dtype=torch.int32)
    assert sums[0].tolist() == [2**24 + i for i in range(40)]
    check((a, b, 1.0, 1.0), torch.float32)


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_every_batch(device, out_dtype):
    a, b, sa, sb = random_gemm(300, 200, 352, device=device)
    bias = random_scales(200, device=device)

    def product(rows):
        return fastq.int8_gemm(a[rows], b, sa[rows], sb, bias=bias, out_dtype=out_dtype)

    whole = product(slice(None))
    for row in (0, 1, 63, 64, 150, 299):
        for count in (1, 2, 16, 65, 130):
            rows = slice(max(0, row + 1 - count), row + 1)
            assert torch.equal(product(rows)[-1], whole[row])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
def test_nan_and_inf_reach_the_output(device, out_dtype, bad):
    a, b, sa, sb = random_gemm(20, 40, 32, device=device)
    sa[3], sb[5] = bad, bad
    bias = torch.zeros(40, device=device)
    bias[7] = bad
    got = check((a, b, sa, sb), out_dtype, bias=bias)
    affected = torch.zeros(20, 40, dtype=torch.bool, device=device)
    affected[3], affected[:, 5], affected[:, 7] = True, True, True
    assert torch.equal(~got.isfinite(), affected)
    # What quantize_per_token makes of a row with a NaN: scale NaN and q = 0.
    a[3] = 0
    got = check((a, b, sa, sb), out_dtype)
    assert got[3].isnan().all()


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
def test_results_beyond_the_range_become_inf_or_subnormal(device, out_dtype):
    a, b, sa, sb = random_gemm(16, 24, 32, device=device)
    check((a, b, sa * 3e38, sb), out_dtype)
    check((a, b, sa * 1e4, sb), out_dtype)  # over 65504 for float16
    check((a, b, sa * 1e-38, sb * 1e-4), out_dtype)
    check((a, b, sa * 1e-6, sb * 1e-4), out_dtype)  # float16 subnormals


@pytest.mark.parametrize("layout", LAYOUTS)
def test_b_is_constant_changes_no_bits(device, layout):
    a, b, sa, sb = random_gemm(20, 72, 144, device=device)
    got = fastq.int8_gemm(a, in_layout(b, layout), sa, sb, b_is_constant=True)
    reference.assert_same(got, reference.int8_gemm(a, b, sa, sb))


def test_describe_names_the_kernel(device):
    a, b, _, _ = random_gemm(4, 8, 16, device=device)
    assert fastq.describe_int8_gemm(a, b).startswith(f"{device.type}/")
    assert fastq.describe_int8_gemm(a[:0], b) == "none (an empty product)"
    with pytest.raises(ValueError, match="int8_gemm: a has shape"):
        fastq.describe_int8_gemm(a, b[1:])
