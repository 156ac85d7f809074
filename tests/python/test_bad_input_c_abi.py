"""Bad input that only a C or C++ program can pass: it gets an error too, and nothing is written."""

from __future__ import annotations

import ctypes

import pytest
import torch

import c_abi
import fastq
import reference
from operands import random_gemm

SENTINEL = -77


def c_gemm(device_type=c_abi.CPU):
    """The arguments of a good call from C, and the tensors that own their memory."""
    a, b, sa, sb = random_gemm(4, 8, 16, device=torch.device("cpu"))
    out = torch.full((4, 8), float(SENTINEL))
    weight = c_abi.with_size(
        c_abi.Weight,
        data=c_abi.view(b, device_type=device_type),
        scale=c_abi.view(sb, device_type=device_type),
    )
    args = c_abi.with_size(
        c_abi.GemmArgs,
        a=c_abi.view(a, device_type=device_type),
        b=ctypes.pointer(weight),
        scale_a=c_abi.view(sa, device_type=device_type),
        out=c_abi.view(out, device_type=device_type),
    )
    return args, weight, out, (a, b, sa, sb)


def call_gemm(args):
    size = ctypes.c_size_t()
    status = c_abi.library.fastq_int8_gemm_workspace_size(ctypes.byref(args), ctypes.byref(size))
    if status == 0:
        workspace = torch.empty(size.value + 64, dtype=torch.uint8)
        args.workspace = (workspace.data_ptr() + 63) // 64 * 64
        args.workspace_size = size.value
        status = c_abi.library.fastq_int8_gemm(ctypes.byref(args))
    return status


def test_read_only_out():
    args, _, out, _owners = c_gemm()
    assert call_gemm(args) == 0
    out.fill_(SENTINEL)
    args.out.flags = c_abi.READ_ONLY
    assert call_gemm(args) == c_abi.INVALID_VALUE
    assert c_abi.last_error() == "int8_gemm: out is read-only"
    assert (out == SENTINEL).all()


@pytest.mark.parametrize("name", ["q", "scale"])
def test_read_only_outputs_of_quantize(name):
    x = torch.ones(3, 4)
    q, s = torch.full((3, 4), SENTINEL, dtype=torch.int8), torch.full((3,), float(SENTINEL))
    args = c_abi.with_size(
        c_abi.QuantizeArgs, x=c_abi.view(x), q=c_abi.view(q), scale=c_abi.view(s)
    )
    getattr(args, name).flags = c_abi.READ_ONLY
    for op in ("quantize_per_token", "quantize_per_channel"):
        entry = getattr(c_abi.library, f"fastq_{op}")
        assert entry(ctypes.byref(args)) == c_abi.INVALID_VALUE
        assert c_abi.last_error() == f"{op}: {name} is read-only"
    assert (q == SENTINEL).all()
    assert (s == SENTINEL).all()


def test_read_only_out_of_dequantize():
    q, s, out = (
        torch.ones(3, 4, dtype=torch.int8),
        torch.ones(3),
        torch.full((3, 4), float(SENTINEL)),
    )
    views = {"q": c_abi.view(q), "scale": c_abi.view(s)}
    args = c_abi.with_size(
        c_abi.DequantizeArgs, **views, out=c_abi.view(out, flags=c_abi.READ_ONLY)
    )
    assert c_abi.library.fastq_dequantize(ctypes.byref(args)) == c_abi.INVALID_VALUE
    assert c_abi.last_error() == "dequantize: out is read-only"
    assert (out == SENTINEL).all()


def test_malformed_structs():
    def set_field(target, field, value):
        def change(args, weight):
            setattr(
                {"args": args, "weight": weight, "a": args.a, "out": args.out}[target], field, value
            )

        return change

    cases = [
        (
            set_field("args", "struct_size", 0),
            c_abi.INVALID_VALUE,
            "struct_size is 0, expected at least",
        ),
        (
            set_field("weight", "struct_size", 8),
            c_abi.INVALID_VALUE,
            "struct_size is 8, expected at least",
        ),
        (set_field("args", "b", None), c_abi.INVALID_TYPE, "b is missing"),
        (
            set_field("a", "data", None),
            c_abi.INVALID_VALUE,
            "a of shape (4, 16) has a null data pointer",
        ),
        (set_field("a", "rank", 9), c_abi.INVALID_VALUE, "a has rank 9, expected at most 8"),
        (set_field("a", "rank", -1), c_abi.INVALID_VALUE, "a has rank -1"),
        (set_field("a", "dtype", 99), c_abi.INVALID_TYPE, "a has an unknown dtype"),
        (set_field("out", "dtype", 0), c_abi.INVALID_TYPE, "out is missing"),
        (
            set_field("out", "device_type", 7),
            c_abi.INVALID_TYPE,
            "out is on an unknown device type 7",
        ),
        (set_field("weight", "layout", 5), c_abi.INVALID_VALUE, "b has an unknown layout 5"),
        (set_field("args", "activation", 5), c_abi.INVALID_VALUE, "activation is 5, expected"),
        (set_field("args", "activation", -1), c_abi.INVALID_VALUE, "activation is -1, expected"),
        (set_field("weight", "group_size", 64), c_abi.NOT_IMPLEMENTED, "b.group_size other than 0"),
    ]
    for change, status, message in cases:
        args, weight, out, _owners = c_gemm()
        change(args, weight)
        assert call_gemm(args) == status, message
        assert c_abi.last_error().startswith("int8_gemm: ")
        assert message in c_abi.last_error()
        assert (out == SENTINEL).all()


