"""Int8Linear and quantize: values against NumPy, and everything a module must survive."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import reference
from fastq.nn import Int8Linear
from fastq.quantization import quantize


def expected_output(x: torch.Tensor, linear: nn.Linear, rotation: int = 0) -> np.ndarray:
    """What W8A8 gives, every rounding included."""
    q, s = map(torch.from_numpy, reference.quantize(x, rotation))
    weight, weight_scale = map(torch.from_numpy, reference.quantize(linear.weight, rotation))
    bias = None if linear.bias is None else linear.bias.cpu().float()
    weight_scale = weight_scale / max(rotation, 1)
    return reference.int8_gemm(q, weight.t(), s, weight_scale, bias, x.dtype)


def make(in_features=100, out_features=37, bias=True, device="cpu", dtype=torch.float32):
    torch.manual_seed(in_features + out_features)
    # Drawn on the CPU: each device has a generator of its own.
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    return linear.to(device).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("shape", "out_features"),
    [
        ((4, 64), 32),
        ((100,), 37),
        ((1, 100), 37),
        ((2, 3, 5, 100), 37),
        ((0, 100), 37),
        ((3, 1), 1),
    ],
    ids=str,
)
def test_forward(device, dtype, bias, shape, out_features):
    linear = make(shape[-1], out_features, bias, device, dtype)
    x = torch.randn(shape, dtype=dtype, device=device)
    y = Int8Linear.from_float(linear)(x)
    assert y.shape == (*shape[:-1], out_features)
    assert y.dtype == dtype
    assert y.device.type == device.type
    rows = expected_output(x.reshape(-1, shape[-1]), linear)
    reference.assert_same(y, rows.reshape(y.shape))


def test_close_to_float(device):
    linear = make(256, 128, device=device)
    x = torch.randn(64, 256, device=device)
    y, exact = Int8Linear.from_float(linear)(x), linear(x)
    assert (y - exact).pow(2).mean().sqrt() <= 0.02 * exact.pow(2).mean().sqrt()


def test_strided_input(device):
    module = Int8Linear.from_float(make(device=device))
    x = torch.randn(100, 6, device=device)
    assert torch.equal(module(x.t()), module(x.t().contiguous()))
    wide = torch.randn(6, 250, device=device)
    assert torch.equal(module(wide[:, 3:103]), module(wide[:, 3:103].clone()))


def test_a_row_does_not_depend_on_its_batch(device):
    module = Int8Linear.from_float(make(device=device))
    x = torch.randn(33, 100, device=device)
    whole = module(x)
    assert torch.equal(whole, torch.cat([module(row[None]) for row in x]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_show(device, value):
    module = Int8Linear.from_float(make(device=device))
    x = torch.randn(3, 100, device=device)
    x[1, 7] = value
    y = module(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_from_float_leaves_the_linear_alone():
    linear = make()
    before = copy.deepcopy(linear.state_dict())
    module = Int8Linear.from_float(linear)
    module(torch.randn(2, 100))
    module.bias.zero_()
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())


def test_buffers_and_repr(device):
    module = Int8Linear.from_float(make(device=device))
    assert dict(module.named_parameters()) == {}
    assert module.weight.dtype == torch.int8
    assert module.weight.shape == (37, 100)
    assert module.weight_scale.shape == module.bias.shape == (37,)
    assert module.weight_scale.dtype == module.bias.dtype == torch.float32
    assert repr(module) == "Int8Linear(in_features=100, out_features=37, bias=True, scheme=w8a8)"
    weight, weight_scale = reference.quantize(make().weight)
    reference.assert_same(module.weight, weight)
    reference.assert_same(module.weight_scale, weight_scale)


class TestState:
    """The state is the plain weight, whether or not the module has run (and packed it)."""

    X = torch.randn(5, 100, generator=torch.Generator().manual_seed(3))

    @pytest.fixture(params=["fresh", "used"])
    def module(self, request, device) -> Int8Linear:
        module = Int8Linear.from_float(make(device=device))
        if request.param == "used":
            module(self.X.to(device))
        return module

    @pytest.fixture
    def expected(self, device) -> torch.Tensor:
        return Int8Linear.from_float(make(device=device))(self.X.to(device))

    def test_one_copy_of_the_weight(self, module, device):
        module(self.X.to(device))
        size = sum(buffer.nbytes for buffer in module.buffers())
        # The packed form may pad each dimension to a block of the kernel.
        assert size <= 128 * 64 + 2 * 37 * 4

    def test_state_dict(self, module):
        state = module.state_dict()
        assert list(state) == ["weight", "weight_scale", "bias"]
        reference.assert_same(state["weight"], reference.quantize(make().weight)[0])
        assert torch.equal(module.weight, state["weight"])

    def test_load_state_dict(self, module, device):
        other = nn.Linear(100, 37, device=device).requires_grad_(False)
        module.load_state_dict(Int8Linear.from_float(other).state_dict())
        x = self.X.to(device)
        assert torch.equal(module(x), Int8Linear.from_float(other)(x))

    @pytest.mark.parametrize("assign", [False, True])
    def test_load_into_an_empty_module(self, module, expected, device, assign):
        empty = Int8Linear(100, 37, device=device)
        empty(self.X.to(device))
        empty.load_state_dict(module.state_dict(), assign=assign)
        assert torch.equal(empty(self.X.to(device)), expected)

    def test_load_into_a_meta_module(self, module, expected, device):
        empty = Int8Linear(100, 37, device="meta")
        empty.load_state_dict(module.state_dict(), assign=True)
        assert torch.equal(empty(self.X.to(device)), expected)

    def test_a_load_that_fails_loses_nothing(self, module, expected, device):
        state = module.state_dict()
        state["weight"] = state["weight"][:, :99]
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            module.load_state_dict(state)
        assert torch.equal(module(self.X.to(device)), expected)

    def test_a_partial_load_keeps_the_weight(self, module, expected, device):
        state = {"weight_scale": 2 * module.weight_scale, "bias": 2 * module.bias}
        module.load_state_dict(state, strict=False)
        torch.testing.assert_close(module(self.X.to(device)), 2 * expected)

    def test_save_and_load(self, module, expected, device):
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        fresh = Int8Linear(100, 37, device=device)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(fresh(self.X.to(device)), expected)

    def test_deepcopy(self, module, expected, device):
        assert torch.equal(copy.deepcopy(module)(self.X.to(device)), expected)

    def test_pickle(self, module, expected, device):
        assert torch.equal(pickle.loads(pickle.dumps(module))(self.X.to(device)), expected)

    def test_dtype_moves_leave_scales_in_float32(self, module, expected, device):
        module.half().to(torch.bfloat16)
        assert module.weight_scale.dtype == module.bias.dtype == torch.float32
        assert torch.equal(module(self.X.to(device)), expected)

    @pytest.mark.cuda
    def test_moves_between_devices(self, module, expected, device):
        other = "cpu" if device.type == "cuda" else "cuda"
        moved = module.to(other)(self.X.to(other))
        torch.testing.assert_close(moved.cpu(), expected.cpu(), rtol=1e-6, atol=1e-6)
        assert torch.equal(module.to(device)(self.X.to(device)), expected)

    def test_an_assigned_weight_counts(self, module, device):
        module.weight = torch.zeros(37, 100, dtype=torch.int8, device=device)
        x = self.X.to(device)
        assert torch.equal(module(x), module.bias.expand(5, -1))

    def test_inference_mode_then_not(self, module, expected, device):
        with torch.inference_mode():
            module(self.X.to(device))
        assert torch.equal(module(self.X.to(device)), expected)
        assert torch.equal(copy.deepcopy(module)(self.X.to(device)), expected)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, module, expected, device, dynamic):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
        assert torch.equal(compiled(self.X.to(device)), expected)
        assert torch.equal(compiled(self.X[:3].to(device)), expected[:3])


def test_pack(device):
    module = Int8Linear.from_float(make(device=device))
    assert module.pack() is module
    assert (module._packed is not None) == (device.type == "cpu")
    assert "_packed" not in module.state_dict()


class TestBadInput:
    def test_last_size(self, device):
        module = Int8Linear.from_float(make(device=device))
        with pytest.raises(ValueError, match=r"x has shape \(2, 99\), expected \(\.\.\., 100\)"):
            module(torch.randn(2, 99, device=device))

    def test_scalar(self):
        with pytest.raises(ValueError, match=r"x has shape \(\), expected \(\.\.\., 100\)"):
            Int8Linear(100, 3)(torch.tensor(1.0))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64], ids=str)
    def test_dtype(self, dtype):
        with pytest.raises(TypeError, match=f"x has dtype {dtype}, expected one of float32"):
            Int8Linear(4, 3)(torch.ones(2, 4, dtype=dtype))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scheme": "w8a16"}, "scheme is 'w8a16', expected one of 'w8a8', 'w8a8_t"),
            ({"scheme": "w8a8_static"}, "input_scale is None, expected a positive number"),
            ({"input_scale": 0.1}, "input_scale is 0.1, expected None with scheme='w8a8'"),
            ({"scheme": "w8a8_static", "input_scale": 0.0}, "expected one positive number"),
            ({"scheme": "w8a8_static", "input_scale": torch.ones(2)}, "expected one positive"),
            ({"smooth": torch.ones(99)}, r"smooth has shape \(99,\), expected \(100,\)"),
            ({"smooth": torch.zeros(100)}, "smooth has elements that are not positive and finite"),
        ],
        ids=str,
    )
    def test_from_float_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            Int8Linear.from_float(make(), **options)

    @pytest.mark.cuda
    @pytest.mark.parametrize(("here", "there"), [("cpu", "cuda"), ("cuda", "cpu")])
    def test_device_mix(self, here, there):
        module = Int8Linear.from_float(make(device=here))
        with pytest.raises(TypeError, match=f"x is on {there}.*expected {here}"):
            module(torch.randn(2, 100, device=there))

    @pytest.mark.parametrize("what", [nn.Conv1d(2, 2, 1), nn.Linear(2, 2).weight, None])
    def test_from_float_of_something_else(self, what):
        with pytest.raises(TypeError, match=r"linear is a \w+, expected a torch\.nn\.Linear"):
            Int8Linear.from_float(what)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"query": nn.Linear(16, 16), "key": nn.Linear(16, 16)})
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.attention["query"](x) + self.attention["key"](x))))


def make_blocks(device="cpu") -> nn.Sequential:
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(), Block(), nn.LayerNorm(16))
    blocks.lm_head = nn.Linear(16, 50)
    return blocks.to(device).requires_grad_(False)


def quantised_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}


class TestQuantize:
    ALL = {f"{i}.{n}" for i in (0, 1) for n in ("attention.query", "attention.key", "up", "down")}

    def test_replaces_in_place(self, device):
        model = make_blocks(device)
        x = torch.randn(3, 16, device=device)
        expected = model[0](x)
        assert quantize(model) is model
        assert quantised_names(model) == self.ALL
        assert isinstance(model.lm_head, nn.Linear)
        y = model[0](x)
        assert (y - expected).abs().max() <= 0.05 * expected.abs().max()

    @pytest.mark.parametrize(
        ("skip", "kept"),
        [
            ([], set()),
            (["lm_head"], {"lm_head"}),
            (["1"], {"1.attention.query", "1.attention.key", "1.up", "1.down"}),
            (["down"], {"0.down", "1.down"}),
            (["attention"], {f"{i}.attention.{n}" for i in (0, 1) for n in ("query", "key")}),
            (["0.*"], {"0.attention.query", "0.attention.key", "0.up", "0.down"}),
            (["*.key", "up"], {"0.attention.key", "1.attention.key", "0.up", "1.up"}),
            (("own",), None),
        ],
        ids=str,
    )
    def test_skip(self, skip, kept):
        model = make_blocks()
        if kept is None:
            with pytest.raises(ValueError, match="skip holds 'own', which matches no module"):
                quantize(model, skip=skip)
            assert quantised_names(model) == set()
        else:
            quantize(model, skip=skip)
            assert quantised_names(model) == (self.ALL | {"lm_head"}) - kept

    @pytest.mark.parametrize("rotation", [0, 8])
    def test_rotation(self, device, rotation):
        model = quantize(make_blocks(device), rotation=rotation)
        assert quantised_names(model) == self.ALL
        marks = {module._rotation for module in model.modules() if isinstance(module, Int8Linear)}
        assert marks == {rotation}
        x = torch.randn(3, 16, device=device)
        exact = make_blocks(device)[0](x)
        assert (model[0](x) - exact).abs().max() <= 0.05 * exact.abs().max()
        other = quantize(make_blocks(device), rotation=8)
        if rotation == 8:
            other.load_state_dict(model.state_dict())
        else:
            with pytest.raises(RuntimeError, match=r"0\.up\.weight was quantised with rotation 0"):
                other.load_state_dict(model.state_dict())

    def test_a_layer_that_the_rotation_does_not_divide(self):
        """down has 24 features; nothing is replaced before the error."""
        model = make_blocks()
        message = r"0\.down has in_features = 24, expected a multiple of rotation = 16.* skip"
        with pytest.raises(ValueError, match=message):
            quantize(model, rotation=16)
        assert quantised_names(model) == set()
        quantize(model, rotation=16, skip=["down", "lm_head"])
        assert quantised_names(model) == {name for name in self.ALL if "down" not in name}

    def test_a_single_linear(self):
        module = quantize(make())
        assert isinstance(module, Int8Linear)

    def test_a_shared_layer_stays_shared(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        model.append(model[0])
        quantize(model)
        assert isinstance(model[0], Int8Linear)
        assert model[0] is model[2]

    def test_twice_changes_nothing_more(self):
        model = quantize(make_blocks(), skip=["0", "lm_head"])
        first = model[1].up
        quantize(model, skip=["lm_head"])
        assert model[1].up is first
        assert quantised_names(model) == self.ALL

    def test_subclasses_stay(self):
        attention = nn.MultiheadAttention(16, 2, batch_first=True)
        model = nn.ModuleDict({"attention": attention, "up": nn.Linear(16, 16)})
        quantize(model)
        assert quantised_names(model) == {"up"}
        x = torch.randn(1, 3, 16)
        with torch.no_grad():
            assert attention(x, x, x)[0].shape == (1, 3, 16)

    def test_training_flag_is_kept(self):
        model = quantize(make_blocks().eval())
        assert not any(module.training for module in model.modules())

    def test_state_dict_round_trip(self, device):
        model = quantize(make_blocks(device))
        x = torch.randn(3, 16, device=device)
        expected = model[1](x)
        other = quantize(make_blocks(device).apply(self._scramble))
        assert not torch.equal(other[1](x), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other[1](x), expected)

    @staticmethod
    def _scramble(module):
        if isinstance(module, nn.Linear):
            module.weight.uniform_(-1, 1)

    def test_compile(self, device):
        torch._dynamo.reset()
        model = quantize(make_blocks(device))
        x = torch.randn(3, 16, device=device)
        expected = model[0](x)
        torch.testing.assert_close(torch.compile(model[0], fullgraph=True)(x), expected)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: quantize(torch.ones(2)), TypeError, "model is a Tensor, expected"),
            (
                lambda: quantize(make(), "w4a16"),
                ValueError,
                "scheme is 'w4a16', expected one of 'w8a8', ",
            ),
            (lambda: quantize(nn.ReLU()), ValueError, r"ReLU has no torch\.nn\.Linear to quantise"),
            (lambda: quantize(make_blocks(), skip="up"), TypeError, "skip is the string 'up'"),
            (
                lambda: quantize(make_blocks(), skip=["0", "1", "lm_head"]),
                ValueError,
                "to quantise outside of skip",
            ),
            (
                lambda: quantize(make_blocks().double()),
                TypeError,
                r"0\.attention\.query has a weight of dtype torch\.float64",
            ),
            (
                lambda: quantize(nn.TransformerEncoderLayer(16, 2)),
                NotImplementedError,
                "fused inference path",
            ),
        ],
    )
    def test_bad_input(self, call, error, message):
        with pytest.raises(error, match=message):
            call()
