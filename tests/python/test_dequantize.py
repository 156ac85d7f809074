"""dequantize against the oracle, bit by bit, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

import fastq
import reference
from operands import FLOAT_DTYPES, LAYOUTS, in_layout, random_int8, random_scales


def check(q, s, out_dtype, out=None):
    got = fastq.dequantize(q, s, out_dtype=out_dtype, out=out)
    assert got.dtype == out_dtype
    assert got.device == q.device
    reference.assert_same(got, reference.dequantize(q, s, out_dtype))
    return got


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 31, 64, 65, 127, 1000, 4096, 70001])
def test_equals_reference(device, length, out_dtype):
    for rows in (1, 3, 34):
        q = random_int8(rows, length, device=device, seed=length)
        check(q, random_scales(rows, 1, device=device), out_dtype)


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
def test_every_value(device, out_dtype):
    q = torch.arange(-128, 128, device=device).to(torch.int8).expand(50, 256)
    check(q, random_scales(50, device=device), out_dtype)


@pytest.mark.parametrize(
    "shape", [(), (1,), (1, 1), (2, 3, 4), (2, 3, 4, 1), (24,), (24, 1)], ids=str
)
def test_shapes_of_s(device, shape):
    q = random_int8(2, 3, 4, 40, device=device)
    check(q, random_scales(*shape, device=device), torch.float32)
    check(q, 0.3, torch.float32)


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("q_layout", LAYOUTS)
@pytest.mark.parametrize("out_layout", LAYOUTS)
def test_any_layout(device, q_layout, out_layout, out_dtype):
    for shape in ((1, 33), (20, 70), (65, 128)):
        q = in_layout(random_int8(*shape, device=device), q_layout)
        out = in_layout(torch.zeros(shape, dtype=out_dtype, device=device), out_layout)
        assert check(q, random_scales(shape[0], device=device), out_dtype, out) is out


def test_leading_dimensions_that_do_not_fold(device):
    q = random_int8(3, 5, 4, 48, device=device)
    s = random_scales(3, 5, 4, 2, device=device)[..., 1]
    for order in ((1, 0, 2), (2, 1, 0)):
        check(q.permute(*order, 3), s.permute(order), torch.float32)
    check(q[::2, 1:4], s[::2, 1:4], torch.bfloat16)
    check(q[:1].expand(3, 5, 4, 48), s[:, :1].expand(3, 5, 4), torch.bfloat16)
    check(random_int8(12, device=device), 0.5, torch.float32)


def test_default_out_dtype_is_bfloat16(device):
    q = random_int8(3, 16, device=device)
    assert fastq.dequantize(q, 1.0).dtype == torch.bfloat16
    out = torch.empty(3, 16, dtype=torch.float16, device=device)
    assert fastq.dequantize(q, 1.0, out=out) is out


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
def test_writes_all_of_out_and_nothing_else(device, out_dtype):
    q, s = random_int8(7, 67, device=device), random_scales(7, device=device)
    for pad in (1, 3, 64):
        canvas = torch.full((9, 67 + pad), math.nan, dtype=out_dtype, device=device)
        view = canvas[1:8, pad:]
        check(q, s, out_dtype, view)
        view.fill_(math.nan)
        assert canvas.isnan().all()


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
def test_nan_inf_and_the_ends_of_the_range(device, out_dtype):
    s = torch.tensor(
        [math.nan, math.inf, -math.inf, 3e38, 1e-38, 1e-45, 600.0, 1e-7], device=device
    )
    check(random_int8(8, 64, device=device), s, out_dtype)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_empty(device, shape):
    q = torch.empty(shape, dtype=torch.int8, device=device)
    check(q, random_scales(*shape[:-1], device=device), torch.float32)