def in_longer_memory(struct, size, tail):
    """The struct's first `size` bytes, then `tail`, as a pointer to its type, and the memory."""
    memory = ctypes.create_string_buffer(ctypes.string_at(ctypes.addressof(struct), size) + tail)
    ctypes.cast(memory, ctypes.POINTER(ctypes.c_size_t))[0] = size
    return ctypes.cast(memory, ctypes.POINTER(type(struct))), memory


def test_structs_of_an_older_header():
    """Programs built against fastq 0.1 pass shorter structs; what lies behind them is not read."""
    args, weight, out, _owners = c_gemm()
    assert call_gemm(args) == 0
    expected = out.clone()
    out.fill_(SENTINEL)
    junk = b"\xff" * 1000
    old_weight, _weight = in_longer_memory(weight, c_abi.Weight.column_sums.offset, junk)
    args.b = old_weight
    old_args, _args = in_longer_memory(args, c_abi.GemmArgs.zero_point.offset, junk)
    text = ctypes.create_string_buffer(128)
    library = c_abi.library
    assert library.fastq_int8_gemm_describe(old_args, text, ctypes.c_size_t(128)) == 0
    assert library.fastq_int8_gemm(old_args) == 0
    assert torch.equal(out, expected)
    size = ctypes.c_size_t()
    assert library.fastq_pack_weight_size(old_weight, ctypes.byref(size)) == 0
    packed = torch.zeros(size.value + 64, dtype=torch.uint8)
    packed = packed[-packed.data_ptr() % 64 :][: size.value]
    view = c_abi.view(packed)
    assert library.fastq_pack_weight(old_weight, ctypes.byref(view)) == 0
    # One byte less was never the size of the struct.
    least = old_args.contents.struct_size
    old_args.contents.struct_size = least - 1
    assert library.fastq_int8_gemm(old_args) == c_abi.INVALID_VALUE
    assert f"struct_size is {least - 1}, expected at least {least}" in c_abi.last_error()


def test_a_quantize_struct_of_an_older_header():
    """fastq 0.1 knew no rotation: whatever lies behind its struct is not one."""
    x = torch.randn(3, 64)
    q, s = torch.zeros(3, 64, dtype=torch.int8), torch.zeros(3)
    args = c_abi.with_size(
        c_abi.QuantizeArgs, x=c_abi.view(x), q=c_abi.view(q), scale=c_abi.view(s)
    )
    least = c_abi.QuantizeArgs.rotation.offset
    old, _memory = in_longer_memory(args, least, b"\xff" * 1000)
    for op in ("quantize_per_token", "quantize_per_channel"):
        entry = getattr(c_abi.library, f"fastq_{op}")
        old.contents.struct_size = least
        q.zero_()
        assert entry(old) == 0
        expected_q, expected_s = reference.quantize(x)
        reference.assert_same(q, expected_q)
        reference.assert_same(s, expected_s)
        old.contents.struct_size = least - 1
        assert entry(old) == c_abi.INVALID_VALUE
        message = f"{op}: struct_size is {least - 1}, expected at least {least}"
        assert c_abi.last_error().startswith(message)


@pytest.mark.parametrize("op", ["quantize_per_token", "quantize_per_channel"])
def test_rotation_through_the_c_abi(op):
    x = torch.randn(3, 64)
    q, s = torch.full((3, 64), SENTINEL, dtype=torch.int8), torch.full((3,), float(SENTINEL))
    args = c_abi.with_size(
        c_abi.QuantizeArgs, x=c_abi.view(x), q=c_abi.view(q), scale=c_abi.view(s)
    )
    entry = getattr(c_abi.library, f"fastq_{op}")
    name = "x" if op == "quantize_per_token" else "w"
    for args.rotation in (1, 3, 24, 64, 2**30, -2, -(2**31)):
        assert entry(ctypes.byref(args)) == c_abi.INVALID_VALUE
        expected = f"{op}: rotation is {args.rotation}, expected 0, 2, 4, 8, 16 or 32"
        assert c_abi.last_error() == expected
    short = c_abi.with_size(
        c_abi.QuantizeArgs,
        x=c_abi.view(x[:, :40]),
        q=c_abi.view(q[:, :40]),
        scale=c_abi.view(s),
        rotation=16,
    )
    assert entry(ctypes.byref(short)) == c_abi.INVALID_VALUE
    assert c_abi.last_error() == (
        f"{op}: {name} has shape (3, 40), expected a last size that is a multiple of rotation = 16"
    )
    assert (q == SENTINEL).all()
    assert (s == SENTINEL).all()
    for args.rotation in (2, 4, 8, 16, 32):
        assert entry(ctypes.byref(args)) == 0
        expected_q, expected_s = reference.quantize(x, args.rotation)
        reference.assert_same(q, expected_q)
        reference.assert_same(s, expected_s)


