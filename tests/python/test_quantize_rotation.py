"""Quantisation of Hadamard-rotated values against the oracle, bit by bit, on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastq
import reference
from operands import FLOAT_DTYPES, LAYOUTS, generator, in_layout

ROTATIONS = [2, 4, 8, 16, 32]
ISAS = fastq.describe()["cpu"]["available"]
# Groups in a row: lengths that no vector width divides, and rows past what a GPU block holds in
# registers (16384 elements, 8192 of float32) and the CPU in its buffer (16384).
GROUPS = [1, 2, 3, 5, 7, 17, 33, 64, 129]
LONG = [8224, 16352, 16384, 16416, 16448, 40000]


def random_floats(*shape, device, dtype=torch.float32, seed=0):
    """N(0, 1), rows of very different sizes, each with a few outliers."""
    x = torch.randn(shape, generator=generator(seed))
    x[..., seed % max(x.shape[-1], 1) :: 97] *= 60
    if len(shape) > 1:
        x *= torch.logspace(-2, 2, shape[-2])[:, None]
    return x.to(dtype).to(device)


def check(x, rotation):
    """Both ops on x, and what they give."""
    q, s = fastq.quantize_per_token(x, rotation=rotation)
    assert q.shape == x.shape
    assert s.shape == (*x.shape[:-1], 1)
    assert q.is_contiguous()
    expected_q, expected_s = reference.quantize(x, rotation)
    reference.assert_same(s[..., 0], expected_s)
    reference.assert_same(q, expected_q)
    if x.dim() == 2:
        channel_q, channel_s = fastq.quantize_per_channel(x, rotation=rotation)
        reference.assert_same(channel_s, expected_s)
        reference.assert_same(channel_q, expected_q)
    return q, s[..., 0]


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_the_oracle_is_the_hadamard_product(rotation):
    """Of integers, whose sums are exact in any order; H[i, j] counts the bits of i & j."""
    hadamard = [[(-1) ** (i & j).bit_count() for j in range(rotation)] for i in range(rotation)]
    blocks = np.kron(np.eye(3), np.array(hadamard))
    assert np.array_equal(blocks @ blocks.T, rotation * np.eye(3 * rotation))
    x = torch.randint(-999, 999, (7, 3 * rotation), generator=generator(rotation)).float()
    assert np.array_equal(reference.rotate(x.numpy(), rotation), x.numpy() @ blocks)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_equals_reference(device, rotation, dtype):
    for groups in GROUPS:
        for rows in (1, 5, 33):
            x = random_floats(rows, groups * rotation, device=device, dtype=dtype, seed=groups)
            check(x, rotation)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("rotation", [2, 8, 32])
@pytest.mark.parametrize("length", LONG)
def test_long_rows(device, rotation, dtype, length):
    check(random_floats(3, length, device=device, dtype=dtype, seed=length), rotation)
    x = random_floats(3, length, device=device, dtype=dtype)
    check(in_layout(x, "stepped"), rotation)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, layout, rotation, dtype):
    for shape in ((1, 96), (9, 64), (40, 160), (130, 1024)):
        check(in_layout(random_floats(*shape, device=device, dtype=dtype), layout), rotation)


@pytest.mark.parametrize("shape", [(1000, 32), (2, 3, 64), (2, 1, 3, 1, 32), (96,)], ids=str)
def test_any_rank(device, shape):
    check(random_floats(*shape, device=device), 32)


def test_expanded_and_permuted_input(device):
    x = random_floats(6, 64, device=device)
    check(x[:1].expand(6, 64), 16)
    check(x[:, :1].expand(6, 64), 32)
    x = random_floats(3, 5, 4, 48, device=device)
    for order in ((1, 0, 2, 3), (2, 1, 0, 3)):
        check(x.permute(order), 16)
    check(x[::2, 1:4, ::3, 3:35], 32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_every_instruction_set(isa, rotation, monkeypatch):
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    for dtype in FLOAT_DTYPES:
        for length in (rotation, 3 * rotation, 512 + rotation, 2080, 16416):
            check(random_floats(5, length, device="cpu", dtype=dtype, seed=length), rotation)


def test_a_constant_block_becomes_one_number(device):
    x = torch.full((2, 64), 3.0, device=device)
    q, s = check(x, 32)
    assert q.tolist() == 2 * [2 * [127, *([0] * 31)]]
    assert torch.equal(s, torch.full_like(s, 96 / 127))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rows_of_zeros_have_scale_one(device, dtype):
    x = random_floats(5, 64, device=device, dtype=dtype)
    x[1], x[3] = 0.0, -0.0
    q, s = check(x, 32)
    assert (s[1], s[3]) == (1.0, 1.0)
    assert (q[1] == 0).all()


def test_tiny_values(device):
    x = random_floats(4, 64, device=device)
    for magnitude in (1e-36, 1e-38, 1e-41, 1e-44):
        check(x * magnitude, 16)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("length", [32, 96, 1024, 5024, 20000])
def test_nan_and_inf_rows(device, length, dtype):
    """Inf beside Inf may turn into NaN, and nothing turns into a number."""
    for position in {0, length // 2, length - 1}:
        x = random_floats(7, length, device=device, dtype=dtype)
        x[1, position] = math.nan
        x[2, position] = math.inf
        x[3, position] = -math.inf
        x[4, 0], x[4, length - 1] = math.inf, math.nan
        x[5, 0], x[5, 1] = math.inf, math.inf
        q, s = check(x, 32)
        assert s.isnan().tolist() == [False, True, False, False, True, True, False]
        assert s.isinf().tolist() == [False, False, True, True, False, False, False]
        assert (q[1:6] == 0).all()
        y = fastq.dequantize(q, s, out_dtype=torch.float32)
        assert y[1:6].isnan().all()


def test_overflow_counts_as_inf(device):
    x = torch.full((3, 64), 1.0, device=device)
    x[1] = 3e38
    q, s = check(x, 32)
    assert s.isfinite().tolist() == [True, False, True]
    assert (q[1] == 0).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0), (2, 0, 64)], ids=str)
def test_empty(device, shape, dtype):
    _, s = check(torch.empty(shape, dtype=dtype, device=device), 32)
    assert (s == 1).all()


def test_rows_do_not_depend_on_their_batch(device):
    x = random_floats(200, 320, device=device, dtype=torch.bfloat16)
    q, s = fastq.quantize_per_token(x, rotation=32)
    for row in (0, 7, 199):
        one_q, one_s = fastq.quantize_per_token(x[row : row + 1], rotation=32)
        assert torch.equal(one_q[0], q[row])
        assert torch.equal(one_s[0], s[row])


def test_outliers_cost_less(device):
    """One feature of 64 is 100 times as large as the others, as in a transformer's activations."""
    x = torch.randn(64, 1024, generator=generator(1)).to(device)
    w = torch.randn(96, 1024, generator=generator(2)).to(device)
    x[:, 5::64] *= 100
    w[:, 5::64] /= 100
    exact = x.double() @ w.double().t()
    errors = {}
    for rotation in (0, 32):
        qx, sx = fastq.quantize_per_token(x, rotation=rotation)
        qw, sw = fastq.quantize_per_channel(w, rotation=rotation)
        y = fastq.int8_gemm(qx, qw.t(), sx, sw / max(rotation, 1), out_dtype=torch.float32)
        errors[rotation] = (y - exact).square().mean().sqrt()
    assert errors[32] < errors[0] / 3
