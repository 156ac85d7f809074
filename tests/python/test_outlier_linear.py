"""OutlierLinear: LLM.int8() as a module, its state, its padded weight, and quantize by it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import fastq
from fastq.nn import Int8Linear, OutlierLinear
from test_nn import make

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IN, OUT = 100, 37  # rows that are not a multiple of 16 bytes
COLUMNS = [5, 40, 99]


def draw(*shape: int) -> torch.Tensor:
    """Activations with outliers in COLUMNS."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).clamp(-5, 5)
    x[..., COLUMNS] += 40 * x[..., COLUMNS].sign()
    return x


def make_module(device="cpu", kept=True, dtype=torch.float32, **options) -> OutlierLinear:
    if kept:
        options |= {"keep_outlier_weights": True, "outlier_columns": COLUMNS}
    return OutlierLinear.from_float(make(IN, OUT, device=device, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("shape", [(4,), (), (2, 3, 5), (0,)], ids=str)
def test_forward(device, dtype, kept, shape):
    """The function's own result: that is tested against the formula in test_llm_int8_matmul.py."""
    linear = make(IN, OUT, device=device, dtype=dtype)
    module = make_module(device, kept, dtype)
    x = draw(*shape, IN).to(device, dtype)
    y = module(x)
    assert (y.shape, y.dtype) == ((*shape, OUT), dtype)
    columns = torch.tensor(COLUMNS, device=device)
    weights = {
        "outlier_columns": columns.int(),
        "outlier_weight": linear.weight[:, columns].contiguous(),
    }
    q, scale = fastq.quantize_per_channel(linear.weight)
    expected = fastq.llm_int8_matmul(
        x.reshape(-1, IN), q, scale, bias=linear.bias.float(), **(weights if kept else {})
    )
    assert torch.equal(y, expected.view(y.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_closer_to_float_than_w8a8(device, dtype):
    linear, x = make(IN, OUT, device=device, dtype=dtype), draw(64, IN).to(device, dtype)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    kept, apart, plain = (
        (module(x) - exact).norm()
        for module in (
            make_module(device, True, dtype),
            make_module(device, False, dtype),
            Int8Linear.from_float(linear),
        )
    )
    assert kept < apart < plain / 2


def test_threshold_0_has_no_outliers(device):
    x = draw(4, IN).to(device)
    plain = Int8Linear.from_float(make(IN, OUT, device=device))
    module = make_module(device, kept=False, threshold=0)
    torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-5)


def test_find_outlier_columns(device):
    found = OutlierLinear.find_outlier_columns(draw(3, 4, IN).to(device))
    assert found.dtype == torch.int32
    assert found.tolist() == COLUMNS
    assert OutlierLinear.find_outlier_columns(torch.full((2, 3), 6.0)).tolist() == [0, 1, 2]
    assert OutlierLinear.find_outlier_columns(torch.zeros(2, 3)).tolist() == []
    module = OutlierLinear.from_float(
        make(IN, OUT, device=device), keep_outlier_weights=True, outlier_columns=found
    )
    assert torch.equal(module(draw(4, IN).to(device)), make_module(device)(draw(4, IN).to(device)))


def test_columns_are_sorted_and_may_be_none(device):
    linear, x = make(IN, OUT, device=device), draw(4, IN).to(device)
    other = OutlierLinear.from_float(
        linear, keep_outlier_weights=True, outlier_columns=torch.tensor(COLUMNS[::-1])
    )
    assert torch.equal(other(x), make_module(device)(x))
    assert other.outlier_columns.tolist() == COLUMNS
    empty = OutlierLinear.from_float(linear, keep_outlier_weights=True, outlier_columns=[])
    assert torch.equal(empty(x), make_module(device, kept=False)(x))


def test_buffers_and_repr(device):
    module = make_module(device, dtype=torch.float16)
    assert dict(module.named_parameters()) == {}
    assert (module.weight.dtype, module.weight.shape) == (torch.int8, (OUT, IN))
    assert module.weight_scale.dtype == module.bias.dtype == torch.float32
    assert module.outlier_weight.dtype == torch.float16
    size = "in_features=100, out_features=37, bias=True, scheme=llm_int8, threshold=6"
    assert repr(module) == f"OutlierLinear({size}, kept_columns=3)"
    assert repr(make_module(kept=False)) == f"OutlierLinear({size})"


class TestPadding:
    """Rows begin at multiples of 16 bytes, whatever happens to the module; nobody else sees it."""

    def check(self, module: OutlierLinear) -> None:
        assert module.weight.stride() == (112, 1)
        expected = make_module(module.weight.device)
        assert torch.equal(module.weight, expected.weight)
        x = draw(3, IN).to(module.weight.device)
        assert torch.equal(module(x), expected(x))

    def test_it_lasts(self, device):
        module = make_module(device)
        self.check(module)
        self.check(copy.deepcopy(module))
        self.check(pickle.loads(pickle.dumps(module)))
        self.check(module.half())
        state = module.state_dict()
        assert state["weight"].is_contiguous()
        for where, assign in ((device, False), (device, True), ("meta", True)):
            other = OutlierLinear(IN, OUT, device=where)
            other.load_state_dict(state, assign=assign)
            self.check(other)
        module.weight = state["weight"]
        module(draw(3, IN).to(device))
        self.check(module)

    @pytest.mark.cuda
    def test_moves(self):
        self.check(make_module("cpu").cuda())
        self.check(make_module("cuda").cpu())

    def test_a_multiple_of_16_is_left_alone(self):
        assert OutlierLinear(32, 3).weight.stride() == (32, 1)


class TestState:
    X = draw(5, IN)

    @pytest.mark.parametrize("kept", [False, True])
    @pytest.mark.parametrize("own", [None, [1, 2], [1, 2, 3]], ids=str)
    def test_safetensors(self, device, kept, own):
        """The state's columns count, not those that the module had."""
        module, x = make_module(device, kept, torch.bfloat16), self.X.to(device, torch.bfloat16)
        state = module.state_dict()
        extra = ["outlier_columns", "outlier_weight"] if kept else []
        assert list(state) == ["weight", "weight_scale", "bias", *extra]
        options = {"keep_outlier_weights": own is not None, "outlier_columns": own}
        other = OutlierLinear.from_float(make(IN, OUT, device=device), **options)
        other.load_state_dict(load(save(state)))
        assert torch.equal(other(x), module(x))
        assert other.state_dict().keys() == state.keys()
        if kept:
            assert other.outlier_weight.dtype == torch.bfloat16

    def test_a_load_that_fails_loses_nothing(self, device):
        module, x = make_module(device), self.X.to(device)
        expected = module(x)
        for name in ("weight", "outlier_weight"):
            state = make_module(device).state_dict()
            state[name] = state[name][1:]
            with pytest.raises(RuntimeError, match=f"size mismatch for {name}|{name} have shapes"):
                module.load_state_dict(state)
        assert torch.equal(module(x), expected)

    def test_dtype_moves_leave_buffers_alone(self, device):
        module, x = make_module(device), self.X.to(device)
        expected = module(x)
        assert torch.equal(module.half().to(torch.bfloat16)(x), expected)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, device, dynamic):
        torch._dynamo.reset()
        module, x = make_module(device), self.X.to(device)
        compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
        assert torch.equal(compiled(x), module(x))
        assert torch.equal(compiled(x[:3]), module(x)[:3])

    def test_inference_mode_then_not(self, device):
        x = self.X.to(device)
        with torch.inference_mode():
            module = make_module(device)
            expected = module(x)
        assert torch.equal(make_module(device)(x), expected)


class TestQuantize:
    def model(self, device) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(IN, 24), nn.ReLU(), nn.Linear(24, 8))
        return model.to(device).requires_grad_(False)

    def test_replaces(self, device):
        x = draw(4, IN).to(device)
        exact = self.model(device)(x)
        model = fastq.quantize(self.model(device), "llm_int8", threshold=5.0)
        assert [type(m) for m in model] == [OutlierLinear, nn.ReLU, OutlierLinear]
        assert model[0].threshold == 5.0
        assert (model(x) - exact).norm() <= 0.02 * exact.norm()
        other = fastq.quantize(self.model(device), scheme="llm_int8")
        assert other[0].threshold == 6.0
        other.load_state_dict(load(save(model.state_dict())))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"threshold": 6.0}, ValueError, "threshold is given, expected it with scheme='llm"),
            ({"scheme": "llm_int8", "rotation": 8}, ValueError, "rotation is 8, expected 0 with"),
            ({"scheme": "llm_int8", "threshold": -1}, ValueError, "threshold is -1, expected 0"),
            ({"scheme": "llm_int8", "threshold": "6"}, TypeError, "threshold is a str, expected"),
            ({"scheme": "int8"}, ValueError, "scheme is 'int8', expected one of 'w8a8', 'w8a8_t"),
        ],
        ids=str,
    )
    def test_bad_input(self, options, error, message):
        with pytest.raises(error, match=message):
            fastq.quantize(self.model("cpu"), **options)


