"""Every bad input gets its own error, which names op, argument, what was expected and what came;
and nothing is written."""

from __future__ import annotations

import os
import re

import pytest
import torch

import fastq
from operands import random_gemm, random_int8

SENTINEL = -77
DTYPES = "bfloat16 or float16 or float32 or int32 or int8"


def gemm_arguments(device):
    """A good call with every argument: a (2, 4, 16), b (16, 8)."""
    a, b, sa, sb = random_gemm(8, 8, 16, device=device)
    return {
        "a": a.view(2, 4, 16),
        "b": b,
        "sa": sa.view(2, 4, 1),
        "sb": sb,
        "bias": torch.ones(8, device=device),
        "residual": torch.ones(2, 4, 8, device=device),
        "activation": "silu",
        "zero_point": torch.ones(2, 4, 1, dtype=torch.int32, device=device),
        "column_sums": b.sum(0, dtype=torch.int32),
        "out": torch.full((2, 4, 8), float(SENTINEL), device=device),
    }


def same_memory(x, shape, dtype):
    """A tensor of `dtype` in the memory of `x`."""
    count = 1
    for size in shape:
        count *= size
    return x.view(-1).view(dtype)[:count].view(shape)


def int8_out(g, **changes):
    """The change of `g` to an int8 output, in the same memory."""
    return {"out": same_memory(g["out"], (2, 4, 8), torch.int8), "out_scale": 0.5, **changes}


def test_the_good_call_is_good(device):
    kwargs = gemm_arguments(device)
    fastq.int8_gemm(**kwargs)
    assert (kwargs["out"] != SENTINEL).all()


def cases(type_errors, value_errors):
    """Rows (change, error, message) of tables that map a message to the change that brings it."""
    return [
        pytest.param(change, error, message, id=message.replace("{}", "x"))
        for error, table in ((TypeError, type_errors), (ValueError, value_errors))
        for message, change in table.items()
    ]


def raw_sums(g, **changes):
    """The change of `g` to an int32 output, in the same memory, and to no more options."""
    absent = dict.fromkeys(("sa", "sb", "bias", "residual", "activation"))
    return {"out": same_memory(g["out"], (2, 4, 8), torch.int32), **absent, **changes}


