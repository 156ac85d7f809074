"""The fused quantising ops as torch ops: opcheck, torch.compile, fake and meta tensors, modes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastq
from operands import FLOAT_DTYPES
from quantizations import random_rows, random_smooth, random_vector
from test_torch_ops import OPS, Recorder, skip_without_inductor


def samples(device, dtype):
    """(op, arguments): every kind of result."""
    x, other = (random_rows(3, 4, 32, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    weight, bias = (random_vector(32, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    smooth = random_smooth(32, device=device)
    scale = torch.tensor(0.1, device=device)
    point = torch.tensor([7], dtype=torch.int32, device=device)
    quantizations = (
        (None, 0, None, None, False),
        (smooth, 16, None, None, True),
        (None, 8, scale, None, False),
        (smooth, 0, scale, point, True),
    )
    for quantization in quantizations:
        yield OPS.quantize_per_token.options, (x, *quantization)
        yield OPS.norm_quant.default, (x, weight, None, None, "rms", 1e-6, *quantization)
        yield OPS.norm_quant.default, (x, weight, bias, other, "layer", 1e-5, *quantization)
        yield OPS.activation_quant.default, (x, other, "silu", *quantization)
        yield OPS.activation_quant.default, (x.transpose(0, 1), None, "gelu", *quantization)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(device, dtype):
    for op, arguments in samples(device, dtype):
        torch.library.opcheck(op, arguments)


def block(x, residual, weight, smooth, scale):
    """Every fused op, in the order of a transformer's block."""
    q, s, h = fastq.rms_norm_quant(x, weight, residual=residual, rotation=32)
    _, s1, z1, h1 = fastq.layer_norm_quant(x, weight, weight, residual=h, asymmetric=True)
    gate, up = fastq.dequantize(q, s, out_dtype=x.dtype).chunk(2, -1)
    q2, s2 = fastq.silu_mul_quant(gate, up, smooth=smooth)
    q3, s3, z3 = fastq.gelu_quant(gate, approximate="tanh", scale=scale, zero_point=3)
    q4, s4 = fastq.relu_quant(gate, up=up, scale=0.25)
    q5, s5, z5 = fastq.quantize_per_token(h1, asymmetric=True)
    return q, s, h, s1, z1, h1, q2, s2, q3, s3 * 2, z3 + 1, q4 + q3, s4, q5, s5, z5


def block_inputs(device, rows):
    x, residual = (random_rows(rows, 64, device=device, seed=seed).bfloat16() for seed in (1, 2))
    weight = random_vector(64, device=device, seed=3).bfloat16()
    return x, residual, weight, random_smooth(32, device=device), torch.tensor([0.1], device=device)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (4, 5, 17):
        inputs = block_inputs(device, rows)
        got, expected = compiled(*inputs), block(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    torch._dynamo.reset()


def test_compile_with_numbers_as_static_scale(device):
    """Another number may compile again, but gives its own result."""

    def quantize(x, scale, zero_point):
        return fastq.quantize_per_token(x, scale=scale, zero_point=zero_point)

    torch._dynamo.reset()
    compiled = torch.compile(quantize, backend="aot_eager", fullgraph=True)
    x, *_ = block_inputs(device, 5)
    for scale, zero_point in ((0.1, 3), (0.2, 3), (0.3, -5), (0.4, -6)):
        got, expected = compiled(x, scale, zero_point), quantize(x, scale, zero_point)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    torch._dynamo.reset()


def test_compile_with_inductor(device):
    """The default backend; on a GPU with CUDA graphs."""
    skip_without_inductor(device)
    torch._dynamo.reset()
    inputs = block_inputs(device, 7)
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    expected = block(*inputs)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), expected, strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("fake", ["fake", "meta"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_shapes_without_data(fake, dtype):
    device = torch.device("meta" if fake == "meta" else "cpu")

    def described(results):
        return [(tuple(t.shape), t.dtype, t.device) for t in results]

    def check():
        x = torch.empty(2, 5, 16, dtype=dtype, device=device)
        q = ((2, 5, 16), torch.int8, device)
        s, z = (((2, 5, 1), kind, device) for kind in (torch.float32, torch.int32))
        h = ((2, 5, 16), dtype, device)
        one, point = (((), kind, device) for kind in (torch.float32, torch.int32))
        smooth = torch.empty(16, device=device)
        assert described(fastq.quantize_per_token(x, smooth=smooth)) == [q, s]
        assert described(fastq.quantize_per_token(x, scale=0.5, zero_point=1)) == [q, one, point]
        assert described(fastq.rms_norm_quant(x)) == [q, s]
        assert described(fastq.rms_norm_quant(x, residual=x, asymmetric=True)) == [q, s, z, h]
        assert described(fastq.layer_norm_quant(x, residual=x, scale=0.5)) == [q, one, h]
        assert described(fastq.silu_mul_quant(x, x, rotation=16)) == [q, s]
        assert described(fastq.gelu_quant(x, scale=0.5)) == [q, one]
        assert described(fastq.relu_quant(x.transpose(0, 1), asymmetric=True)) == [
            (((shape[1], shape[0], shape[2])), kind, where) for shape, kind, where in (q, s, z)
        ]

    if fake == "fake":
        with FakeTensorMode():
            check()
    else:
        check()


def test_modes_see_the_ops(device):
    """A plain call goes past the dispatcher; one that somebody watches does not."""
    inputs = block_inputs(device, 3)
    expected = block(*inputs)
    with Recorder() as mode:
        got = block(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert [name for name in mode.seen if "fastq" in name and "dequantize" not in name] == [
        *["fastq.norm_quant.default"] * 2,
        *["fastq.activation_quant.default"] * 3,
        "fastq.quantize_per_token.options",
    ]


def test_inference_mode_and_parameters(device):
    x, residual, weight, *_ = block_inputs(device, 6)
    expected = fastq.rms_norm_quant(x, weight, residual=residual)
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    got = fastq.rms_norm_quant(x, parameter, residual=residual)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with torch.inference_mode():
        got = fastq.rms_norm_quant(x, torch.nn.Parameter(weight), residual=residual)
        assert all(t.is_inference() for t in got)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not any(t.requires_grad for t in expected)