class TestBadInput:
    def test_x(self, device):
        module = make_module(device)
        with pytest.raises(ValueError, match=r"OutlierLinear: x has shape \(2, 99\), expected"):
            module(torch.randn(2, 99, device=device))
        with pytest.raises(TypeError, match=r"OutlierLinear: x has dtype torch\.float64"):
            module(torch.randn(2, IN, device=device, dtype=torch.float64))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"keep_outlier_weights": True}, ValueError, "need each other"),
            ({"outlier_columns": [1]}, ValueError, "need each other"),
            ({"outlier_columns": [1, 1]}, ValueError, r"is \[1, 1\], expected distinct columns"),
            ({"outlier_columns": [100]}, ValueError, "expected distinct columns from 0 to 99"),
            ({"outlier_columns": [-1]}, ValueError, "expected distinct columns from 0 to 99"),
            ({"outlier_columns": [[1]]}, ValueError, "expected distinct columns"),
            ({"outlier_columns": [0.5]}, TypeError, "outlier_columns has dtype torch.float32"),
            ({"threshold": float("nan")}, ValueError, "threshold is nan, expected 0"),
            ({"threshold": None}, TypeError, "threshold is a NoneType, expected a number"),
        ],
        ids=str,
    )
    def test_from_float(self, options, error, message):
        columns = options.get("outlier_columns")
        if columns is not None and columns != [1]:
            options = {"keep_outlier_weights": True, **options}
        with pytest.raises(error, match=message):
            OutlierLinear.from_float(make(), **options)
        with pytest.raises(TypeError, match="linear is a ReLU"):
            OutlierLinear.from_float(nn.ReLU())
