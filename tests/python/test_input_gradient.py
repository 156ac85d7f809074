"""Gradients through frozen INT8 weights: against the dequantised linear map in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastq.integrations.bitsandbytes import Linear8bitLt
from fastq.nn import Int8Linear, OutlierLinear
from fastq.nn.input_gradient import columns_at_a_time, hadamard, linear_input_gradient
from test_nn import make

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IN, OUT = 96, 40
COLUMNS = [3, 17, 95]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_module(kind: str, device: torch.device | str, dtype=torch.float32) -> nn.Module:
    linear = make(IN, OUT, device=device, dtype=dtype)
    smooth = draw(IN, seed=8).abs() + 0.5
    if kind == "outlier":
        return OutlierLinear.from_float(linear, threshold=2.0)
    if kind == "kept":
        options = {"keep_outlier_weights": True, "outlier_columns": COLUMNS}
        return OutlierLinear.from_float(linear, threshold=2.0, **options)
    if kind == "bitsandbytes":
        module = Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=2.0)
        module.load_state_dict(linear.state_dict())
        return module.to(device)
    options = {
        "w8a8": {},
        "static": {"scheme": "w8a8_static", "input_scale": 0.03},
        "rotation": {"rotation": 16},
        "smooth": {"smooth": smooth},
        "smooth_rotation": {"smooth": smooth, "rotation": 32},
    }[kind]
    return Int8Linear.from_float(linear, **options)


KINDS = ["w8a8", "static", "rotation", "smooth", "smooth_rotation"]
KINDS += ["outlier", "kept", "bitsandbytes"]


def dequantised(module: nn.Module) -> torch.Tensor:
    """The weight that a module stands for, (N, K) float64."""
    if isinstance(module, Linear8bitLt):
        return module.weight.double() * module.SCB.double()[:, None] / 127
    weight = module.weight.double() * module.weight_scale.double()[:, None]
    if isinstance(module, OutlierLinear):
        if module.outlier_columns is not None:
            weight[:, module.outlier_columns.long()] = module.outlier_weight.double()
        return weight
    if module._rotation:
        h = hadamard(module._rotation, weight)
        weight = (weight.view(OUT, -1, module._rotation) @ h).view(OUT, IN)
    return weight if module.smooth is None else weight / module.smooth.double()


def check(dx: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> None:
    """Against float64. Each weight is rounded to dx's dtype once, and so is dx, at most three
    times (where it is rotated and smoothed): errors of eps / 2 of their magnitudes' sums."""
    expected = dy.double() @ weight
    bound = 2 * torch.finfo(dx.dtype).eps * (dy.double().abs() @ weight.abs())
    # Rotated, an element is a sum of others of its block, whose magnitudes count.
    bound = bound.unflatten(-1, (-1, 32)).amax(-1, keepdim=True).expand(*bound.shape[:-1], -1, 32)
    assert ((dx.double() - expected).abs() <= bound.flatten(-2) + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7,), (2, 3), ()], ids=str)
def test_against_float64(device, kind, dtype, shape):
    module = make_module(kind, device)
    x = draw(*shape, IN).to(device, dtype).requires_grad_()
    dy = draw(*shape, OUT, seed=1).to(device, dtype)
    y = module(x)
    with torch.no_grad():
        assert torch.equal(y, module(x))  # the same quantised forward pass
    y.backward(dy)
    assert x.grad.dtype == dtype
    check(x.grad, dy, dequantised(module))


@pytest.mark.parametrize("kind", ["w8a8", "kept"])
def test_gradient_of_the_dequantised_layer(device, kind):
    """The same dx as an nn.Linear of the dequantised weight computes, to rounding."""
    module = make_module(kind, device)
    linear = nn.Linear(IN, OUT, bias=False, device=device)
    linear.weight.data = dequantised(module).float()
    a, b = (draw(6, IN).to(device).requires_grad_() for _ in range(2))
    dy = draw(6, OUT, seed=2).to(device)
    module(a).backward(dy)
    linear(b).backward(dy)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 65), (700, 2100), (5, 0), (0, 5)])
