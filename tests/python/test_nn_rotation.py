"""Int8Linear with a rotation: x and the weight rotated, the weight's scale divided to match."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import reference
from fastq.nn import Int8Linear
from fastq.quantization import quantize
from test_nn import expected_output, make

X = torch.randn(5, 96, generator=torch.Generator().manual_seed(4))


def make_rotated(rotation, device="cpu") -> Int8Linear:
    return Int8Linear.from_float(make(96, 40, device=device), rotation=rotation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotation", [2, 4, 8, 16, 32])
def test_forward(device, rotation, dtype):
    linear = make(96, 40, device=device, dtype=dtype)
    module = Int8Linear.from_float(linear, rotation=rotation)
    x = X.to(device, dtype)
    reference.assert_same(module(x), expected_output(x, linear, rotation))
    reference.assert_same(module(x[0]), expected_output(x[:1], linear, rotation)[0])


def test_close_to_float(device):
    linear = make(256, 128, device=device)
    x = torch.randn(64, 256, device=device)
    y, exact = Int8Linear.from_float(linear, rotation=32)(x), linear(x)
    assert (y - exact).norm() <= 0.02 * exact.norm()


def test_closer_to_float_where_features_are_large(device):
    linear = make(256, 128, device=device)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(device)
    x[:, 7::64] *= 50
    linear.weight[:, 7::64] /= 50
    exact = linear(x)
    error = {
        rotation: (Int8Linear.from_float(linear, rotation=rotation)(x) - exact).norm()
        for rotation in (0, 32)
    }
    assert error[32] < error[0] / 2


def test_buffers_and_repr(device):
    module = make_rotated(32, device)
    assert module.rotation.dtype == torch.int32
    assert module.rotation.item() == 32
    assert module.rotation.device == module.weight.device
    assert list(module.state_dict()) == ["weight", "weight_scale", "bias", "rotation"]
    expected = "Int8Linear(in_features=96, out_features=40, bias=True, scheme=w8a8, rotation=32)"
    assert repr(module) == expected
    weight, weight_scale = reference.quantize(make(96, 40).weight, 32)
    reference.assert_same(module.weight, weight)
    reference.assert_same(module.weight_scale, weight_scale / np.float32(32))
    assert make_rotated(0).rotation is None


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("where", ["same", "meta", "used"])
def test_state_dict_round_trip(device, where, assign):
    module, x = make_rotated(16, device), X.to(device)
    other = Int8Linear(96, 40, device="meta" if where == "meta" else device, rotation=16)
    if where == "used":
        other(x)
    other.load_state_dict(module.state_dict(), assign=assign or where == "meta")
    assert torch.equal(other(x), module(x))
    assert other.rotation.item() == 16


def test_copies_and_moves_keep_it(device):
    module, x = make_rotated(16, device), X.to(device)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half()):
        assert torch.equal(other(x), expected)
        assert other.rotation.dtype == torch.int32


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("saved", "own"), [(0, 32), (32, 0), (16, 32), (32, 16)])
def test_a_state_of_another_rotation_does_not_load(device, saved, own, strict):
    state, module, x = make_rotated(saved).state_dict(), make_rotated(own, device), X
    state["weight_scale"] *= 2
    before = module(x.to(device))
    message = f"weight was quantised with rotation {saved}, expected {own}; give .*={saved}"
    for prefix, target in (("", module), ("0.", nn.Sequential(module))):
        prefixed = {prefix + name: value for name, value in state.items()}
        with pytest.raises(RuntimeError, match=f"Int8Linear: {prefix}{message}"):
            target.load_state_dict(prefixed, strict=strict)
        assert torch.equal(module(x.to(device)), before)


def test_compile(device):
    torch._dynamo.reset()
    module = make_rotated(32, device)
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(X.to(device)), module(X.to(device)))


@pytest.mark.parametrize("call", [Int8Linear, lambda k, n, **o: quantize(make(k, n), **o)])
def test_bad_rotation(call):
    with pytest.raises(ValueError, match="rotation is 3, expected 0, 2, 4, 8, 16 or 32"):
        call(96, 40, rotation=3)
    with pytest.raises(TypeError, match="rotation is a str, expected an int"):
        call(96, 40, rotation="32")


def test_in_features_that_it_does_not_divide():
    message = "in_features is 100, expected a multiple of rotation = 8"
    with pytest.raises(ValueError, match=message):
        Int8Linear(100, 40, rotation=8)
    with pytest.raises(ValueError, match=message):
        Int8Linear.from_float(make(100, 40), rotation=8)
