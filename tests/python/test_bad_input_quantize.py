"""Bad input of the fused quantising ops: each gets its own error, which names op, argument, what
was expected and what came."""

from __future__ import annotations

import ctypes
import math
import re

import pytest
import torch

import c_abi
import fastq
from test_bad_input import cases

OPS = {
    "quantize_per_token": lambda x, **options: fastq.quantize_per_token(x, **options),
    "rms_norm_quant": lambda x, **options: fastq.rms_norm_quant(x, **options),
    "layer_norm_quant": lambda x, **options: fastq.layer_norm_quant(x, **options),
    "silu_mul_quant": lambda x, **options: fastq.silu_mul_quant(
        x, **{"up": torch.ones(3, 4, device=x.device) if torch.is_tensor(x) else x, **options}
    ),
    "gelu_quant": lambda x, **options: fastq.gelu_quant(x, **options),
    "relu_quant": lambda x, **options: fastq.relu_quant(x, **options),
}
# What the native library says of them begins with its own name of the op.
NATIVE = {name: name for name in OPS} | {
    "rms_norm_quant": "norm_quant",
    "layer_norm_quant": "norm_quant",
    "silu_mul_quant": "activation_quant",
    "gelu_quant": "activation_quant",
    "relu_quant": "activation_quant",
}
ops = pytest.mark.parametrize("op", OPS)


def point(x, *shape, dtype=torch.int32):
    return torch.ones(shape, dtype=dtype, device=x.device)


# Of x (3, 4): the options, told by the Python function or, after "native", by the library.
TYPE_ERRORS = {
    "smooth is a float, expected a torch.Tensor": lambda x: {"smooth": 1.0},
    "scale is a str, expected a torch.Tensor": lambda x: {"scale": "1"},
    "zero_point is a float, expected a torch.Tensor": lambda x: {"scale": 0.1, "zero_point": 1.0},
    "asymmetric is a int, expected a bool": lambda x: {"asymmetric": 1},
    "asymmetric is a NoneType, expected a bool": lambda x: {"asymmetric": None},
    "rotation is a float, expected an int": lambda x: {"rotation": 4.0, "asymmetric": True},
    "native scale has dtype float16, expected float32": lambda x: {"scale": x[0, 0].half()},
    "native zero_point has dtype int8, expected int32": lambda x: {
        "scale": 0.1,
        "zero_point": point(x, 1, dtype=torch.int8),
    },
    "native smooth has dtype float16, expected float32": lambda x: {"smooth": x[0].half()},
    "native smooth has dtype int32, expected float32": lambda x: {"smooth": point(x, 4)},
}
VALUE_ERRORS = {
    "zero_point is given without scale": lambda x: {"zero_point": 3},
    "zero_point is given without scale; asymmetric": lambda x: {"zero_point": point(x, 1)},
    "zero_point is missing; with a scale, asymmetric=True needs it": lambda x: {
        "scale": 0.1,
        "asymmetric": True,
    },
    "scale is 0, expected a positive float32 number": lambda x: {"scale": 0},
    "scale is -1.0, expected": lambda x: {"scale": -1.0},
    "scale is 1e-46, expected": lambda x: {"scale": 1e-46},
    "scale is inf, expected": lambda x: {"scale": math.inf},
    "scale is nan, expected": lambda x: {"scale": math.nan},
    "zero_point is 128, expected -128 to 127": lambda x: {"scale": 0.1, "zero_point": 128},
    "zero_point is -129, expected": lambda x: {"scale": 0.1, "zero_point": -129},
    "rotation is 3, expected 0, 2, 4, 8, 16 or 32": lambda x: {"rotation": 3, "scale": 0.1},
    " has shape (3, 4), expected a last size that is a multiple of rotation = 8": lambda x: {
        "rotation": 8,
        "asymmetric": True,
    },
    "native scale has shape (3, 1), expected one element of a static": lambda x: {
        "scale": x[:, :1]
    },
    "native zero_point has shape (2,), expected one element": lambda x: {
        "scale": 0.1,
        "zero_point": point(x, 2),
    },
    "native smooth has shape (3,), expected (4,) or (1, 4) with K = 4": lambda x: {
        "smooth": x[:, 0]
    },
    "native smooth has shape (), expected (4,)": lambda x: {"smooth": x[0, 0]},
}


@ops
@pytest.mark.parametrize(("change", "error", "message"), cases(TYPE_ERRORS, VALUE_ERRORS))
def test_options_are_refused(device, op, change, error, message):
    x = torch.ones(3, 4, device=device)
    told = message.removeprefix("native ")
    name = NATIVE[op] if told != message else op
    with pytest.raises(error, match=re.escape(told)) as caught:
        OPS[op](x, **change(x))
    assert str(caught.value).startswith(f"{name}: ")


