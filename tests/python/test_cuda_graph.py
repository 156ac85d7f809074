"""CUDA graphs: capture, replay with new values, and kernels first met inside a capture."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import fastq
import reference
from operands import FLOAT_DTYPES, OUT_DTYPES, random_gemm, random_int8

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")


def capture(function):
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


# Small, medium and large tiles; odd sizes that go through a workspace.
SHAPES = [
    (1, 256, 128),
    (16, 512, 256),
    (100, 256, 512),
    (500, 768, 256),
    (33, 65, 77),
    (4096, 4096, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_replay_of_int8_gemm(shape, out_dtype):
    problem = random_gemm(*shape, device=CUDA, out_dtype=out_dtype)
    fastq.int8_gemm(*problem, out_dtype=out_dtype)
    graph, got = capture(lambda: fastq.int8_gemm(*problem, out_dtype=out_dtype))
    for seed in (5, 6):
        problem.a.copy_(random_int8(*problem.a.shape, device=CUDA, seed=seed))
        got.zero_()
        graph.replay()
        reference.assert_same(got, reference.int8_gemm(*problem, out_dtype=out_dtype))


@pytest.mark.parametrize("rotation", [0, 32])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_replay_of_a_linear_layer(dtype, rotation):
    qw, sw = fastq.quantize_per_channel(torch.randn(96, 64, device=CUDA), rotation=rotation)
    x = torch.randn(10, 64, device=CUDA).to(dtype)

    def linear():
        q, s = fastq.quantize_per_token(x, rotation=rotation)
        return fastq.int8_gemm(q, qw.t(), s, sw, out_dtype=dtype), fastq.dequantize(q, s)

    linear()
    graph, got = capture(linear)
    for _ in range(3):
        x.copy_(torch.randn(10, 64, device=CUDA))
        graph.replay()
        for result, expected in zip(got, linear(), strict=True):
            assert torch.equal(result, expected)


QUANTIZING = {
    "quantize_per_token": lambda x, other: fastq.quantize_per_token(x, asymmetric=True),
    "rms_norm_quant": lambda x, other: fastq.rms_norm_quant(x, residual=other),
    "layer_norm_quant": lambda x, other: fastq.layer_norm_quant(x, rotation=32, asymmetric=True),
    "silu_mul_quant": lambda x, other: fastq.silu_mul_quant(x, other),
    "gelu_quant": lambda x, other: fastq.gelu_quant(x, scale=0.02, zero_point=3),
    "relu_quant": lambda x, other: fastq.relu_quant(x, up=other, smooth=other[0].abs() + 1),
}


@pytest.mark.parametrize("op", QUANTIZING.values(), ids=QUANTIZING)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_replay_of_fused_quantisation(dtype, op):
    for rows, cols in ((16, 4096), (3, 32768)):
        x, other = torch.randn(2, rows, cols, device=CUDA).to(dtype)
        op(x, other)
        graph, got = capture(lambda x=x, other=other: op(x, other))
        for _ in range(2):
            x.copy_(torch.randn(rows, cols, device=CUDA))
            graph.replay()
            for result, expected in zip(got, op(x, other), strict=True):
                assert torch.equal(result, expected)


FIRST_CALLS = """
    import torch, fastq
    device = torch.device("cuda")
    warm = torch.ones(4, 32, dtype=torch.int8, device=device)
    fastq.int8_gemm(warm, warm.t(), 1.0, 1.0)  # one call of another shape and another dtype
    fastq.dequantize(*fastq.quantize_per_token(torch.ones(2, 8, device=device)))
    problems = []
    shapes = (1, 256, 128), (100, 512, 256), (500, 768, 256), (33, 65, 77), (8192, 4096, 64)
    for M, N, K in shapes:
        a = torch.randint(-128, 128, (M, K), dtype=torch.int8, device=device)
        w = torch.randint(-128, 128, (N, K), dtype=torch.int8, device=device)
        problems.append((a, w.t(), torch.rand(M, device=device), torch.rand(N, device=device)))
    x = torch.randn(50, 1000, device=device, dtype=torch.bfloat16)
    scale, ones = torch.tensor(0.1, device=device), torch.ones(1000, device=device)
    w = torch.randint(-128, 128, (300, 1000), dtype=torch.int8, device=device)

    def work():
        out = [fastq.int8_gemm(*p, out_dtype=torch.half) for p in problems]
        out += [fastq.int8_gemm(*p, out_dtype=torch.float) for p in problems]
        out += [fastq.int8_gemm(p[0], p[1].contiguous(), *p[2:]) for p in problems]
        out += fastq.quantize_per_token(x, rotation=8)
        out += fastq.quantize_per_token(x[:, :992], rotation=32)
        for options in ({}, {"asymmetric": True, "rotation": 8}, {"scale": scale}):
            out += fastq.rms_norm_quant(x, residual=x, **options)
            out += fastq.layer_norm_quant(x, x[0], **options)
            out += fastq.silu_mul_quant(x, x, **options)
            out += fastq.quantize_per_token(x, smooth=ones, **options)
        for rows in (1, 16, 50):
            for dtype in (torch.bfloat16, torch.half, torch.float):
                for threshold in (0, 2, 6):  # all columns hold an outlier of 2, in 50 rows
                    few = x[:rows].to(dtype)
                    out.append(fastq.llm_int8_matmul(few, w, scale, threshold=threshold))
        q, s = fastq.quantize_per_token(x)
        return [*out, q, s, fastq.dequantize(q, s, out_dtype=torch.half)]

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, work(), strict=True):
        assert torch.equal(got, expected)
    print("same")
"""


def test_kernels_first_met_inside_a_capture():
    """In a new process: loading a kernel while a graph is captured would break the capture."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FIRST_CALLS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "same"
