"""Linear8bitLt: bitsandbytes' state dict, and on a GPU bitsandbytes itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import fastq
from fastq.integrations.bitsandbytes import Linear8bitLt
from test_nn import make

IN, OUT = 100, 37
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(2))


def bitsandbytes_state(bias: bool = True, device="cpu") -> dict[str, torch.Tensor]:
    """What bitsandbytes 0.50 saves of make(IN, OUT) in float16 once it is quantised: each row's
    largest magnitude is SCB, and the weight is round(127 * w / SCB)."""
    linear = make(IN, OUT, bias, dtype=torch.float16).to(device)
    absmax = linear.weight.float().abs().amax(1)
    weight = (linear.weight.float() * (127 / absmax)[:, None]).round().to(torch.int8)
    state = {"weight": weight}
    if bias:
        state["bias"] = linear.bias
    return {**state, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def make_module(device="cpu", threshold=2.0, **options) -> Linear8bitLt:
    module = Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=threshold, **options)
    module.load_state_dict(bitsandbytes_state())
    return module.to(device)


def test_constructor_is_theirs():
    module = Linear8bitLt(IN, OUT, False, False, 6.0, None, "cpu")
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features, module.bias) == (IN, OUT, None)
    assert (module.has_fp16_weights, module.threshold) == (False, 6.0)
    module = Linear8bitLt(input_features=IN, output_features=OUT)
    assert (module.has_fp16_weights, module.threshold, module.index) == (True, 0.0, None)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    size = "in_features=100, out_features=37, bias=True, scheme=llm_int8, threshold=0"
    assert repr(module) == f"Linear8bitLt({size}, has_fp16_weights=True)"


class TestState:
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    @pytest.mark.parametrize("where", ["float", "int8", "meta"])
    @pytest.mark.parametrize("kind", [0, "row", None], ids=str)
    def test_a_checkpoint_of_theirs_round_trips(self, device, bias, where, kind):
        state = bitsandbytes_state(bias)
        place = "meta" if where == "meta" else device
        module = Linear8bitLt(IN, OUT, bias, has_fp16_weights=False, threshold=2.0, device=place)
        if where == "int8":
            module(X.to(device))
        given = {k: v.clone() for k, v in state.items() if k != "weight_format"}
        if kind is not None:
            given["weight_format"] = state["weight_format"] if kind == 0 else kind
        module.load_state_dict(given, assign=where == "meta")
        module = module.to(device)
        saved = module.state_dict()
        assert list(saved) == list(state)
        loaded = load(save(saved))
        for name, tensor in state.items():
            assert loaded[name].shape == tensor.shape
            if where == "meta" or name != "bias":  # else in the module's own dtype, as always
                assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor.to(loaded[name].dtype))
        bias = state.get("bias")
        y = fastq.llm_int8_matmul(
            *(X, state["weight"], state["SCB"] / 127),
            threshold=2.0,
            bias=None if bias is None else bias.float(),
        )
        torch.testing.assert_close(module(X.to(device)).cpu(), y, rtol=1e-5, atol=1e-5)

    def test_in_a_model(self, device):
        model = nn.ModuleDict({"a": nn.Sequential(make_module(device))})
        state = model.state_dict()
        assert list(state) == [f"a.0.{name}" for name in bitsandbytes_state()]
        other = nn.ModuleDict({"a": nn.Sequential(make_module(device, threshold=2.0))})
        other.load_state_dict({k: torch.zeros_like(v) for k, v in state.items()})
        other.load_state_dict(state)
        x = X.to(device)
        assert torch.equal(other["a"](x), model["a"](x))

    @pytest.mark.parametrize("kind", [1, 2, 3, "col_turing", torch.tensor(3, dtype=torch.uint8)])
    def test_other_formats(self, kind):
        module = make_module()
        with pytest.raises(ValueError, match=r"weight_format is 'col\w+', expected 'row'"):
            module.load_state_dict({**bitsandbytes_state(), "weight_format": kind})

    def test_a_float_state(self, device):
        """It is float until the module is moved or used, as theirs."""
        module = make_module(device)
        linear = make(IN, OUT, dtype=torch.float16)
        module.load_state_dict(linear.state_dict())
        assert list(module.state_dict()) == ["weight", "bias"]
        assert module.weight.dtype == torch.float16
        module(X.to(device))
        assert list(module.state_dict()) == ["weight", "bias", "SCB", "weight_format"]
        assert module.weight.dtype == torch.int8
        expected = bitsandbytes_state()
        assert torch.equal(module.SCB.cpu(), expected["SCB"])
        # Equal but where a quotient's last bit decides about a tie.
        assert (module.weight.cpu().int() - expected["weight"].int()).abs().max() <= 1

    @pytest.mark.cuda
    def test_a_move_quantises(self):
        for move in (lambda m: m.cuda(), lambda m: m.to(0), lambda m: m.to("cuda")):
            module = move(Linear8bitLt(IN, OUT, has_fp16_weights=False))
            assert module.weight.dtype == torch.int8
            assert module.SCB.is_cuda
            assert move(Linear8bitLt(IN, OUT)).weight.dtype == torch.float32

    def test_float_weights_stay(self, device):
        module = Linear8bitLt(IN, OUT, threshold=2.0).to(device)
        linear = make(IN, OUT, dtype=torch.float16)
        module.load_state_dict(linear.state_dict())
        x = X.to(device)
        y = module(x)
        assert list(module.state_dict()) == ["weight", "bias"]
        frozen = Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=2.0)
        frozen.load_state_dict(linear.state_dict())
        torch.testing.assert_close(y, frozen.to(device)(x), rtol=1e-6, atol=1e-6)
        with pytest.raises(RuntimeError, match="weight is int8, expected a float weight; give"):
            module.load_state_dict(bitsandbytes_state())
        assert torch.equal(module(x), y)

    def test_a_load_that_fails_loses_nothing(self, device):
        x = X.to(device)
        for module in (make_module(device), Linear8bitLt(IN, OUT, has_fp16_weights=False)):
            module = module.to(device)
            expected = copy.deepcopy(module)(x)
            state = {**bitsandbytes_state(), "bias": module.bias.clone()}
            with pytest.raises(RuntimeError, match="size mismatch for weight"):
                module.load_state_dict({**state, "weight": state["weight"][:, 1:]})
            assert torch.equal(module(x), expected)

    def test_without_scb(self):
        module = Linear8bitLt(IN, OUT, has_fp16_weights=False)
        state = bitsandbytes_state()
        del state["SCB"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"SCB"'):
            module.load_state_dict(state)
        module = Linear8bitLt(IN, OUT, has_fp16_weights=False)
        module.load_state_dict(state, strict=False)
        assert module(X).isnan().all()  # and no plausible numbers

    def test_copies_and_dtype_moves(self, device):
        module, x = make_module(device), X.to(device)
        expected = module(x)
        copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.double())
        for other in copies:
            assert torch.equal(other(x), expected)
            assert other.weight.stride() == (112, 1)
            assert other.SCB.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_forward_in_any_dtype(device, dtype):
    module, x = make_module(device), X.to(device, dtype)
    linear = make(IN, OUT, device=device, dtype=torch.float16)
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    for shape in ((), (5,), (1, 5)):
        y = module(x[0] if shape == () else x.view(*shape, IN))
        assert (y.shape, y.dtype) == ((*shape, OUT), dtype)
    assert (y - exact).norm() <= 0.02 * exact.norm()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(module(x), module(x.bfloat16()))


@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_compile(device, has_fp16_weights):
    torch._dynamo.reset()
    module = Linear8bitLt(IN, OUT, has_fp16_weights=has_fp16_weights, threshold=2.0).to(device)
    x = X.to(device)
    before = torch.compile(module, fullgraph=True)(x)
    torch.testing.assert_close(before, module(x), rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, fullgraph=True)(x), module(x))


def test_a_weight_that_requires_grad():
    module = Linear8bitLt(IN, OUT)
    module.weight.requires_grad_()
    with pytest.raises(ValueError, match="Linear8bitLt: weight requires grad, but it is frozen"):
        module(X)
    with torch.no_grad():
        module(X)


@pytest.mark.cuda
class TestBesideBitsandbytes:
    """The same checkpoint in both."""

    def pair(self, threshold: float, bias: bool = True) -> tuple[nn.Module, nn.Module]:
        bnb = pytest.importorskip("bitsandbytes")
        options = {"bias": bias, "has_fp16_weights": False, "threshold": threshold}
        theirs = bnb.nn.Linear8bitLt(256, 128, **options)
        theirs.load_state_dict(make(256, 128, bias, dtype=torch.float16).state_dict())
        theirs = theirs.half().cuda()
        ours = Linear8bitLt(256, 128, **options)
        ours.load_state_dict(theirs.state_dict())
        return ours.cuda(), theirs

    def draw(self, outliers: bool) -> torch.Tensor:
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).clamp(-5, 5)
        if outliers:
            x[:, [3, 70, 200]] += 30
        return x.half().cuda()

    def test_state_dicts(self):
        ours, theirs = self.pair(6.0)
        one, other = ours.state_dict(), theirs.state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name].cpu().to(t.dtype), t.cpu()) for name, t in other.items())
        theirs.load_state_dict(ours.state_dict())

    def test_without_outliers(self):
        """The same integers, but where 127 * x / absmax and x / (absmax / 127) round differently;
        then each rounds its output to float16 once or twice: eps / 2 is 0.0005 of it."""
        ours, theirs = self.pair(0.0)
        x = self.draw(outliers=False)
        with torch.no_grad():
            one, other = ours(x).float(), theirs(x).float()
        assert (one - other).norm() <= 2e-3 * other.norm()

    def test_with_outliers(self):
        """All of these three columns are outliers, to both; theirs are multiplied in float16."""
        ours, theirs = self.pair(6.0)
        x = self.draw(outliers=True)
        with torch.no_grad():
            one, other = ours(x).float(), theirs(x).float()
        assert (one - other).norm() <= 4e-3 * other.norm()
        weight = ours.weight.double() * ours.SCB.double()[:, None] / 127
        exact = x.double() @ weight.t() + ours.bias.double()
        assert (one - exact).norm() <= 1.05 * (other - exact).norm()

    def test_gradient(self):
        """Both dequantise the weight to float16 (theirs rounds the factor first) and multiply."""
        ours, theirs = self.pair(6.0)
        grads = []
        for module in (ours, theirs):
            x = self.draw(outliers=True).requires_grad_()
            module(x).backward(torch.ones(64, 128, device="cuda").half())
            grads.append(x.grad.float())
        assert (grads[0] - grads[1]).norm() <= 2e-3 * grads[1].norm()