GEMM_TYPE_ERRORS = {
    "a is a NoneType, expected a torch.Tensor": lambda g: {"a": None},
    "a is a list, expected a torch.Tensor": lambda g: {"a": [[1, 2]]},
    "b is a NoneType, expected a torch.Tensor": lambda g: {"b": None},
    "sa is a str, expected a torch.Tensor": lambda g: {"sa": "1"},
    "bias is a float, expected a torch.Tensor": lambda g: {"bias": 1.0},
    "out is a str, expected a torch.Tensor": lambda g: {"out": "x"},
    "a has dtype float32, expected int8": lambda g: {"a": g["a"].float()},
    "a has dtype uint8, expected": lambda g: {"a": g["a"].view(torch.uint8)},
    "a has dtype int64, expected": lambda g: {"a": g["a"].long()},
    "a has dtype complex64, expected": lambda g: {"a": g["a"].cfloat()},
    "b has dtype float16, expected int8": lambda g: {"b": g["b"].half()},
    "sa has dtype float16, expected float32": lambda g: {"sa": g["sa"].half()},
    "sb has dtype float64, expected": lambda g: {"sb": g["sb"].double()},
    "bias has dtype float16, expected float32": lambda g: {"bias": g["bias"].half()},
    "sa has dtype none, expected float32": lambda g: {"sa": None},
    "sb has dtype none, expected float32": lambda g: {"sb": None},
    f"out has dtype uint8, expected {DTYPES}": lambda g: {"out": g["out"].byte()},
    "out has dtype torch.float32, expected out_dtype = torch.bfloat16": lambda g: {
        "out_dtype": torch.bfloat16
    },
    "out_dtype is torch.uint8, expected one of bfloat16, float16, float32, int32, int8": lambda g: {
        "out": None,
        "out_dtype": torch.uint8,
    },
    "residual is a float, expected a torch.Tensor": lambda g: {"residual": 1.0},
    "residual has dtype int8, expected float32 or float16 or bfloat16": lambda g: {
        "residual": g["residual"].char()
    },
    "residual has dtype float64, expected": lambda g: {"residual": g["residual"].double()},
    "zero_point is a float, expected a torch.Tensor": lambda g: {"zero_point": 1.0},
    "zero_point has dtype int64, expected": lambda g: {"zero_point": g["zero_point"].long()},
    "zero_point has dtype int8, expected int32": lambda g: {"zero_point": g["zero_point"].char()},
    "column_sums is a list, expected a torch.Tensor": lambda g: {"column_sums": [1]},
    "column_sums has dtype float32, expected int32": lambda g: {
        "column_sums": g["column_sums"].float()
    },
    "out_scale is a str, expected a torch.Tensor": lambda g: int8_out(g, out_scale="1"),
    "out_scale has dtype float16, expected float32": lambda g: int8_out(
        g, out_scale=g["sa"][0, 0].half()
    ),
    "bias has dtype bfloat16, expected float32": lambda g: int8_out(g, bias=g["bias"].bfloat16()),
    "b_is_constant is a int, expected a bool": lambda g: {"b_is_constant": 1},
    "activation is a builtin_function_or_method, expected None or one of relu, gelu": lambda g: {
        "activation": torch.relu
    },
}
GEMM_VALUE_ERRORS = {
    "sa must be absent when out is int32": lambda g: raw_sums(g, sa=g["sa"]),
    "bias must be absent when out is int32": lambda g: raw_sums(g, bias=g["bias"]),
    "residual must be absent when out is int32": lambda g: raw_sums(g, residual=g["residual"]),
    "activation must be absent when out is int32": lambda g: raw_sums(g, activation="relu"),
    "out_scale must be absent when out is int32": lambda g: raw_sums(g, out_scale=0.5),
    "out_scale is missing; an int8 out needs it": lambda g: int8_out(g, out_scale=None),
    "out_scale belongs to an int8 out, but out is float32": lambda g: {"out_scale": 0.5},
    "out_scale has shape (2,), expected one element": lambda g: int8_out(
        g, out_scale=g["bias"][:2]
    ),
    "activation is 'swish', expected None or one of relu, gelu, gelu_tanh, silu": lambda g: {
        "activation": "swish"
    },
    "residual has shape (8, 8), expected (2, 4, 8) as out has": lambda g: {
        "residual": g["residual"].view(8, 8)
    },
    "residual has shape (2, 4, 7), expected": lambda g: {"residual": g["residual"][..., :7]},
    "zero_point has shape (7,), expected a scalar": lambda g: {
        "zero_point": g["zero_point"].view(-1)[:7]
    },
    "column_sums has shape (7,), expected (8,) or (1, 8) with N = 8": lambda g: {
        "column_sums": g["column_sums"][:7]
    },
    "column_sums has shape (), expected (8,)": lambda g: {"column_sums": g["column_sums"][0]},
    "a has shape (16,)": lambda g: {"a": g["a"][0, 0]},
    "a has rank 9": lambda g: {"a": g["a"].view(2, 1, 1, 1, 1, 1, 1, 4, 16)},
    "b has shape (16,)": lambda g: {"b": g["b"][:, 0]},
    "b has shape (1, 16, 8)": lambda g: {"b": g["b"][None]},
    "a has shape (2, 4, 16) and b (15, 8); expected a (..., M, K) and b (K, N)": lambda g: {
        "b": g["b"][:15]
    },
    "was b.t() meant?": lambda g: {"b": g["b"].t()},
    "out has shape (2, 4, 7), expected (2, 4, 8)": lambda g: {"out": g["out"][..., :7]},
    "out has shape (8, 8), expected (2, 4, 8)": lambda g: {"out": g["out"].view(8, 8)},
    "out has shape (1, 4, 8), expected (2, 4, 8)": lambda g: {"out": g["out"][:1]},
    "sa has shape (7,), expected a scalar": lambda g: {"sa": g["sa"].view(-1)[:7]},
    "sa has shape (4, 2), expected a scalar": lambda g: {"sa": g["sa"].view(4, 2)},
    "sa has shape (1, 8), expected a scalar": lambda g: {"sa": g["sa"].view(1, 8)},
    "sb has shape (7,), expected a scalar, (8,) or (1, 8) with N = 8": lambda g: {
        "sb": g["sb"][:7]
    },
    "sb has shape (8, 1), expected a scalar": lambda g: {"sb": g["sb"][:, None]},
    "bias has shape (7,), expected (8,) or (1, 8) with N = 8": lambda g: {"bias": g["bias"][:7]},
    "bias has shape (), expected (8,)": lambda g: {"bias": g["bias"][0]},
    "out of shape (2, 4, 8) overlaps itself (an expanded tensor?)": lambda g: {
        "out": g["out"][:, :, :1].expand(2, 4, 8)
    },
    "out of shape (2, 4, 8) overlaps itself": lambda g: {
        "out": g["out"].view(-1).as_strided((2, 4, 8), (4, 8, 1))
    },
    "out overlaps bias in memory": lambda g: {"bias": g["out"].view(-1)[8:16]},
    "out overlaps sa in memory": lambda g: {"sa": g["out"].view(-1)[:8]},
    "out overlaps sb in memory": lambda g: {"sb": g["out"].view(-1)[-8:]},
    "out overlaps a in memory": lambda g: {"a": same_memory(g["out"], (2, 4, 16), torch.int8)},
    "out overlaps b in memory": lambda g: {"b": same_memory(g["out"], (16, 8), torch.int8)},
    "out overlaps zero_point in memory": lambda g: {
        "zero_point": same_memory(g["out"], (8,), torch.int32)
    },
    "out overlaps column_sums in memory": lambda g: {
        "column_sums": same_memory(g["out"], (8,), torch.int32)
    },
    "out overlaps out_scale in memory": lambda g: int8_out(g, out_scale=g["out"][0, 0, 0]),
    "out overlaps residual in memory; residual may be out itself": lambda g: {
        "residual": same_memory(g["out"], (2, 4, 8), torch.bfloat16)
    },
    "out overlaps residual in memory; residual may": lambda g: {
        "residual": g["out"].as_strided((2, 4, 8), (32, 1, 4))
    },
    "out overlaps residual in memory": lambda g: {"residual": g["out"][:1].expand(2, 4, 8)},
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    cases(GEMM_TYPE_ERRORS, GEMM_VALUE_ERRORS),
)
def test_int8_gemm_refuses(device, change, error, message):
    good = gemm_arguments(device)
    canvas = good["out"]
    with pytest.raises(error, match=re.escape(message)) as caught:
        fastq.int8_gemm(**{**good, **change(good)})
    assert str(caught.value).startswith("int8_gemm: ")
    assert (canvas == SENTINEL).all()