def test_parts(device, n, k):
    """Sizes that no part divides, empty ones too; several parts, where the weight is large."""
    w = torch.randint(-127, 128, (n, k), generator=torch.Generator().manual_seed(3))
    w, sw = w.to(device, torch.int8), draw(n).abs().to(device)
    dy = draw(4, n, seed=5).to(device)
    dx = linear_input_gradient(dy, w, sw)
    assert dx.shape == (4, k)
    exact = dy.double() @ (w.double() * sw.double()[:, None])
    assert (dx - exact).abs().max().item() <= 1e-5 * exact.abs().max().item() if n * k else True
    padded = torch.zeros(n, k + 11, dtype=torch.int8, device=device)[:, :k].copy_(w)
    assert torch.equal(linear_input_gradient(dy, padded, sw), dx)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_an_eighth_of_the_weight_at_a_time(itemsize):
    for n, k in ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (8, 8), (10**6, 7)):
        columns = columns_at_a_time(n, k, itemsize)
        assert 1 <= columns <= k
        assert columns * n * itemsize <= max(n * k * itemsize // 8, 4 << 20, 64 * n * itemsize)


@pytest.mark.cuda
def test_memory():
    """Beside dx, a backward pass holds an eighth of the 16-bit weight at most."""
    n, k = 4096, 11008
    w = torch.zeros(n, k, dtype=torch.int8, device="cuda")
    sw, dy = torch.ones(n, device="cuda"), torch.zeros(512, n, device="cuda").half()
    for _ in range(2):  # the first one makes cuBLAS's workspace
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        dx = linear_input_gradient(dy, w, sw)
        held = torch.cuda.max_memory_allocated() - before - dx.nbytes
        del dx
    assert held <= n * k * 2 // 8 + 4096


@pytest.mark.parametrize("kind", KINDS)
def test_compile(device, kind):
    torch._dynamo.reset()
    module = make_module(kind, device)
    grads, dy = [], draw(5, OUT, seed=1).to(device)
    for run in (module, torch.compile(module, fullgraph=True)):
        x = draw(5, IN).to(device).requires_grad_()
        y = run(x)
        y.backward(dy)
        grads += [y.detach(), x.grad]
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])


@pytest.mark.parametrize("kind", ["w8a8", "smooth_rotation"])
def test_a_packed_module_unpacks(device, kind):
    """Forward without grad packs on a CPU; a gradient needs the plain weight, compiled or not."""
    expected, module = make_module(kind, device), make_module(kind, device)
    dy = draw(5, OUT, seed=1).to(device)
    a, b, c = (draw(5, IN).to(device).requires_grad_() for _ in range(3))
    expected(a).backward(dy)
    with torch.no_grad():
        module(b)
    assert (module._packed is not None) == (device.type == "cpu")
    torch._dynamo.reset()
    torch.compile(module, fullgraph=True)(c).backward(dy)
    module(b).backward(dy)
    assert module._packed is None
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(a.grad, c.grad)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graph(kind):
    """Forward and backward pass in one graph, replayed on other values."""
    module = make_module(kind, "cuda")
    x, dy = draw(5, IN).cuda().requires_grad_(), draw(5, OUT, seed=1).cuda()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = module(x)
        return y, torch.autograd.grad(y, x, dy)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd wants its first passes outside of a capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(-2)
        dy.mul_(3)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


def test_autocast(device):
    for kind in ("w8a8", "outlier"):
        module = make_module(kind, device)
        x = draw(5, IN).to(device).requires_grad_()
        dy = draw(5, OUT, seed=1).to(device, torch.bfloat16)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = module(x)
        y.backward(dy)
        assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)
        check(x.grad.bfloat16(), dy, dequantised(module))


@pytest.mark.parametrize("kind", ["kept", "rotation"])
def test_backward_inside_autocast(device, kind):
    """Autocast does not reach into the backward pass: it stays in the forward pass's dtype."""
    module, dy = make_module(kind, device), draw(5, OUT, seed=1).to(device)
    x = draw(5, IN).to(device).requires_grad_()
    y = module(x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y.backward(dy)
    check(x.grad, dy, dequantised(module))


def test_adapters_train_around_frozen_layers(device):
    """LoRA: the loss falls, the INT8 weights stay."""
    torch.manual_seed(0)
    frozen = [make_module("w8a8", device), Int8Linear.from_float(make(OUT, IN, device=device))]
    before = [module.weight.clone() for module in frozen]
    down, up = nn.Linear(IN, 4, device=device), nn.Linear(4, OUT, device=device)
    x, target = draw(32, IN).to(device), draw(32, IN, seed=9).to(device)
    optimiser = torch.optim.Adam([*down.parameters(), *up.parameters()], lr=1e-2)
    losses = []
    for _ in range(20):
        hidden = torch.relu_(frozen[0](x) + up(down(x)))  # in place, as activations may be
        loss = (frozen[1](hidden) - target).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(m.weight, w) for m, w in zip(frozen, before, strict=True))
    assert not any(list(module.parameters()) for module in frozen)


def test_an_output_may_be_changed_in_place(device):
    x = draw(3, IN).to(device).requires_grad_()
    torch.relu_(make_module("w8a8", device)(x)).sum().backward()
    assert x.grad is not None
