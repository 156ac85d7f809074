"""Int8Linear's static scales and smoothing, and autocast of every quantised module."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

import reference
from fastq.nn import Int8Linear, OutlierLinear
from test_nn import make

X = torch.randn(5, 100, generator=torch.Generator().manual_seed(4))
SMOOTH = torch.rand(100, generator=torch.Generator().manual_seed(5)) + 0.5
KINDS = {
    "static": {"scheme": "w8a8_static", "input_scale": 0.03},
    "smooth": {"smooth": SMOOTH},
    "static_smooth": {"scheme": "w8a8_static", "input_scale": 0.05, "smooth": SMOOTH},
    "all": {"scheme": "w8a8_static", "input_scale": 0.1, "smooth": SMOOTH, "rotation": 4},
}


def empty_like(module: Int8Linear, device: torch.device | str) -> Int8Linear:
    smooth = module.smooth is not None
    kind = {"scheme": module.scheme, "rotation": module._rotation, "smooth": smooth}
    return Int8Linear(100, 37, device=device, **kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_static_forward(device, dtype):
    linear, x = make(device=device, dtype=dtype), X.to(device, dtype)
    module = Int8Linear.from_float(linear, "w8a8_static", input_scale=0.03)
    ratio = x.float().cpu().numpy() / torch.tensor(0.03).numpy()
    q = torch.from_numpy(ratio.round().clip(-127, 127)).to(torch.int8)
    weight, scale = map(torch.from_numpy, reference.quantize(linear.weight))
    bias = linear.bias.cpu().float()
    reference.assert_same(module(x), reference.int8_gemm(q, weight.t(), 0.03, scale, bias, dtype))
    assert torch.equal(module(x[0]), module(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_close_to_float(device, kind):
    linear, x = make(device=device), X.to(device)
    exact = linear(x)
    module = Int8Linear.from_float(linear, **KINDS[kind])
    assert (module(x) - exact).norm() <= 0.03 * exact.norm()


def test_smoothing_helps_where_features_are_large(device):
    linear, x = make(device=device), X.to(device).clone()
    x[:, 7::25] *= 50
    smooth = x.abs().amax(0).sqrt().clamp(min=1e-3)
    exact = linear(x)
    plain, smoothed = (
        (Int8Linear.from_float(linear, smooth=s)(x) - exact).norm() for s in (None, smooth)
    )
    assert smoothed < plain


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict(device, kind):
    module, x = Int8Linear.from_float(make(device=device), **KINDS[kind]), X.to(device)
    expected = module(x)
    state = module.state_dict()
    keys = {"weight", "weight_scale", "bias", *KINDS[kind]} - {"scheme"}
    assert state.keys() == keys
    for where, assign in (("cpu", False), ("meta", True)):
        other = empty_like(module, where)
        other.load_state_dict(load(save(state)), assign=assign)
        assert torch.equal(other.to(device)(x), expected)
    other.half()
    for name in ("weight_scale", "bias", "input_scale", "smooth"):
        buffer = getattr(other, name)
        assert buffer is None or buffer.dtype == torch.float32
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        ({}, KINDS["static"], "weight comes without input_scale, expected one"),
        (KINDS["static"], {}, "weight comes with input_scale, expected none"),
        (KINDS["smooth"], {}, "weight comes with smooth, expected none"),
        ({}, KINDS["smooth"], "weight comes without smooth, expected one"),
    ],
    ids=str,
)
def test_a_state_of_another_kind_does_not_load(saved, own, message, strict):
    state = Int8Linear.from_float(make(), **saved).state_dict()
    module = Int8Linear.from_float(make(), **own)
    before = module(X)
    state["weight_scale"] *= 2
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, strict=strict)
    assert torch.equal(module(X), before)


def test_repr():
    module = Int8Linear.from_float(make(), **KINDS["all"])
    expected = "in_features=100, out_features=37, bias=True"
    assert repr(module) == f"Int8Linear({expected}, scheme=w8a8_static, rotation=4, smooth=True)"


@pytest.mark.parametrize("kind", KINDS)
def test_compile(device, kind):
    torch._dynamo.reset()
    module, x = Int8Linear.from_float(make(device=device), **KINDS[kind]), X.to(device)
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(x), module(x))


def modules(device: torch.device) -> list[torch.nn.Module]:
    linear = make(device=device)
    static = Int8Linear.from_float(linear, **KINDS["static"])
    return [Int8Linear.from_float(linear), static, OutlierLinear.from_float(linear, threshold=2.0)]


@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype, own):
    """x becomes autocast's dtype, and so does the output: as with nn.Linear."""
    x = X.to(device, own)
    for module in modules(device):
        expected = module(x.to(dtype))
        with torch.autocast(device.type, dtype=dtype):
            y = module(x)
            assert make(device=device)(x).dtype == y.dtype == dtype
        assert torch.equal(y, expected)
        with torch.autocast(device.type, dtype=dtype, enabled=False):
            assert torch.equal(module(x), module(x.clone()))
            assert module(x).dtype == own


def test_compiled_autocast(device):
    x = X.to(device)
    for module in modules(device):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = compiled(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, module(x.bfloat16()))


@pytest.mark.cuda
def test_cuda_graph():
    x = X.cuda()
    for module in modules(torch.device("cuda")):
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        x.copy_(-2 * X)
        graph.replay()
        assert torch.equal(y, module(x))