def test_structs_of_a_newer_header():
    """Longer structs are taken as long as nothing unknown is set."""
    args, weight, out, _owners = c_gemm()
    for target, status in ((b"\0" * 64, 0), (b"\0" * 63 + b"\1", c_abi.NOT_IMPLEMENTED)):
        for grown in ("args", "weight"):
            out.fill_(SENTINEL)
            args.b = ctypes.pointer(weight)
            struct = args if grown == "args" else weight
            longer, _memory = in_longer_memory(struct, ctypes.sizeof(struct), target)
            longer.contents.struct_size += len(target)
            if grown == "weight":
                args.b = longer
            pointer = longer if grown == "args" else ctypes.byref(args)
            assert c_abi.library.fastq_int8_gemm(pointer) == status
            if status != 0:
                assert "is set; the program needs a newer libfastq" in c_abi.last_error()
                assert (out == SENTINEL).all()
            else:
                assert (out != SENTINEL).all()
    args.struct_size = 1 << 40
    args.b = ctypes.pointer(weight)
    assert call_gemm(args) == c_abi.INVALID_VALUE
    assert "struct_size is 1099511627776, expected at most 65536" in c_abi.last_error()


def test_every_option_through_the_c_abi():
    args, weight, out, (a, b, sa, sb) = c_gemm()
    sums, points = b.sum(0, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    residual = torch.randn(4, 8, dtype=torch.float32).half()
    weight.column_sums = c_abi.view(sums)
    args.zero_point, args.residual = c_abi.view(points), c_abi.view(residual)
    names = [None, "relu", "gelu", "gelu_tanh", "silu"]
    for args.activation, name in enumerate(names):
        assert call_gemm(args) == 0
        expected = fastq.int8_gemm(
            *(a, b, sa, sb),
            zero_point=points,
            residual=residual,
            activation=name,
            out_dtype=torch.float32,
        )
        assert torch.equal(out, expected)
    q, out_scale = torch.zeros(4, 8, dtype=torch.int8), torch.tensor(0.5)
    args.out, args.out_scale = c_abi.view(q), c_abi.view(out_scale)
    assert call_gemm(args) == 0
    assert torch.equal(q, (expected / 0.5).round().clamp(-127, 127).char())
    weight.column_sums = c_abi.Tensor()
    assert call_gemm(args) == c_abi.INVALID_VALUE
    assert "zero_point needs column_sums, the int32 sums of b over K" in c_abi.last_error()


def test_negative_sizes_and_strides():
    args, _, out, (a, b, sa, sb) = c_gemm()
    args.a.sizes[0] = args.out.sizes[0] = -4
    assert call_gemm(args) == c_abi.INVALID_VALUE
    assert c_abi.last_error() == "int8_gemm: a has a negative size"
    # A negative stride is no mistake: the rows of a backwards.
    args, _, out, (a, b, sa, sb) = c_gemm()
    args.a.data += 3 * 16
    args.a.strides[0] = -16
    assert call_gemm(args) == 0
    assert torch.equal(out, fastq.int8_gemm(a.flip(0), b, sa, sb, out_dtype=torch.float32))


def test_a_cpu_only_build_meets_a_cuda_tensor():
    if fastq.describe()["cuda"] is not None:
        pytest.skip("this build has the CUDA backend")
    rebuild = "FASTQ_CUDA=ON pip install"
    args, _, out, _owners = c_gemm(device_type=c_abi.CUDA)
    assert call_gemm(args) == c_abi.NOT_IMPLEMENTED
    assert c_abi.last_error().startswith("int8_gemm: the tensors are on a CUDA device")
    assert rebuild in c_abi.last_error()
    assert (out == SENTINEL).all()
    x, q, s = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.int8), torch.ones(3)
    views = {
        name: c_abi.view(t, device_type=c_abi.CUDA) for name, t in (("x", x), ("q", q), ("s", s))
    }
    quantize = c_abi.with_size(c_abi.QuantizeArgs, x=views["x"], q=views["q"], scale=views["s"])
    dequantize = c_abi.with_size(
        c_abi.DequantizeArgs, q=views["q"], scale=views["s"], out=views["x"]
    )
    calls = {
        "quantize_per_token": quantize,
        "quantize_per_channel": quantize,
        "dequantize": dequantize,
    }
    for op, op_args in calls.items():
        entry = getattr(c_abi.library, f"fastq_{op}")
        assert entry(ctypes.byref(op_args)) == c_abi.NOT_IMPLEMENTED
        assert c_abi.last_error().startswith(f"{op}: the tensors are on a CUDA device")
        assert rebuild in c_abi.last_error()