def test_k_past_the_limit_of_int32(device):
    a = torch.zeros(1, 131072, dtype=torch.int8, device=device)
    out = torch.full((1, 3), float(SENTINEL), device=device)
    with pytest.raises(ValueError, match="int8_gemm: K = 131072, expected at most 131071"):
        fastq.int8_gemm(a, a.expand(3, -1).t(), 1.0, 1.0, out=out)
    assert (out == SENTINEL).all()


def test_k_past_the_limit_with_a_zero_point(device):
    a = torch.zeros(1, 65536, dtype=torch.int8, device=device)
    out = torch.full((1, 3), float(SENTINEL), device=device)
    message = "int8_gemm: K = 65536, expected at most 65535 with zero_point"
    with pytest.raises(ValueError, match=message):
        fastq.int8_gemm(a, a.expand(3, -1).t(), 1.0, 1.0, zero_point=1, out=out)
    assert (out == SENTINEL).all()
    fastq.int8_gemm(a, a.expand(3, -1).t(), 1.0, 1.0, out=out)
    assert (out == 0).all()


def test_a_packed_weight_needs_its_column_sums():
    a, b, sa, sb = random_gemm(8, 8, 16, device=torch.device("cpu"))
    packed, out = fastq.pack_weight(b), torch.full((8, 8), float(SENTINEL))
    message = "zero_point needs column_sums where b is a PackedWeight; pass column_sums = b.sum(0"
    with pytest.raises(ValueError, match=re.escape(f"int8_gemm: {message}")):
        fastq.int8_gemm(a, packed, sa, sb, zero_point=1, out=out)
    assert (out == SENTINEL).all()


