"""Properties that hold for any shape, layout, dtype and scale that hypothesis draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastq
import reference
from llm_int8_formula import Problem, count_columns, llm_int8_matmul, random_kept, random_problem
from operands import (
    FLOAT_DTYPES,
    LAYOUTS,
    OUT_DTYPES,
    in_layout,
    random_floats,
    random_int8,
    random_scales,
    random_zero_points,
)

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

settings = hypothesis.settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
sizes = strategies.one_of(
    strategies.integers(0, 20),
    strategies.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1000]),
)
layouts = strategies.sampled_from(LAYOUTS)
seeds = strategies.integers(0, 1000)


@settings
@hypothesis.given(
    M=sizes,
    N=sizes,
    K=sizes,
    out_dtype=strategies.sampled_from(OUT_DTYPES),
    layout=strategies.tuples(layouts, layouts, layouts),
    scalar=strategies.tuples(strategies.booleans(), strategies.booleans()),
    bias_dtype=strategies.sampled_from([None, "float32", "out"]),
    packed=strategies.booleans(),
    seed=seeds,
)
def test_int8_gemm(device, M, N, K, out_dtype, layout, scalar, bias_dtype, packed, seed):
    a = in_layout(random_int8(M, K, device=device, seed=seed), layout[0])
    b = in_layout(random_int8(K, N, device=device, seed=seed + 1), layout[1])
    out = in_layout(torch.zeros(M, N, dtype=out_dtype, device=device), layout[2])
    sa = sb = bias = None
    if out_dtype != torch.int32:
        sa = random_scales(*(() if scalar[0] else (M, 1)), device=device, seed=seed)
        sb = random_scales(*(() if scalar[1] else (N,)), device=device, seed=seed + 2)
        if bias_dtype is not None:
            bias = random_scales(N, device=device, seed=seed + 3)
            bias = bias.to(out_dtype) if bias_dtype == "out" else bias
    weight = fastq.pack_weight(b) if packed and device.type == "cpu" else b
    got = fastq.int8_gemm(a, weight, sa, sb, bias=bias, out=out)
    reference.assert_same(got, reference.int8_gemm(a, b, sa, sb, bias, out_dtype))


@settings
@hypothesis.given(
    M=sizes,
    N=sizes,
    K=sizes,
    out_dtype=strategies.sampled_from((*FLOAT_DTYPES, torch.int8)),
    layout=strategies.tuples(layouts, layouts),
    activation=strategies.sampled_from([None, "relu", "gelu", "gelu_tanh", "silu"]),
    zero_point=strategies.sampled_from([None, "scalar", "rows"]),
    residual=strategies.sampled_from([None, "out", *FLOAT_DTYPES]),
    has_bias=strategies.booleans(),
    packed=strategies.booleans(),
    seed=seeds,
)
def test_options_of_int8_gemm(
    device, M, N, K, out_dtype, layout, activation, zero_point, residual, has_bias, packed, seed
):
    a, b = random_int8(M, K, device=device, seed=seed), random_int8(K, N, device=device, seed=seed)
    sa = random_scales(M, 1, device=device, seed=seed)
    sb = random_scales(N, device=device, seed=seed + 1) * (1e-3 / max(K, 1) ** 0.5)
    out = in_layout(torch.zeros(M, N, dtype=out_dtype, device=device), layout[0])
    options = {"activation": activation, "out_scale": 0.05 if out_dtype == torch.int8 else None}
    if has_bias:
        options["bias"] = random_floats(N, device=device, seed=seed)
    if zero_point is not None:
        shape = () if zero_point == "scalar" else (M,)
        options["zero_point"] = random_zero_points(*shape, device=device, seed=seed)
    if residual == "out" and out_dtype != torch.int8:
        out.copy_(random_floats(M, N, device=device, seed=seed))
        options["residual"] = out
    elif residual not in (None, "out"):
        values = random_floats(M, N, device=device, dtype=residual, seed=seed)
        options["residual"] = in_layout(values, layout[1])
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in options.items()}
    weight, sums = b, None
    if packed and device.type == "cpu":
        weight, sums = fastq.pack_weight(b), b.sum(0, dtype=torch.int32)
    got = fastq.int8_gemm(a, weight, sa, sb, out=out, column_sums=sums, **options)
    if activation in (None, "relu"):
        expected = reference.int8_gemm(a, b, sa, sb, out_dtype=out_dtype, **before)
        reference.assert_same(got, expected)
    else:
        bounds = reference.int8_gemm_bounds(a, b, sa, sb, out_dtype=out_dtype, **before)
        reference.assert_between(got, bounds)


@settings
@hypothesis.given(
    M=sizes,
    N=sizes,
    K=sizes,
    dtype=strategies.sampled_from(FLOAT_DTYPES),
    out_dtype=strategies.sampled_from(FLOAT_DTYPES),
    layout=strategies.tuples(layouts, layouts, layouts, layouts),
    threshold=strategies.sampled_from([0.0, 2.0, 6.0]),
    outliers=strategies.sampled_from([0, 1, 9, 64, 200]),
    kept=strategies.sampled_from([None, 0, 5, 80]),
    has_bias=strategies.booleans(),
    seed=seeds,
)
def test_llm_int8_matmul(
    device, M, N, K, dtype, out_dtype, layout, threshold, outliers, kept, has_bias, seed
):
    problem = random_problem(M, N, K, device=device, dtype=dtype, columns=outliers, seed=seed)
    options = {"threshold": threshold}
    if kept is not None:
        columns = torch.randperm(K, generator=torch.Generator().manual_seed(seed))[:kept]
        options |= random_kept(problem, columns, dtype=dtype)
        options["outlier_weight"] = in_layout(options["outlier_weight"], layout[0])
    if has_bias:
        options["bias"] = random_floats(N, device=device, dtype=out_dtype, seed=seed)
    problem = Problem(in_layout(problem.x, layout[1]), in_layout(problem.w, layout[2]), problem.sw)
    out = in_layout(torch.zeros(M, N, dtype=out_dtype, device=device), layout[3])
    count = torch.full((), -1, dtype=torch.int32, device=device)
    fastq.llm_int8_matmul(*problem, out=out, outlier_count=count, **options)
    reference.assert_same(out, llm_int8_matmul(*problem, out_dtype=out_dtype, **options))
    assert count.item() == count_columns(problem.x, threshold)


@settings
@hypothesis.given(
    rows=sizes,
    columns=sizes,
    dtype=strategies.sampled_from(FLOAT_DTYPES),
    layout=layouts,
    magnitude=strategies.integers(-40, 38),
    special=strategies.sampled_from([None, 0.0, float("nan"), float("inf")]),
    seed=seeds,
)
def test_quantize_and_dequantize(device, rows, columns, dtype, layout, magnitude, special, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 10.0**magnitude
    if special is not None and x.numel() > 0:
        x[seed % rows, seed % columns] = special
    x = in_layout(x.to(dtype).to(device), layout)
    expected_q, expected_s = reference.quantize(x)
    q, s = fastq.quantize_per_token(x)
    reference.assert_same(q, expected_q)
    reference.assert_same(s[:, 0], expected_s)
    q, s = fastq.quantize_per_channel(x)
    reference.assert_same(q, expected_q)
    reference.assert_same(s, expected_s)
    back = fastq.dequantize(q, s, out_dtype=dtype)
    reference.assert_same(back, reference.dequantize(q, s, dtype))


rotations = strategies.sampled_from([2, 4, 8, 16, 32])


@settings
@hypothesis.given(
    rows=sizes,
    groups=sizes,
    rotation=rotations,
    dtype=strategies.sampled_from(FLOAT_DTYPES),
    layout=layouts,
    magnitude=strategies.integers(-40, 38),
    special=strategies.sampled_from([None, 0.0, float("nan"), float("inf")]),
    seed=seeds,
)
def test_rotated_quantize(device, rows, groups, rotation, dtype, layout, magnitude, special, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups * rotation, generator=generator) * 10.0**magnitude
    if special is not None and x.numel() > 0:
        x[seed % rows, seed % x.shape[1]] = special
    x = in_layout(x.to(dtype).to(device), layout)
    expected_q, expected_s = reference.quantize(x, rotation)
    q, s = fastq.quantize_per_token(x, rotation=rotation)
    reference.assert_same(q, expected_q)
    reference.assert_same(s[:, 0], expected_s)
    q, s = fastq.quantize_per_channel(x, rotation=rotation)
    reference.assert_same(q, expected_q)
    reference.assert_same(s, expected_s)


@settings
@hypothesis.given(
    rows=sizes,
    groups=sizes,
    rotation=strategies.sampled_from([0, 2, 8, 32]),
    dtype=strategies.sampled_from(FLOAT_DTYPES),
    layout=layouts,
    smooth_layout=strategies.sampled_from([None, *LAYOUTS]),
    kind=strategies.sampled_from(["symmetric", "asymmetric", "static", "static asymmetric"]),
    relu_mul=strategies.booleans(),
    magnitude=strategies.integers(-40, 38),
    special=strategies.sampled_from([None, 0.0, float("nan"), float("-inf")]),
    seed=seeds,
)
def test_options_of_quantize_per_token(
    device,
    rows,
    groups,
    rotation,
    dtype,
    layout,
    smooth_layout,
    kind,
    relu_mul,
    magnitude,
    special,
    seed,
):
    """Of x, and of relu(x) * up, which is exact too."""
    generator = torch.Generator().manual_seed(seed)
    columns = groups * max(rotation, 1)
    x = torch.randn(rows, columns, generator=generator) * 10.0**magnitude
    if special is not None and x.numel() > 0:
        x[seed % rows, seed % columns] = special
    x = in_layout(x.to(dtype).to(device), layout)
    options = {"rotation": rotation, "asymmetric": kind == "asymmetric"}
    if smooth_layout is not None:
        smooth = random_scales(1, columns, device=device, seed=seed)
        options["smooth"] = in_layout(smooth, smooth_layout)
    if kind.startswith("static"):
        options["scale"] = max(10.0**magnitude / 60, 1e-40)
    if kind == "static asymmetric":
        options["zero_point"] = seed % 256 - 128
    values = reference.to_numpy(x)
    if relu_mul:
        up = random_floats(rows, columns, device=device, dtype=dtype, seed=seed)
        with np.errstate(all="ignore"):
            values = np.where(values < 0, np.float32(0), values) * reference.to_numpy(up)
        q, s, *z = fastq.relu_quant(x, up=in_layout(up, layout), **options)
    else:
        q, s, *z = fastq.quantize_per_token(x, **options)
    expected_q, expected_s, expected_z = reference.quantize_with(values, **options)
    shape = () if kind.startswith("static") else (rows,)
    reference.assert_same(q, expected_q)
    reference.assert_same(s.view(shape), expected_s)
    assert len(z) == (expected_z is not None)
    for point in z:
        reference.assert_same(point.view(shape), expected_z)


@settings
@hypothesis.given(
    M=strategies.integers(1, 20),
    N=strategies.integers(1, 40),
    groups=strategies.integers(1, 20),
    rotation=rotations,
    dtype=strategies.sampled_from(FLOAT_DTYPES),
    outlier=strategies.sampled_from([1.0, 100.0]),
    seed=seeds,
)
def test_a_rotated_product_is_the_product(device, M, N, groups, rotation, dtype, outlier, seed):
    """Up to the rounding of both operands: at most half a step of scale each."""
    generator = torch.Generator().manual_seed(seed)
    K = groups * rotation
    x = torch.randn(M, K, generator=generator)
    x[:, seed % K] *= outlier
    x, w = x.to(dtype).to(device), torch.randn(N, K, generator=generator).to(dtype).to(device)
    qx, sx = fastq.quantize_per_token(x, rotation=rotation)
    qw, sw = fastq.quantize_per_channel(w, rotation=rotation)
    y = fastq.int8_gemm(qx, qw.t(), sx, sw / rotation, out_dtype=torch.float32)
    sx, sw = sx.double(), sw.double()[:, None]
    steps_x, steps_w = sx * qx.double().abs(), sw * qw.double().abs()
    half_x, half_w = sx / 2, sw / 2
    bound = steps_x @ half_w.expand(N, K).t() + half_x.expand(M, K) @ steps_w.t()
    bound = (bound + K * half_x @ half_w.t()) / rotation
    error = (y.double() - x.double() @ w.double().t()).abs()
    assert (error <= bound * (1 + 1e-4)).all()
