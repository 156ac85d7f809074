"""silu_mul_quant, gelu_quant and relu_quant against float64, and against quantize_per_token where
the float32 values are exact, on every backend."""

from __future__ import annotations

import ctypes
import itertools
import math

import numpy as np
import pytest
import torch

import c_abi
import fastq
import reference
from operands import FLOAT_DTYPES, LAYOUTS, generator, in_layout
from quantizations import ISAS, SCALES, random_rows, random_smooth

TOLERANCE = 2e-6  # of the activation 1e-6, and the roundings after it
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu"]
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
dtypes = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
scales = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)


def call(activation, x, up, **options):
    if activation == "silu":
        return fastq.silu_mul_quant(x, up, **options)
    if activation == "relu":
        return fastq.relu_quant(x, up=up, **options)
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}[activation]
    return fastq.gelu_quant(x, up=up, approximate=approximate, **options)


def activated(activation, x, up):
    with np.errstate(all="ignore"):
        y = reference.activate(reference.to_numpy(x), activation)
        return y if up is None else y * reference.to_numpy(up)


def check(activation, x, up=None, **options):
    """The op on x, within TOLERANCE; relu's bit by bit. Gives what the op gave."""
    if activation == "silu" and up is None:
        up = torch.ones_like(x)
    before = [t.clone() for t in (x, up) if t is not None]
    got = call(activation, x, up, **options)
    assert got[0].is_contiguous()
    assert all(torch.equal(*pair) for pair in zip((x, up), before, strict=False))
    if activation == "relu":
        y = activated(activation, x, up).astype(np.float32)  # the product is exact in float64
        q, s, z = reference.quantize_with(y, **options)
        is_static = "scale" in options
        reference.assert_same(got[0], q)
        reference.assert_same(got[1] if is_static else got[1][..., 0], s)
        if z is not None:
            reference.assert_same(got[2] if is_static else got[2][..., 0], z)
    else:
        reference.assert_quantizes(got, activated(activation, x, up), TOLERANCE, **options)
    return got


def pair(*shape, device, dtype=torch.float32, seed=0):
    """Two operands, as the halves of one tensor."""
    x = random_rows(*shape[:-1], 2 * shape[-1], device=device, dtype=dtype, seed=seed)
    return x.chunk(2, -1)


@dtypes
@activations
def test_equals_float64(device, activation, dtype):
    shapes = [(1, 1), (1, 2), (3, 7), (5, 33), (33, 64), (3, 129), (17, 1000), (1, 4096), (5, 4097)]
    for rows, length in [*shapes, (2, 16384), (1, 20001), (1, 65536)]:
        x, up = pair(rows, length, device=device, dtype=dtype, seed=length)
        check(activation, x, up)
        check(activation, x.contiguous())


@scales
@activations
def test_every_way_to_quantise(device, activation, scale):
    for dtype, length in itertools.product(FLOAT_DTYPES, (32, 77, 1056, 16416)):
        x, up = pair(2, length, device=device, dtype=dtype, seed=length)
        smooth = random_smooth(length, device=device, dtype=dtype)
        check(activation, x, up, **scale)
        check(activation, x, None, smooth=smooth, **scale)
        if length % 32 == 0:
            check(activation, x, up, rotation=32, **scale)
            check(activation, x, up, smooth=smooth, rotation=8, **scale)


@dtypes
@activations
def test_rows_without_large_results(device, activation, dtype):
    for rows, length in ((1, 8), (3, 77), (4, 4096), (2, 11008), (1, 65536)):
        x = random_rows(rows, length, device=device, dtype=dtype, seed=length)
        negative = -x.abs().clamp(max=3.0)
        check(activation, negative, None)
        check(activation, torch.cat([negative, negative / -16]), None)


@pytest.mark.parametrize("isa", ISAS)
@activations
def test_every_instruction_set(activation, isa, monkeypatch):
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    for dtype, length in itertools.product(FLOAT_DTYPES, (1, 15, 77, 512, 4099)):
        x, up = pair(5, length, device="cpu", dtype=dtype, seed=length)
        check(activation, x, up)
        check(activation, x, None, smooth=random_smooth(length, device="cpu"), asymmetric=True)
        if length % 16 == 0:
            check(activation, x, up, rotation=16)


