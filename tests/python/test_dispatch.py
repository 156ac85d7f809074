"""Which kernel runs, and that every one that can run gives the same bits."""

from __future__ import annotations

import pytest
import torch

import fastq
import reference
from operands import (
    LAYOUTS,
    OUT_DTYPES,
    in_layout,
    random_floats,
    random_gemm,
    random_scales,
    random_zero_points,
)

CPU = torch.device("cpu")
ISAS = fastq.describe()["cpu"]["available"]
SHAPES = [
    *((1, 1, 1), (1, 130, 257), (2, 16, 64), (3, 33, 31), (16, 100, 300), (17, 17, 65)),
    *((32, 64, 128), (65, 130, 190), (130, 40, 1000), (1, 1000, 64), (300, 200, 100)),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_gemm_on_every_instruction_set(isa, shape, monkeypatch):
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    for out_dtype in OUT_DTYPES:
        a, b, sa, sb = random_gemm(*shape, device=CPU, out_dtype=out_dtype)
        bias = None if out_dtype == torch.int32 else random_scales(shape[1], device=CPU)
        expected = reference.int8_gemm(a, b, sa, sb, bias, out_dtype)
        for x, y in (
            (a, b),
            (a, b.contiguous()),
            (in_layout(a, "stepped"), in_layout(b, "stepped")),
        ):
            got = fastq.int8_gemm(x, y, sa, sb, bias=bias, out_dtype=out_dtype)
            reference.assert_same(got, expected)
    assert fastq.describe_int8_gemm(a, b).startswith(f"cpu/{isa}/")


@pytest.mark.parametrize("shape", [(1, 130, 257), (17, 17, 65), (130, 140, 190)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_options_have_the_same_bits_on_every_instruction_set(out_dtype, shape, monkeypatch):
    M, N, K = shape
    a, b, sa, sb = random_gemm(M, N, K, device=CPU)
    options = {
        "bias": random_floats(N, device=CPU),
        "residual": random_floats(M, N, device=CPU, dtype=torch.float16),
        "zero_point": random_zero_points(M, device=CPU),
        "out_scale": 0.04 if out_dtype == torch.int8 else None,
    }
    sb = sb * (1e-3 / K**0.5)
    packed, sums = fastq.pack_weight(b), b.sum(0, dtype=torch.int32)
    for activation in (None, "relu", "gelu", "gelu_tanh", "silu"):
        results = []
        for isa in ISAS:
            monkeypatch.setenv("FASTQ_CPU_ISA", isa)
            for weight in (b, b.contiguous(), packed):
                extra = {**options, "activation": activation, "column_sums": sums}
                got = fastq.int8_gemm(a, weight, sa, sb, out_dtype=out_dtype, **extra)
                results.append(got)
        assert all(torch.equal(got, results[0]) for got in results)
        arguments = {**options, "activation": activation, "out_dtype": out_dtype}
        if activation in (None, "relu"):
            reference.assert_same(results[0], reference.int8_gemm(a, b, sa, sb, **arguments))
        else:
            bounds = reference.int8_gemm_bounds(a, b, sa, sb, **arguments)
            reference.assert_between(results[0], bounds)


@pytest.mark.parametrize("isa", ISAS)
def test_activations_of_every_magnitude_on_every_instruction_set(isa, monkeypatch):
    """Inf, NaN and subnormals too: the vector code of each set is its own."""
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    positive = 2.0 ** torch.linspace(-149, 127.99, 5003, dtype=torch.float64)
    values = torch.cat([positive.float(), torch.tensor([0.0, torch.inf, torch.nan])])
    values = torch.cat([values, -values])
    one = torch.ones(1, 1, dtype=torch.int8)
    product = (one, one.expand(1, values.numel()), 1.0, values)
    for activation in ("gelu", "gelu_tanh", "silu"):
        got = fastq.int8_gemm(*product, activation=activation, out_dtype=torch.float32)
        bounds = reference.int8_gemm_bounds(
            *product, activation=activation, out_dtype=torch.float32
        )
        reference.assert_between(got, bounds)


@pytest.mark.parametrize("isa", ISAS)
def test_longest_sums_on_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    for M, N in ((1, 3), (5, 18), (40, 20)):
        a = torch.full((M, 131071), -128, dtype=torch.int8)
        b = torch.full((N, 131071), -128, dtype=torch.int8)
        for operand in (b.t(), fastq.pack_weight(b.t())):
            got = fastq.int8_gemm(a, operand, None, None, out_dtype=torch.int32)
            assert (got == 128 * 128 * 131071).all()


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_and_dequantize_on_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for length in (1, 7, 16, 33, 64, 100, 1025):
            x = (100 * torch.randn(9, length)).to(dtype)
            x[1], x[2, length // 2], x[3, -1] = 0, torch.nan, torch.inf
            x[4] = 127 * (torch.arange(length) % 2) - 0.5  # ties
            x[4, 0] = 127
            for layout in ("contiguous", "padded", "transposed", "stepped"):
                q, s = fastq.quantize_per_token(in_layout(x, layout))
                expected_q, expected_s = reference.quantize(x)
                reference.assert_same(q, expected_q)
                reference.assert_same(s[:, 0], expected_s)
            got = fastq.dequantize(q, s, out_dtype=dtype)
            reference.assert_same(got, reference.dequantize(q, s, dtype))


def test_an_unknown_instruction_set(monkeypatch):
    a = torch.ones(2, 16, dtype=torch.int8)
    monkeypatch.setenv("FASTQ_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="FASTQ_CPU_ISA"):
        fastq.int8_gemm(a, a.t(), 1.0, 1.0)
    with pytest.raises(ValueError, match="FASTQ_CPU_ISA"):
        fastq.quantize_per_token(a.float())


def test_an_instruction_set_that_is_not_there(monkeypatch):
    missing = {"scalar", "avx2", "avx512vnni", "amx", "neon"} - set(ISAS)
    if not missing:
        pytest.skip("this machine has every instruction set")
    a = torch.ones(2, 16, dtype=torch.int8)
    for isa in missing:
        monkeypatch.setenv("FASTQ_CPU_ISA", isa)
        with pytest.raises(NotImplementedError, match=f"FASTQ_CPU_ISA={isa}"):
            fastq.int8_gemm(a, a.t(), 1.0, 1.0)


# --- CUDA --------------------------------------------------------------------------------------

CUDA_SHAPES = [
    *((1, 1, 1), (1, 256, 512), (3, 5, 7), (16, 129, 33), (64, 64, 128), (65, 64, 144)),
    *((128, 256, 256), (129, 130, 272), (256, 512, 1000), (333, 777, 555), (1024, 1024, 64)),
    (4100, 8200, 96),  # enough tiles for the largest one
]


def is_hopper():
    return torch.cuda.get_device_capability()[0] == 9 and "90a" in fastq.describe()["cuda"]["archs"]


@pytest.mark.cuda
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_both_kernel_families_and_the_cpu_give_the_same_bits(shape, monkeypatch):
    monkeypatch.delenv("FASTQ_KERNELS", raising=False)
    for out_dtype in OUT_DTYPES:
        problem = random_gemm(*shape, device=CPU, out_dtype=out_dtype)
        bias = None if out_dtype == torch.int32 else random_scales(shape[1], device=CPU)
        expected = fastq.int8_gemm(*problem, bias=bias, out_dtype=out_dtype)
        problem = [None if t is None else t.cuda() for t in problem]
        bias = None if bias is None else bias.cuda()
        for family in (None, "sm80"):
            with monkeypatch.context() as patch:
                if family is not None:
                    patch.setenv("FASTQ_KERNELS", family)
                got = fastq.int8_gemm(*problem, bias=bias, out_dtype=out_dtype)
            assert torch.equal(got.cpu(), expected), family


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["default", "sm80"])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", CUDA_SHAPES[:-1], ids=str)
def test_every_kernel_family_equals_the_reference(shape, out_dtype, family, monkeypatch):
    if family == "default":
        monkeypatch.delenv("FASTQ_KERNELS", raising=False)
    else:
        monkeypatch.setenv("FASTQ_KERNELS", family)
    device = torch.device("cuda")
    a, b, sa, sb = random_gemm(*shape, device=device, out_dtype=out_dtype)
    biases = [None]
    if out_dtype != torch.int32:
        bias = random_scales(shape[1], device=device)
        biases += [bias, bias.to(out_dtype)]
    for bias in biases:
        got = fastq.int8_gemm(a, b, sa, sb, bias=bias, out_dtype=out_dtype)
        reference.assert_same(got, reference.int8_gemm(a, b, sa, sb, bias, out_dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["default", "sm80"])
def test_every_kernel_family_takes_any_layout(family, monkeypatch):
    if family == "default":
        monkeypatch.delenv("FASTQ_KERNELS", raising=False)
    else:
        monkeypatch.setenv("FASTQ_KERNELS", family)
    a, b, sa, sb = random_gemm(100, 120, 96, device=torch.device("cuda"))
    expected = reference.int8_gemm(a, b, sa, sb)
    for layout in LAYOUTS:
        out = in_layout(torch.zeros(100, 120, dtype=torch.bfloat16, device="cuda"), layout)
        reference.assert_same(fastq.int8_gemm(in_layout(a, layout), b, sa, sb), expected)
        reference.assert_same(fastq.int8_gemm(a, in_layout(b, layout), sa, sb), expected)
        reference.assert_same(fastq.int8_gemm(a, b, sa, sb, out=out), expected)


@pytest.mark.cuda
def test_kernel_families_are_chosen_by_name(monkeypatch):
    a, b, _, _ = random_gemm(256, 256, 256, device=torch.device("cuda"))
    monkeypatch.delenv("FASTQ_KERNELS", raising=False)
    default = "cuda/sm90/" if is_hopper() else "cuda/sm80/"
    assert fastq.describe_int8_gemm(a, b).startswith(default)
    monkeypatch.setenv("FASTQ_KERNELS", "sm80")
    assert fastq.describe_int8_gemm(a, b).startswith("cuda/sm80/")
    monkeypatch.setenv("FASTQ_KERNELS", "sm70")
    with pytest.raises(ValueError, match="FASTQ_KERNELS is sm70, expected sm80, sm90 or"):
        fastq.int8_gemm(a, b, 1.0, 1.0)


@pytest.mark.cuda
def test_a_layout_the_tensor_cores_refuse_is_said_to_be_copied(monkeypatch):
    monkeypatch.delenv("FASTQ_KERNELS", raising=False)
    a, b, *_ = random_gemm(64, 64, 100, device=torch.device("cuda"))
    assert "+relayout_a+relayout_b" in fastq.describe_int8_gemm(a, b)
    a, b, *_ = random_gemm(64, 64, 128, device=torch.device("cuda"))
    assert "relayout" not in fastq.describe_int8_gemm(a, b)
    assert "+relayout_b" in fastq.describe_int8_gemm(a, b.contiguous())


@pytest.mark.cuda
def test_quantize_and_dequantize_give_the_same_bits_as_on_the_cpu():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((1, 70001), (300, 1000), (64, 4096), (5, 7)):
            x = torch.randn(shape).to(dtype)
            for op in (fastq.quantize_per_token, fastq.quantize_per_channel):
                q, s = op(x)
                cuda_q, cuda_s = op(x.cuda())
                assert torch.equal(q, cuda_q.cpu())
                assert torch.equal(s, cuda_s.cpu())
            back = fastq.dequantize(q, s, out_dtype=dtype)
            assert torch.equal(back, fastq.dequantize(cuda_q, cuda_s, out_dtype=dtype).cpu())


def test_log_of_the_dispatch(device, monkeypatch, capfd):
    a, b, sa, sb = random_gemm(3, 8, 16, device=device)
    fastq.int8_gemm(a, b, sa, sb)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("FASTQ_LOG", "dispatch")
    fastq.int8_gemm(a, b, sa, sb, out_dtype=torch.float32)
    logged = capfd.readouterr().err
    assert "int8_gemm M=3 N=8 K=16 float32" in logged
    assert fastq.describe_int8_gemm(a, b, out_dtype=torch.float32) in logged
    fastq.int8_gemm(a, b, sa, sb, zero_point=3, activation="silu", out_scale=0.1)
    assert "K=16 int8+zero_point+silu -> " in capfd.readouterr().err