def test_int8_output_wants_a_scale_with_out_dtype_too(device):
    a, b, sa, sb = random_gemm(8, 8, 16, device=device)
    with pytest.raises(ValueError, match="int8_gemm: out_scale is missing; an int8 out needs it"):
        fastq.int8_gemm(a, b, sa, sb, out_dtype=torch.int8)
    with pytest.raises(ValueError, match="out_scale belongs to an int8 out, but out is float16"):
        fastq.int8_gemm(a, b, sa, sb, out_dtype=torch.float16, out_scale=0.5)


@pytest.mark.parametrize("name", ["sa", "sb", "bias", "residual", "out"])
def test_requires_grad_is_refused_while_grad_is_enabled(device, name):
    kwargs = gemm_arguments(device)
    kwargs[name].requires_grad_()
    message = f"int8_gemm: {name} requires grad, and int8_gemm has no gradient"
    with pytest.raises(ValueError, match=message):
        fastq.int8_gemm(**kwargs)
    assert (kwargs["out"] == SENTINEL).all()
    with torch.no_grad():
        fastq.int8_gemm(**kwargs)
    assert (kwargs["out"] != SENTINEL).all()


def test_the_other_ops_refuse_requires_grad(device):
    x = torch.ones(3, 4, device=device, requires_grad=True)
    q = torch.ones(3, 4, dtype=torch.int8, device=device)
    s = torch.ones(3, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="quantize_per_token: x requires grad"):
        fastq.quantize_per_token(x)
    with pytest.raises(ValueError, match="quantize_per_channel: w requires grad"):
        fastq.quantize_per_channel(x)
    with pytest.raises(ValueError, match="dequantize: s requires grad"):
        fastq.dequantize(q, s)
    with torch.no_grad():
        fastq.quantize_per_token(x)
        fastq.quantize_per_channel(x)
        fastq.dequantize(q, s)


QUANTIZE_TYPE_ERRORS = {
    "{} is a list, expected a torch.Tensor": lambda x: [1.0],
    "{} has dtype int8, expected float32 or float16 or bfloat16": lambda x: x.char(),
    "{} has dtype float64, expected": lambda x: x.double(),
    "{} has dtype bool, expected": lambda x: x.bool(),
}
QUANTIZE_VALUE_ERRORS = {
    "{} has shape (), expected": lambda x: x[0, 0],
    "{} has ": lambda x: x.view(3, 1, 1, 1, 1, 1, 1, 1, 4),
}