@activations
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, layout, activation):
    for dtype, shape in itertools.product(FLOAT_DTYPES, ((1, 77), (9, 64), (40, 130), (33, 512))):
        x, up = pair(*shape, device=device, dtype=dtype)
        smooth = in_layout(random_smooth(shape[1], device=device)[None], layout)
        check(activation, in_layout(x, layout), up)
        check(activation, x, in_layout(up, layout), smooth=smooth)
        check(activation, in_layout(x, layout), in_layout(up, layout), asymmetric=True)
        check(activation, in_layout(x, layout))


@activations
def test_any_rank_and_expanded_operands(device, activation):
    for shape in ((12,), (2, 3, 40), (2, 1, 3, 1, 8)):
        check(activation, *pair(*shape, device=device))
    x, up = pair(3, 5, 4, 48, device=device)
    for order in ((1, 0, 2, 3), (2, 1, 0, 3)):
        check(activation, x.permute(order), up.permute(order))
    by_columns = up.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    check(activation, x.permute(1, 0, 2, 3), by_columns.transpose(0, 1))
    check(activation, x[:1].expand(3, 5, 4, 48), up[:, :, :, :1].expand(3, 5, 4, 48))
    check(activation, x, x)


@dtypes
def test_relu_is_quantize_per_token_of_relu(device, dtype):
    x, _ = pair(20, 300, device=device, dtype=dtype)
    for options in (*SCALES.values(), {"smooth": random_smooth(300, device=device)}):
        got = fastq.relu_quant(x, **options)
        wanted = fastq.quantize_per_token(torch.relu(x), **options)
        assert all(torch.equal(*both) for both in zip(got, wanted, strict=True))


@activations
def test_far_from_zero(device, activation):
    """exp and erf neither overflow nor lose what is left of them far down the negative side."""
    x = torch.linspace(-120, 120, 4001, device=device).repeat(3, 1)
    x[1] = -x[1].abs() * 0.09  # small numbers only
    x[2] = 3e38 * torch.linspace(-1, 1, 4001, device=device)
    check(activation, x[:2])
    q, s, *_ = call(activation, x[2:], torch.full_like(x[2:], 0.5))
    assert s.item() == pytest.approx(1.5e38 / 127, rel=1e-6)
    assert (q[0, :2000] == 0).all()
    assert q[0, -1] == 127


@activations
def test_zeros_and_empty(device, activation):
    for dtype in FLOAT_DTYPES:
        x, up = (t.clone() for t in pair(5, 70, device=device, dtype=dtype))
        x[1], up[3] = 0.0, 0.0
        q, s = check(activation, x, up)
        assert (s[1], s[3]) == (1.0, 1.0)
        assert (q[1] == 0).all()
        assert (q[3] == 0).all()
        for shape in ((0, 5), (3, 0), (0, 0), (2, 0, 4)):
            x = torch.empty(shape, dtype=dtype, device=device)
            q, s, z = call(activation, x, x, asymmetric=True)
            assert (q.shape, s.shape, z.shape) == (shape, *[(*shape[:-1], 1)] * 2)
            assert (s == 1).all()


@dtypes
@activations
@pytest.mark.parametrize("asymmetric", [False, True])
def test_nan_and_inf_rows(device, asymmetric, activation, dtype):
    """In either operand; activations of -inf are 0, as int8_gemm has them, -inf * 0 is NaN."""
    for length, position in ((2, 0), (5, 4), (64, 0), (513, 512), (20000, 9999), (20000, 19999)):
        x, up = pair(9, length, device=device, dtype=dtype)
        x, up = x.abs() + 0.5, up.clone()
        for row, value in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
            x[1 + row, position] = value
            up[5 + row, position] = value
        y = torch.from_numpy(activated(activation, x, up))
        q, s, *z = call(activation, x, up, asymmetric=asymmetric)
        rows = [True, False, False, False, True, False, False, False, False]
        assert s[:, 0].isfinite().tolist() == rows
        assert s[:, 0].isnan().tolist() == y.isnan().any(1).tolist()
        bad = ~torch.tensor(rows)
        assert (q[bad] == 0).all()
        assert all((point[bad] == 0).all() for point in z)
        static = call(activation, x, up, scale=0.1)[0]
        assert torch.equal((static == -128).cpu(), y.isnan())
        infinite = y.isinf()
        assert torch.equal(static.cpu()[infinite], (127 * y.sign()).char()[infinite])


