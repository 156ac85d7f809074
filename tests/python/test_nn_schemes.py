"""Int8Linear's static scales and smoothing, and autocast of every quantised module."""

from __future__ import annotations

import numpy as np
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
    "tensor": {"scheme": "w8a8_tensor"},
    "tensor_smooth": {"scheme": "w8a8_tensor", "smooth": SMOOTH},
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


@pytest.mark.parametrize("smooth", [None, SMOOTH], ids=["plain", "smooth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dynamic_per_tensor_forward(device, dtype, smooth):
    linear, x = make(device=device, dtype=dtype), (20 * X).to(device, dtype)
    module = Int8Linear.from_float(linear, "w8a8_tensor", smooth=smooth)
    values = reference.prepare(reference.to_numpy(x), smooth, 0)
    scale = np.abs(values).max() / np.float32(127)
    assert scale.dtype == np.float32
    q, _, _ = reference.quantize_with(reference.to_numpy(x), smooth=smooth, scale=scale)
    weight = linear.weight if smooth is None else linear.weight.float().cpu() * smooth
    weight, w_scale = map(torch.from_numpy, reference.quantize(weight))
    bias = linear.bias.cpu().float()
    expected = reference.int8_gemm(
        torch.from_numpy(q), weight.t(), float(scale), w_scale, bias, dtype
    )
    reference.assert_same(module(x), expected)
    assert torch.equal(module(x.reshape(5, 1, 100)).flatten(0, 1), module(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["tensor", "tensor_smooth"])
def test_dynamic_per_tensor_of_special_inputs(device, kind, bad):
    linear = make(device=device)
    module = Int8Linear.from_float(linear, **KINDS[kind])
    zeros = module(torch.zeros(3, 100, device=device))
    assert torch.equal(zeros, linear.bias.expand(3, -1))
    assert module(torch.zeros(0, 100, device=device)).shape == (0, 37)
    tiny = module(torch.full((1, 100), 1e-42, device=device))
    assert torch.equal(tiny, linear.bias.expand(1, -1))
    x = X.to(device).clone()
    x[2, 3] = bad
    assert not module(x).isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_per_tensor(device, kind, dtype):
    if kind == "all":
        pytest.skip("has a rotation")
    linear = make(device=device, dtype=dtype)
    module = Int8Linear.from_float(linear, **KINDS[kind], per_tensor_weight=True)
    smooth = KINDS[kind].get("smooth")
    weight = linear.weight.float().cpu() * (1 if smooth is None else smooth)
    q, scale = reference.quantize(weight.reshape(1, -1))
    assert torch.equal(module.weight.cpu().flatten(), torch.from_numpy(q).flatten())
    assert module.weight_scale.tolist() == scale.tolist() * 37
    other = empty_like(module, device)
    other.load_state_dict(module.state_dict())
    x = X.to(device)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("options", [{"scheme": "w8a8_tensor"}, {"per_tensor_weight": True}])
def test_no_rotation_per_tensor(options):
    with pytest.raises(NotImplementedError, match="rotation is 4, expected 0 with"):
        Int8Linear.from_float(make(), rotation=4, **options)


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
    tensor = Int8Linear.from_float(linear, **KINDS["tensor"])
    return [
        Int8Linear.from_float(linear),
        static,
        tensor,
        OutlierLinear.from_float(linear, threshold=2.0),
    ]


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