@pytest.mark.parametrize("op", ["quantize_per_token", "quantize_per_channel"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    cases(QUANTIZE_TYPE_ERRORS, QUANTIZE_VALUE_ERRORS),
)
def test_quantize_refuses(device, op, change, error, message):
    name = "x" if op == "quantize_per_token" else "w"
    with pytest.raises(error, match=re.escape(f"{op}: " + message.format(name))):
        getattr(fastq, op)(change(torch.ones(3, 4, device=device)))


@pytest.mark.parametrize("op", ["quantize_per_token", "quantize_per_channel"])
@pytest.mark.parametrize(
    ("rotation", "error", "message"),
    [
        (1, ValueError, "rotation is 1, expected 0, 2, 4, 8, 16 or 32"),
        (3, ValueError, "rotation is 3, expected"),
        (64, ValueError, "rotation is 64, expected"),
        (-32, ValueError, "rotation is -32, expected"),
        (8.0, TypeError, "rotation is a float, expected an int"),
        ("8", TypeError, "rotation is a str, expected an int"),
        (None, TypeError, "rotation is a NoneType, expected an int"),
        (8, ValueError, "{} has shape (3, 20), expected a last size that is a multiple of rotat"),
    ],
    ids=str,
)
def test_quantize_refuses_a_rotation(device, op, rotation, error, message):
    name = "x" if op == "quantize_per_token" else "w"
    with pytest.raises(error, match=re.escape(f"{op}: " + message.format(name))):
        getattr(fastq, op)(torch.ones(3, 20, device=device), rotation=rotation)
    if isinstance(rotation, int):  # past the Python check too
        with pytest.raises(error, match=re.escape(f"{op}: " + message.format(name))):
            getattr(torch.ops.fastq, op)(torch.ones(3, 20, device=device), rotation)


def test_quantize_per_channel_takes_a_matrix_only(device):
    with pytest.raises(
        ValueError, match=r"quantize_per_channel: w has shape \(3,\), expected \(N, K\)"
    ):
        fastq.quantize_per_channel(torch.ones(3, device=device))
    with pytest.raises(ValueError, match=r"w has shape \(2, 3, 4\), expected \(N, K\)"):
        fastq.quantize_per_channel(torch.ones(2, 3, 4, device=device))


DEQUANTIZE_TYPE_ERRORS = {
    "q is a list, expected a torch.Tensor": lambda g: {"q": [1]},
    "s is a str, expected a torch.Tensor": lambda g: {"s": "1"},
    "s is a NoneType, expected a torch.Tensor": lambda g: {"s": None},
    "q has dtype float32, expected int8": lambda g: {"q": g["q"].float()},
    "s has dtype float16, expected float32": lambda g: {"s": g["s"].half()},
    "out has dtype int32, expected bfloat16": lambda g: {"out": g["out"].int()},
    "out_dtype is torch.int32, expected one of": lambda g: {"out": None, "out_dtype": torch.int32},
    "out has dtype torch.float32, expected out_dtype = torch.float16": lambda g: {
        "out_dtype": torch.float16
    },
}
DEQUANTIZE_VALUE_ERRORS = {
    "q has shape (), expected (..., K)": lambda g: {"q": g["q"][0, 0, 0]},
    "out has shape (8, 16), expected (2, 4, 16)": lambda g: {"out": g["out"].view(8, 16)},
    "s has shape (7,), expected a scalar": lambda g: {"s": g["s"].view(-1)[:7]},
    "s has shape (1, 8), expected a scalar": lambda g: {"s": g["s"].view(1, 8)},
    "out of shape (2, 4, 16) overlaps itself": lambda g: {"out": g["out"][:1].expand(2, 4, 16)},
    "out overlaps q in memory": lambda g: {"q": same_memory(g["out"], (2, 4, 16), torch.int8)},
    "out overlaps s in memory": lambda g: {"s": g["out"].view(-1)[:8]},
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    cases(DEQUANTIZE_TYPE_ERRORS, DEQUANTIZE_VALUE_ERRORS),
)
def test_dequantize_refuses(device, change, error, message):
    good = {
        "q": random_int8(2, 4, 16, device=device),
        "s": torch.ones(2, 4, 1, device=device),
        "out": torch.full((2, 4, 16), float(SENTINEL), device=device),
    }
    canvas = good["out"]
    with pytest.raises(error, match=re.escape(f"dequantize: {message}")):
        fastq.dequantize(**{**good, **change(good)})
    assert (canvas == SENTINEL).all()


def test_pack_weight_refuses():
    with pytest.raises(TypeError, match=r"pack_weight: b is a list, expected a torch\.Tensor"):
        fastq.pack_weight([1])
    with pytest.raises(TypeError, match="pack_weight: b has dtype float32, expected int8"):
        fastq.pack_weight(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"pack_weight: b has shape \(3,\)"):
        fastq.pack_weight(torch.ones(3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"pack_weight: b has shape \(1, 3, 4\)"):
        fastq.pack_weight(torch.ones(1, 3, 4, dtype=torch.int8))


def test_a_packed_weight_that_is_none():
    a = torch.ones(2, 40, dtype=torch.int8)
    good = fastq.pack_weight(torch.ones(40, 24, dtype=torch.int8))
    out = torch.full((2, 24), float(SENTINEL))
    cases = [
        (good._replace(data=good.data[:-1]), ValueError, "b is not a packed weight of (40, 24)"),
        (
            good._replace(data=good.data.view(torch.int8)),
            TypeError,
            "b has dtype int8, expected uint8",
        ),
        (good._replace(k=41), ValueError, "a has shape (2, 40) and b (41, 24)"),
        (good._replace(n=25), ValueError, "out has shape (2, 24), expected (2, 25)"),
        (good._replace(n=-1), ValueError, "b has a negative size"),
        (good._replace(data=good.data.view(2, -1)), ValueError, "b has shape"),
    ]
    for b, error, message in cases:
        with pytest.raises(error, match=re.escape(f"int8_gemm: {message}")):
            fastq.int8_gemm(a, b, 1.0, 1.0, out=out)
        assert (out == SENTINEL).all()


@pytest.mark.cuda
@pytest.mark.parametrize(
    "name", ["b", "sa", "sb", "bias", "residual", "zero_point", "column_sums", "out"]
)
def test_mixed_devices(name):
    kwargs = gemm_arguments(torch.device("cuda"))
    kwargs[name] = kwargs[name].cpu()
    with pytest.raises(TypeError, match=f"int8_gemm: {name} is on cpu, expected cuda:0 as a is"):
        fastq.int8_gemm(**kwargs)
    kwargs = gemm_arguments(torch.device("cpu"))
    kwargs[name] = kwargs[name].cuda()
    with pytest.raises(TypeError, match=f"int8_gemm: {name} is on cuda:0, expected cpu as a is"):
        fastq.int8_gemm(**kwargs)


@pytest.mark.cuda
def test_mixed_devices_of_dequantize():
    q = torch.ones(3, 4, dtype=torch.int8)
    with pytest.raises(TypeError, match="dequantize: s is on cuda:0, expected cpu as q is"):
        fastq.dequantize(q, torch.ones(3).cuda())
    with pytest.raises(TypeError, match="dequantize: out is on cpu, expected cuda:0 as q is"):
        fastq.dequantize(q.cuda(), 1.0, out=torch.ones(3, 4))


def test_a_cpu_only_build_meets_a_real_cuda_tensor():
    if not torch.cuda.is_available() or fastq.describe()["cuda"] is not None:
        pytest.skip("needs a GPU and a build without the CUDA backend")
    kwargs = gemm_arguments(torch.device("cuda"))
    with pytest.raises(NotImplementedError, match="FASTQ_CUDA=ON pip install"):
        fastq.int8_gemm(**kwargs)


def test_the_process_survives_a_bad_environment(monkeypatch):
    a = torch.ones(2, 16, dtype=torch.int8)
    monkeypatch.setenv("FASTQ_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"FASTQ_CPU_ISA: expected scalar, .* got 'sse9'"):
        fastq.int8_gemm(a, a.t(), 1.0, 1.0)
    monkeypatch.delenv("FASTQ_CPU_ISA")
    assert "FASTQ_CPU_ISA" not in os.environ
    assert (fastq.int8_gemm(a, a.t(), 1.0, 1.0) == 16).all()