@ops
def test_x_is_refused(device, op):
    name = "gate" if op == "silu_mul_quant" else "x"
    x = torch.ones(3, 4, device=device)
    for bad in (None, [1.0]):
        kind = type(bad).__name__
        with pytest.raises(TypeError, match=f"^{op}: {name} is a {kind}, expected a torch.Tensor"):
            OPS[op](bad, asymmetric=True)
    with pytest.raises(ValueError, match=rf"^{op}: {name} has shape \(\), expected \(\.\.\., K\)"):
        OPS[op](x[0, 0], asymmetric=True)
    for bad in (x.char(), x.double()):
        with pytest.raises(TypeError, match=f"^{NATIVE[op]}: x has dtype .*, expected float32"):
            OPS[op](bad, asymmetric=True)
    with pytest.raises(ValueError, match=f"^{NATIVE[op]}: x has rank 9"):
        OPS[op](x.view(3, 1, 1, 1, 1, 1, 1, 1, 4), asymmetric=True)


@ops
def test_requires_grad_is_refused_while_grad_is_enabled(device, op):
    def grad(*shape):
        return torch.ones(shape, device=device, requires_grad=True)

    x = torch.ones(3, 4, device=device)
    tensors = {"smooth": grad(4), "scale": grad()}
    if "norm" in op:
        tensors |= {"weight": grad(4), "bias": grad(4), "residual": grad(3, 4)}
    elif op != "quantize_per_token":
        tensors["up"] = grad(3, 4)
    for name, tensor in tensors.items():
        with pytest.raises(ValueError, match=f"^{op}: {name} requires grad, and {op} has no grad"):
            OPS[op](x, **{name: tensor})
        with torch.no_grad():
            OPS[op](x, **{name: tensor})
    name = "gate" if op == "silu_mul_quant" else "x"
    with pytest.raises(ValueError, match=f"^{op}: {name} requires grad"):
        OPS[op](grad(3, 4))


NORM_TYPE_ERRORS = {
    "weight is a list, expected a torch.Tensor": lambda x: {"weight": [1.0]},
    "residual is a float, expected a torch.Tensor": lambda x: {"residual": 1.0},
    "eps is a str, expected a float": lambda x: {"eps": "1e-6"},
    "native weight has dtype float16, expected float32": lambda x: {"weight": x[0].half()},
    "native bias has dtype float64, expected": lambda x: {"bias": x[0].double()},
    "native residual has dtype bfloat16, expected float32": lambda x: {"residual": x.bfloat16()},
}
NORM_VALUE_ERRORS = {
    "native eps is -1": lambda x: {"eps": -1},
    "native eps is nan": lambda x: {"eps": math.nan},
    "native weight has shape (3,), expected (4,) or (1, 4)": lambda x: {"weight": x[:, 0]},
    "native bias has shape (3, 4), expected (4,) or (1, 4)": lambda x: {"bias": x},
    "native residual has shape (4,), expected (3, 4) as x has": lambda x: {"residual": x[0]},
    "native residual has shape (12, 1), expected (3, 4)": lambda x: {"residual": x.view(12, 1)},
}


@pytest.mark.parametrize("op", ["rms_norm_quant", "layer_norm_quant"])
@pytest.mark.parametrize(("change", "error", "message"), cases(NORM_TYPE_ERRORS, NORM_VALUE_ERRORS))
def test_norms_refuse(device, op, change, error, message):
    test_options_are_refused(device, op, change, error, message)


UP_TYPE_ERRORS = {
    "up is a str, expected a torch.Tensor": lambda x: {"up": "x"},
    "native up has dtype float16, expected float32": lambda x: {"up": x.half()},
}
UP_VALUE_ERRORS = {
    "native up has shape (4,), expected (3, 4) as x has": lambda x: {"up": x[0]},
    "native up has shape (3, 8), expected (3, 4)": lambda x: {"up": x.repeat(1, 2)},
}


@pytest.mark.parametrize("op", ["silu_mul_quant", "gelu_quant", "relu_quant"])
@pytest.mark.parametrize(("change", "error", "message"), cases(UP_TYPE_ERRORS, UP_VALUE_ERRORS))
def test_activations_refuse(device, op, change, error, message):
    test_options_are_refused(device, op, change, error, message)


def test_silu_mul_needs_both(device):
    x = torch.ones(3, 4, device=device)
    with pytest.raises(TypeError, match="silu_mul_quant: up is a NoneType, expected a torch"):
        fastq.silu_mul_quant(x, None)


def test_gelu_refuses_another_approximation(device):
    x = torch.ones(3, 4, device=device)
    for bad, error, got in (("erf", ValueError, "'erf'"), (True, TypeError, "a bool")):
        message = f"gelu_quant: approximate is {got}, expected 'none' or 'tanh'"
        with pytest.raises(error, match=message):
            fastq.gelu_quant(x, approximate=bad)


