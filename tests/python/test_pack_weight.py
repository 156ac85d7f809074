"""The packed form of a CPU weight: the same product as the plain one, on every instruction set."""

from __future__ import annotations

import pytest
import torch

import fastq
import reference
from operands import LAYOUTS, OUT_DTYPES, in_layout, random_gemm, random_scales

CPU = torch.device("cpu")
ISAS = fastq.describe()["cpu"]["available"]


def check(problem, out_dtype=torch.bfloat16, **kwargs):
    a, b, sa, sb = problem
    packed = fastq.pack_weight(b)
    got = fastq.int8_gemm(a, packed, sa, sb, out_dtype=out_dtype, **kwargs)
    reference.assert_same(got, reference.int8_gemm(a, b, sa, sb, kwargs.get("bias"), out_dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_equals_reference(isa, out_dtype, monkeypatch):
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    sizes = (1, 3, 16, 17, 33, 64, 65, 130)
    for M, N, K in zip(sizes, sizes[3:] + sizes[:3], sizes[5:] + sizes[:5], strict=True):
        check(random_gemm(M, N, K, device=CPU, out_dtype=out_dtype), out_dtype)
    check(random_gemm(150, 300, 500, device=CPU, out_dtype=out_dtype), out_dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_more_rows_than_one_pass_takes(isa, plain, monkeypatch):
    """K so large that rows are worked through in several chunks, and in several slabs."""
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    a, b, sa, sb = random_gemm(301, 70, 66003, device=CPU)
    expected = reference.int8_gemm(a, b, sa, sb)
    for rows in (a, a.t().contiguous().t()):
        weight = b.contiguous() if plain else fastq.pack_weight(b)
        reference.assert_same(fastq.int8_gemm(rows, weight, sa, sb), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packs_any_layout(layout):
    a, b, sa, sb = random_gemm(5, 70, 130, device=CPU)
    packed = fastq.pack_weight(in_layout(b, layout))
    assert torch.equal(packed.data, fastq.pack_weight(b).data)
    got = fastq.int8_gemm(a, packed, sa, sb)
    reference.assert_same(got, reference.int8_gemm(a, b, sa, sb))


def test_the_form_does_not_depend_on_the_instruction_set(monkeypatch):
    _, b, _, _ = random_gemm(1, 70, 131, device=CPU)
    forms = []
    for isa in ISAS:
        monkeypatch.setenv("FASTQ_CPU_ISA", isa)
        forms.append(fastq.pack_weight(b).data)
    assert all(torch.equal(form, forms[0]) for form in forms)


def test_describes_itself():
    packed = fastq.pack_weight(torch.zeros(40, 24, dtype=torch.int8))
    assert packed.shape == (40, 24)
    assert (packed.k, packed.n) == (40, 24)
    assert packed.data.dtype == torch.uint8
    assert packed.data.dim() == 1
    assert "packed" in fastq.describe_int8_gemm(torch.zeros(2, 40, dtype=torch.int8), packed)


def test_batches_bias_and_out():
    a, b, _, sb = random_gemm(24, 30, 64, device=CPU)
    sa = random_scales(2, 3, 4, 1, device=CPU)
    bias = random_scales(30, device=CPU)
    check((a.view(2, 3, 4, 64), b, sa, sb), torch.float32, bias=bias)
    check((in_layout(a, "stepped"), b, sa.view(-1), sb), torch.float32, bias=bias)
    out = torch.full((24, 37), float("nan"))
    check((a, b, sa.view(-1), sb), torch.float32, out=out[:, 3:33])
    assert out[:, :3].isnan().all()
    assert out[:, 33:].isnan().all()


@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 5, 0), (0, 5, 7), (0, 0, 0)], ids=str)
def test_empty(shape):
    check(random_gemm(*shape, device=CPU))


def test_a_weight_taller_than_k_allows_packs_but_does_not_multiply():
    packed = fastq.pack_weight(torch.ones(131072, 1, dtype=torch.int8))
    with pytest.raises(ValueError, match="K = 131072"):
        fastq.int8_gemm(torch.ones(1, 131072, dtype=torch.int8), packed, 1.0, 1.0)


@pytest.mark.cuda
def test_cuda_takes_the_plain_form_only():
    b = torch.zeros(40, 24, dtype=torch.int8)
    with pytest.raises(NotImplementedError, match="pack_weight: b is on cuda:0"):
        fastq.pack_weight(b.cuda())
    packed = fastq.pack_weight(b)
    moved = packed._replace(data=packed.data.cuda())
    with pytest.raises(ValueError, match=r"b is not a packed weight of .* for cuda:0"):
        fastq.int8_gemm(torch.zeros(2, 40, dtype=torch.int8).cuda(), moved, 1.0, 1.0)