@activations
def test_rows_do_not_depend_on_their_batch(device, activation):
    for length in (300, 4096):
        x, up = pair(150, length, device=device, dtype=torch.bfloat16)
        many = call(activation, x, up)
        for row in (0, 7, 149):
            rows = slice(row, row + 1)
            one = call(activation, x[rows].contiguous(), up[rows])
            assert all(torch.equal(a[0], b[row]) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("options", [{}, {"asymmetric": True}, {"rotation": 32}], ids=str)
def test_a_gated_layer(device, options):
    """silu(gate) * up and the product after it."""
    gate, up = torch.randn(20, 512, generator=generator(1)).to(device).chunk(2, -1)
    w = torch.randn(96, 256, generator=generator(2)).to(device)
    rotation = options.get("rotation", 0)
    q, s, *z = fastq.silu_mul_quant(gate, up, **options)
    qw, sw = fastq.quantize_per_channel(w, rotation=rotation)
    points = {"zero_point": z[0]} if z else {}
    y = fastq.int8_gemm(q, qw.t(), s, sw / max(rotation, 1), out_dtype=torch.float32, **points)
    exact = torch.nn.functional.silu(gate.double()) * up.double() @ w.double().t()
    assert (y - exact).abs().max() < 0.02 * exact.abs().max()


@activations
def test_poisoned_outputs_through_the_c_abi(activation):
    x, up = pair(5, 77, device="cpu", dtype=torch.bfloat16)
    wanted = call(activation, x, up, asymmetric=True)
    q, memory = torch.full((5, 157), -77, dtype=torch.int8), torch.full((15,), -77.0)
    s, z = memory, torch.full((15,), -77, dtype=torch.int32)
    views = q[:, :154:2], s[::3], z[::3]
    quantize = c_abi.with_size(
        c_abi.QuantizeArgs,
        **{
            name: c_abi.view(t)
            for name, t in zip(("x", "q", "scale", "zero_point"), (x, *views), strict=True)
        },
    )
    args = c_abi.with_size(
        c_abi.ActivationQuantArgs,
        quantize=ctypes.pointer(quantize),
        up=c_abi.view(up),
        activation=1 + ["relu", "gelu", "gelu_tanh", "silu"].index(activation),
    )
    assert c_abi.library.fastq_activation_quant(ctypes.byref(args)) == 0, c_abi.last_error()
    for view, right in zip(views, wanted, strict=True):
        assert torch.equal(view, right.view(view.shape))
    for t, view in zip((q, s, z), views, strict=True):
        view.fill_(-77)
        assert (t == -77).all()


def test_no_activation_through_the_c_abi():
    """x * up, or x itself, as quantize_per_token has it."""
    x, up = pair(5, 77, device="cpu")
    for other, values in ((None, x), (up, x * up)):
        q, s = torch.zeros(5, 77, dtype=torch.int8), torch.zeros(5)
        views = {"x": c_abi.view(x), "q": c_abi.view(q), "scale": c_abi.view(s)}
        quantize = c_abi.with_size(c_abi.QuantizeArgs, **views)
        args = c_abi.with_size(c_abi.ActivationQuantArgs, quantize=ctypes.pointer(quantize))
        if other is not None:
            args.up = c_abi.view(other)
        assert c_abi.library.fastq_activation_quant(ctypes.byref(args)) == 0, c_abi.last_error()
        wanted = fastq.quantize_per_token(values)
        assert torch.equal(q, wanted[0])
        assert torch.equal(s, wanted[1][:, 0])
