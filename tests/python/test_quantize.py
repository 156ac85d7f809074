"""quantize_per_token and quantize_per_channel against the oracle, bit by bit, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

import fastq
import reference
from operands import FLOAT_DTYPES, LAYOUTS, generator, in_layout

FLT_MIN = 2.0**-126
LENGTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000, 4096, 4097, 16384, 70001]


def random_floats(*shape, device, dtype=torch.float32, seed=0):
    """N(0, 1), rows of very different sizes."""
    x = torch.randn(shape, generator=generator(seed))
    if len(shape) > 1:
        x *= torch.logspace(-4, 4, shape[-2])[:, None]
    return x.to(dtype).to(device)


def check(x):
    """Both ops on x, which is a matrix or more, and what they give."""
    q, s = fastq.quantize_per_token(x)
    assert q.shape == x.shape
    assert s.shape == (*x.shape[:-1], 1)
    assert q.is_contiguous()
    assert q.dtype == torch.int8
    assert s.dtype == torch.float32
    assert q.device == s.device == x.device
    expected_q, expected_s = reference.quantize(x)
    reference.assert_same(s[..., 0], expected_s)
    reference.assert_same(q, expected_q)
    if x.dim() == 2:
        channel_q, channel_s = fastq.quantize_per_channel(x)
        assert channel_s.shape == x.shape[:1]
        assert channel_q.is_contiguous()
        reference.assert_same(channel_s, expected_s)
        reference.assert_same(channel_q, expected_q)
    return q, s[..., 0]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_reference(device, length, dtype):
    for rows in (1, 2, 5, 33):
        check(random_floats(rows, length, device=device, dtype=dtype, seed=length))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1000, 33), (2, 3, 40), (2, 1, 3, 1, 8), (12,)], ids=str)
def test_any_rank(device, shape, dtype):
    check(random_floats(*shape, device=device, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, layout, dtype):
    for shape in ((1, 77), (9, 64), (40, 130), (130, 1024)):
        check(in_layout(random_floats(*shape, device=device, dtype=dtype), layout))


def test_expanded_input(device):
    x = random_floats(6, 40, device=device)
    check(x[:1].expand(6, 40))
    check(x[:, :1].expand(6, 40))
    check(x[:2, None].expand(2, 3, 40))


def test_leading_dimensions_that_do_not_fold(device):
    x = random_floats(3, 5, 4, 48, device=device)
    for order in ((1, 0, 2, 3), (2, 1, 0, 3), (3, 1, 2, 0)):
        check(x.permute(order))
    check(x[::2, 1:4, ::3, 3:45])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_ties_round_to_even(device, dtype):
    """absmax 127 makes the scale 1, and every x.5 a tie."""
    x = torch.arange(-127.0, 127.5, 0.5, device=device).to(dtype).repeat(2, 1)
    q, s = check(x)
    assert (s == 1).all()
    assert torch.equal(q.float(), x.float().round())  # torch.round rounds half to even too
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], dtype=dtype, device=device)
    assert check(row)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_the_division_is_a_true_one(device, dtype):
    """x * (1 / s) and x / s differ in some last bits; q shows it next to a tie."""
    x = (
        torch.linspace(-1, 1, 20001, device=device)
        * torch.logspace(-3, 3, 37, device=device)[:, None]
    )
    check(x.to(dtype))


def test_extremes_keep_within_127(device):
    x = torch.tensor([[1.0, -1.0, 0.5], [3e38, -3.4e38, 1.0], [6e4, -6.5e4, 3.0]], device=device)
    q, _ = check(x)
    assert q.abs().max() == 127
    check(x[2:].half())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rows_of_zeros_have_scale_one(device, dtype):
    x = random_floats(5, 70, device=device, dtype=dtype)
    x[1], x[3] = 0.0, -0.0
    q, s = check(x)
    assert (s[1], s[3]) == (1.0, 1.0)
    assert (q[1] == 0).all()
    assert (q[3] == 0).all()


def test_the_scale_never_underflows(device):
    rows = [[1e-45, -1e-45, 0.0], [FLT_MIN, 0.0, 0.0], [127 * FLT_MIN, FLT_MIN, -FLT_MIN]]
    x = torch.tensor(rows, device=device)
    _, s = check(x)
    assert (s == FLT_MIN).all()
    check(torch.tensor([[2e-36, 1e-36, 3e-37], [1.5e-36, -1e-36, 1e-38]], device=device))
    check(torch.tensor([[2e-39, 1e-40, 0.0]], device=device).bfloat16())
    check(torch.tensor([[6e-8, 1.2e-7, 0.0]], device=device).half())  # float16 subnormals


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 5, 16, 64, 100, 513, 5000])
def test_nan_and_inf_rows(device, length, dtype):
    """Wherever in the row it stands: fmaxf would drop a NaN in silence."""
    for position in {0, length // 2, length - 1}:
        x = random_floats(6, length, device=device, dtype=dtype)
        x[1, position] = math.nan
        x[2, position] = math.inf
        x[3, position] = -math.inf
        x[4, 0], x[4, length - 1] = math.inf, math.nan
        x[5, position] = -math.nan
        q, s = check(x)
        assert s.isnan().tolist() == [False, True, False, False, True, True]
        assert s.isinf().tolist() == [False, False, True, True, False, False]
        assert (q[1:] == 0).all()
        y = fastq.dequantize(q, s, out_dtype=torch.float32)
        assert y[1:].isnan().all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4)], ids=str)
def test_empty(device, shape, dtype):
    _, s = check(torch.empty(shape, dtype=dtype, device=device))
    assert (s == 1).all()  # a row of nothing is a row of zeros


def test_rows_do_not_depend_on_their_batch(device):
    x = random_floats(200, 300, device=device, dtype=torch.bfloat16)
    q, s = fastq.quantize_per_token(x)
    for row in (0, 7, 199):
        one_q, one_s = fastq.quantize_per_token(x[row : row + 1])
        assert torch.equal(one_q[0], q[row])
        assert torch.equal(one_s[0], s[row])


def test_error_is_at_most_half_a_step(device):
    x = random_floats(64, 512, device=device)
    q, s = fastq.quantize_per_token(x)
    error = (q.double() * s.double() - x.double()).abs()
    assert (error <= 0.5 * s.double() * (1 + 1e-5)).all()