@pytest.mark.cuda
@ops
def test_mixed_devices(op):
    x = torch.ones(3, 4, device="cuda")
    tensors = {"smooth": x[0], "scale": x[0, 0]}
    if "norm" in op:
        tensors |= {"weight": x[0], "bias": x[0], "residual": x}
    elif op != "quantize_per_token":
        tensors["up"] = x
    for name, tensor in tensors.items():
        message = f"{NATIVE[op]}: {name} is on cpu, expected cuda:0 as x is"
        with pytest.raises(TypeError, match=message):
            OPS[op](x, **{name: tensor.cpu()})


def struct_of(op, quantize):
    kind = c_abi.NormQuantArgs if op == "norm_quant" else c_abi.ActivationQuantArgs
    return c_abi.with_size(kind, quantize=ctypes.pointer(quantize))


@pytest.mark.parametrize("op", ["norm_quant", "activation_quant"])
def test_malformed_structs(op):
    """From C: every error, and nothing is written."""
    x, residual = torch.ones(3, 4), torch.ones(3, 4)
    q, s = torch.full((3, 4), -77, dtype=torch.int8), torch.full((3,), -77.0)
    points = torch.full((3,), -77, dtype=torch.int32)
    views = {"x": c_abi.view(x), "q": c_abi.view(q), "scale": c_abi.view(s)}

    def fails(status, message, *, quantize=None, **fields):
        """With `fields` of the op's struct, and those of its fastq_quantize_args."""
        inner = c_abi.with_size(c_abi.QuantizeArgs, **views)
        for name, value in (quantize or {}).items():
            setattr(inner, name, value)
        args = struct_of(op, inner)
        for name, value in fields.items():
            setattr(args, name, value)
        assert getattr(c_abi.library, f"fastq_{op}")(ctypes.byref(args)) == status
        assert c_abi.last_error().startswith(f"{op}: {message}"), c_abi.last_error()

    value, kind = c_abi.INVALID_VALUE, c_abi.INVALID_TYPE
    read_only = {"flags": c_abi.READ_ONLY}
    empty = struct_of(op, c_abi.QuantizeArgs())
    empty.quantize = None
    assert getattr(c_abi.library, f"fastq_{op}")(ctypes.byref(empty)) == kind
    assert c_abi.last_error() == f"{op}: quantize is missing"
    fails(value, "struct_size is 8, expected at least", struct_size=8)
    fails(value, "struct_size is 0, expected at least", quantize={"struct_size": 0})
    fails(kind, "q is missing", quantize={"q": c_abi.Tensor()})
    fails(value, "q is read-only", quantize={"q": c_abi.view(q, **read_only)})
    fails(value, "scale is read-only", quantize={"scale": c_abi.view(s, **read_only)})
    fails(
        value,
        "zero_point is read-only",
        quantize={"zero_point": c_abi.view(points, **read_only)},
    )
    fails(value, "scale has shape (3,), expected one element", quantize={"is_static": 1})
    fails(value, "rotation is 3, expected", quantize={"rotation": 3})
    if op == "norm_quant":
        fails(value, "only one of residual and residual_out", residual=c_abi.view(residual))
        fails(value, "only one of residual and residual_out", residual_out=c_abi.view(residual))
        fails(value, "norm is 2, expected", norm=2)
        fails(
            value,
            "residual_out is read-only",
            residual=c_abi.view(residual),
            residual_out=c_abi.view(residual, **read_only),
        )
    else:
        fails(value, "activation is 5, expected", activation=5)
        fails(value, "activation is -1, expected", activation=-1)
    assert (q == -77).all()
    assert (s == -77).all()
    assert (points == -77).all()


def test_quantize_per_channel_takes_no_such_option():
    w, q = torch.ones(3, 4), torch.full((3, 4), -77, dtype=torch.int8)
    s, points = torch.ones(3), torch.ones(3, dtype=torch.int32)
    views = {"x": c_abi.view(w), "q": c_abi.view(q), "scale": c_abi.view(s)}
    for change, message in (
        ({"smooth": c_abi.view(w[0])}, "smooth must be absent"),
        ({"zero_point": c_abi.view(points)}, "zero_point must be absent"),
        ({"is_static": 1}, "is_static is 1, expected 0"),
    ):
        args = c_abi.with_size(c_abi.QuantizeArgs, **views, **change)
        entry = c_abi.library.fastq_quantize_per_channel
        assert entry(ctypes.byref(args)) == c_abi.INVALID_VALUE
        assert c_abi.last_error() == f"quantize_per_channel: {message}"
    assert (q == -77).all()
