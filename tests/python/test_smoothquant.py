"""SmoothQuant: the smoothing factor, folding into norms, static scales, and the search for alpha.

The oracle is the formula in NumPy, on inputs that hooks saw in the float model.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import reference
from decoders import BLOCKS, assert_unchanged, linear_inputs, make_decoder, snapshot, token_batches
from fastq.nn import Int8Linear, OutlierLinear
from fastq.quantization import quantize
from fastq.quantization.planning import Options, make_plans
from fastq.quantization.selection import select
from fastq.quantization.smoothing import ALPHAS, folded_norm

LEVELS = {
    "smoothquant_o1": "w8a8",
    "smoothquant_o2": "w8a8_tensor",
    "smoothquant_o3": "w8a8_static",
}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")


def groups_of(layer: int) -> list[tuple[str, tuple[str, ...]]]:
    prefix = f"model.layers.{layer}."
    return [
        (prefix + "input_layernorm", tuple(prefix + name for name in ATTENTION)),
        (prefix + "post_attention_layernorm", tuple(prefix + name for name in MLP)),
    ]


def formula(x: torch.Tensor, weights: list[torch.Tensor], alpha: float) -> np.ndarray:
    """s of the paper's equation 4, in float64."""
    x_max = np.abs(x.double().numpy()).max(0)
    w_max = np.max([np.abs(w.double().cpu().numpy()).max(0) for w in weights], axis=0)
    return x_max**alpha / w_max ** (1 - alpha)


def module_with_norm(device: torch.device | str = "cpu", norm: type = nn.LayerNorm) -> nn.Module:
    """A norm, two linears that read it, one that reads theirs."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm(32)
            self.a, self.b = nn.Linear(32, 48), nn.Linear(32, 48, bias=False)
            self.c = nn.Linear(48, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            return self.c(torch.relu(self.a(h)) * self.b(h))

    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    with torch.no_grad():
        for tensor in block.norm.parameters():
            tensor.uniform_(-1.5, 1.5)
            tensor[5] *= 40
    return block.to(device)


def batches_of(module: nn.Module, count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    device = next(module.parameters()).device
    return [torch.randn(4, 7, 32, device=device) for _ in range(count)]


GROUPS = [("norm", ["a", "b"])]


class TestFactor:
    @pytest.mark.parametrize("alpha", [0.0, 0.35, 0.5, 1.0])
    def test_formula(self, device, alpha):
        model = make_decoder(device)
        batches = token_batches(device=device)
        inputs = linear_inputs(model, batches)
        float_model = copy.deepcopy(model)
        quantize(model, "smoothquant_o1", calibration=batches, alpha=alpha)
        for layer in range(3):
            for norm, names in groups_of(layer):
                weights = [float_model.get_submodule(name).weight for name in names]
                s = formula(inputs[names[0]], weights, alpha)
                before = float_model.get_submodule(norm).weight.double().cpu().numpy()
                after = model.get_submodule(norm).weight.double().cpu().numpy()
                np.testing.assert_allclose(before / after, s, rtol=1e-4)
                for name, weight in zip(names, weights, strict=True):
                    module = model.get_submodule(name)
                    assert module.smooth is None
                    scaled = weight.double().cpu().numpy() * s
                    expected = np.abs(scaled).max(1) / 127
                    np.testing.assert_allclose(module.weight_scale.cpu(), expected, rtol=1e-4)

    def test_a_channel_of_zeros_stays(self):
        module = module_with_norm()
        with torch.no_grad():
            module.norm.weight[3] = module.norm.bias[3] = 0
            module.a.weight[:, 7] = module.b.weight[:, 7] = 0
        gain = module.norm.weight[7].item()
        module.requires_grad_(False)
        quantize(module, "smoothquant_o1", calibration=batches_of(module), groups=GROUPS)
        assert module.norm.weight[3] == 0
        assert module.norm.weight[7] == pytest.approx(gain, rel=1e-6)
        assert all(t.isfinite().all() for t in module.state_dict().values())


class TestFloatFunction:
    """Folded into norms and weights that stay float, smoothing changes nothing."""

    def fold(self, model, batches, **options):
        targets = select(
            model, "smoothquant_o1", ("lm_head",) if "groups" not in options else (), {}
        )
        plans = make_plans(model, targets, Options(**options), batches)
        with torch.no_grad():
            for folding in plans.foldings:
                norm = model.get_submodule(folding.norm)
                for name, value in folding.parameters.items():
                    setattr(norm, name, value)
                for linear in folding.linears.values():
                    linear.weight.copy_(linear.weight.float() * folding.factor)
        return plans

    @pytest.mark.parametrize("block", BLOCKS)
    @pytest.mark.parametrize("alpha", [0.3, 0.8, "search"])
    def test_decoder(self, device, alpha, block):
        model, batches = make_decoder(device, **BLOCKS[block]), token_batches(device=device)
        expected = model(batches[0])
        plans = self.fold(model, batches, alpha=alpha)
        assert len(plans.foldings) == (3 if block == "parallel_shared_norm" else 6)
        logits = model(batches[0])
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_layer_norm_with_bias(self, device):
        module = module_with_norm(device)
        batches = batches_of(module)
        expected = module(batches[0])
        self.fold(module, batches, groups=GROUPS)
        assert (module(batches[0]) - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_a_rounded_gain_is_made_up_for(self):
        """bfloat16 rounds the gain by up to 2^-9; with weights in float32 none of that is left."""
        module = module_with_norm().requires_grad_(False)
        module.norm.weight.copy_(module.norm.weight.bfloat16())
        module.norm.bias.zero_()
        (x,) = batches_of(module, 1)
        expected = module.a(module.norm(x))
        smooth = torch.rand(32) + 0.5
        parameters, factor = folded_norm(copy.deepcopy(module.norm).bfloat16(), smooth)
        assert parameters["weight"].dtype == torch.bfloat16
        assert (factor / smooth - 1).abs().max() < 2**-8
        assert not torch.equal(factor, smooth)
        module.norm.weight.copy_(parameters["weight"])
        module.a.weight *= factor
        got = module.a(module.norm(x))
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


class TestLevels:
    @pytest.mark.parametrize("scheme", LEVELS)
    def test_schemes_and_closeness(self, device, scheme):
        model, batches = make_decoder(device), token_batches(device=device)
        expected = model(batches[0])
        assert quantize(model, scheme, calibration=batches) is model
        kinds = {m.scheme for m in model.modules() if isinstance(m, Int8Linear)}
        assert kinds == {LEVELS[scheme]}
        assert isinstance(model.lm_head, nn.Linear)
        error = (model(batches[0]) - expected).norm() / expected.norm()
        assert error < 0.07

    def test_static_scales(self, device):
        """absmax / 127 of every linear's input after smoothing; o_proj and down_proj have none."""
        model, batches = make_decoder(device), token_batches(device=device)
        inputs = linear_inputs(model, batches)
        float_model = copy.deepcopy(model)
        quantize(model, "smoothquant_o3", calibration=batches, alpha=0.6)
        in_groups = {}
        for layer in range(3):
            for _, names in groups_of(layer):
                weights = [float_model.get_submodule(name).weight for name in names]
                in_groups |= dict.fromkeys(names, formula(inputs[names[0]], weights, 0.6))
        checked = 0
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear):
                x = inputs[name].double().numpy() / in_groups.get(name, 1.0)
                expected = np.abs(x).max() / 127
                assert module.input_scale.item() == pytest.approx(expected, rel=1e-4)
                checked += 1
        assert checked == 21

    def test_percentile(self):
        model, batches = make_decoder(), token_batches()
        inputs = linear_inputs(model, batches)
        quantize(model, "w8a8_static", calibration=batches, percentile=97.0)
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear):
                magnitudes = np.sort(np.abs(inputs[name].numpy()).ravel())  # 102 rows: all of them
                low, high = (magnitudes[int(len(magnitudes) * p)] / 127 for p in (0.968, 0.972))
                assert low <= module.input_scale.item() <= high
                assert module.input_scale.item() < magnitudes[-1] / 127

    def test_static_follows_the_reference(self, device):
        model, batches = make_decoder(device), token_batches(device=device)
        inputs, name = linear_inputs(model, batches), "model.layers.1.mlp.down_proj"
        weight = model.get_submodule(name).weight
        quantize(model, "w8a8_static", calibration=batches)
        x = inputs[name]
        scale = np.float32(np.abs(x.numpy()).max()) / np.float32(127)
        q, _, _ = reference.quantize_with(x.numpy(), scale=scale)
        w, w_scale = map(torch.from_numpy, reference.quantize(weight))
        expected = reference.int8_gemm(
            torch.from_numpy(q), w.t(), float(scale), w_scale, None, torch.float32
        )
        reference.assert_same(model.get_submodule(name)(x.to(device)), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_dtypes(self, device, dtype):
        model, batches = make_decoder(device, dtype), token_batches(device=device)
        expected = model(batches[0]).float()
        quantize(model, "smoothquant_o3", calibration=batches)
        assert model.model.layers[0].input_layernorm.weight.dtype == dtype
        assert (model(batches[0]).float() - expected).norm() < 0.09 * expected.norm()


class TestGroups:
    def test_each_layer_by_itself_without_a_norm(self, device):
        module = module_with_norm(device)
        batches = batches_of(module)
        inputs, weights = linear_inputs(module, batches), {}
        for name in "abc":
            weights[name] = module.get_submodule(name).weight.detach().clone()
        norm = module.norm.weight.clone()
        quantize(module, "smoothquant_o1", calibration=batches)
        assert torch.equal(module.norm.weight, norm)
        for name in "abc":
            s = formula(inputs[name], [weights[name]], 0.5)
            np.testing.assert_allclose(module.get_submodule(name).smooth.cpu(), s, rtol=1e-5)

    @pytest.mark.parametrize("norm", ["norm", None])
    def test_given(self, device, norm):
        module = module_with_norm(device)
        batches = batches_of(module)
        expected = module(batches[0])
        quantize(module, "smoothquant_o2", calibration=batches, groups=[(norm, ["a", "b"])])
        assert (module.a.smooth is None) == (norm is not None)
        assert module.c.smooth is None
        if norm is None:
            assert torch.equal(module.a.smooth, module.b.smooth)
        assert (module(batches[0]) - expected).norm() < 0.03 * expected.norm()

    @pytest.mark.parametrize("other", [None, "llm_int8", "w8a8_static"])
    def test_members_of_another_scheme_follow_the_norm(self, device, other):
        module = module_with_norm(device).requires_grad_(False)
        batches = batches_of(module)
        x = module.norm(batches[0])
        exact, own = module.b(x), module.b
        options = {"calibration": batches, "groups": GROUPS, "overrides": {"b": other}}
        quantize(module, "smoothquant_o1", **options)
        got = module.b(module.norm(batches[0]))
        if other is None:
            assert module.b is own
            assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()
        else:
            assert type(module.b) is (OutlierLinear if other == "llm_int8" else Int8Linear)
            assert (got - exact).norm() < 0.03 * exact.norm()

    def test_a_group_that_is_skipped_stays(self):
        module = module_with_norm()
        norm = copy.deepcopy(module.norm.state_dict())
        batches = batches_of(module)
        options = {"calibration": batches, "groups": [("norm", ["a", "b"]), (None, ["c"])]}
        quantize(module, "smoothquant_o1", ["a", "b"], **options)
        assert all(torch.equal(t, norm[name]) for name, t in module.norm.state_dict().items())
        assert module.c.smooth is not None

    @pytest.mark.parametrize(
        ("groups", "error", "message"),
        [
            ([("norm", "a")], TypeError, "groups holds the string 'a'"),
            ([("norm", ["x"])], ValueError, "groups names 'x', expected a module"),
            ([("scale", ["a"])], ValueError, "groups names 'scale', expected a module"),
            ([("norm", ["a", "a2"])], ValueError, "groups names 'a2', expected a module"),
            ([("norm", ["a", "c"])], ValueError, "groups joins a, c of in_features"),
            ([("norm", ["a"]), (None, ["a"])], ValueError, "groups holds a twice"),
            ([("norm", ["a"]), ("norm", ["b"])], ValueError, "groups holds norm twice"),
            ([("norm", ["c"])], ValueError, r"norm has a weight of shape \(32,\), expected .*48"),
            ([("a", ["norm"])], TypeError, "groups names norm, a LayerNorm, expected an nn.Linear"),
        ],
        ids=str,
    )
    def test_bad_groups(self, groups, error, message):
        module = module_with_norm()
        before = snapshot(module)
        with pytest.raises(error, match=message):
            quantize(module, "smoothquant_o1", calibration=batches_of(module), groups=groups)
        assert_unchanged(module, before)


class TestSearch:
    @pytest.mark.parametrize("scheme", LEVELS)
    def test_finds_the_best_of_the_grid(self, scheme):
        """Each alpha by itself, on all rows: the search's result is that of the best."""
        batches = batches_of(module_with_norm())
        errors, outputs = {}, {}
        for alpha in (*ALPHAS, "search"):
            module = module_with_norm()
            x = [module.norm(batch) for batch in batches]
            module.requires_grad_(False)
            exact = {name: [getattr(module, name)(h) for h in x] for name in "ab"}
            quantize(module, scheme, ["c"], calibration=batches, groups=GROUPS, alpha=alpha)
            errors[alpha], outputs[alpha] = 0.0, []
            for name in "ab":
                got = [getattr(module, name)(module.norm(batch)) for batch in batches]
                error = sum((g - e).square().sum() for g, e in zip(got, exact[name], strict=True))
                errors[alpha] += float(error / sum(e.square().sum() for e in exact[name]))
                outputs[alpha] += got
        best = min(errors[alpha] for alpha in ALPHAS)
        if scheme == "smoothquant_o2":  # by batch here, by sample there: not the same scales
            assert errors["search"] <= 1.2 * best
        else:
            assert errors["search"] == pytest.approx(best, rel=1e-2)

    def test_each_group_has_its_own(self):
        model, batches = make_decoder(), token_batches()
        float_model = copy.deepcopy(model)
        inputs = linear_inputs(model, batches)
        quantize(model, "smoothquant_o3", calibration=batches, alpha="search")
        found = []
        for layer in range(3):
            for norm, names in groups_of(layer):
                s = float_model.get_submodule(norm).weight / model.get_submodule(norm).weight
                weights = [float_model.get_submodule(name).weight for name in names]
                fits = [
                    alpha
                    for alpha in ALPHAS
                    if np.allclose(formula(inputs[names[0]], weights, alpha), s, rtol=1e-4)
                ]
                found += fits
        assert len(found) == 6


class TestUnchanged:
    @pytest.mark.parametrize("scheme", ["smoothquant_o1", "smoothquant_o3", "w8a8_static"])
    @pytest.mark.parametrize("after", [0, 1, 8, 20, 29])
    def test_interrupted(self, scheme, after):
        model, batches = make_decoder().train(), token_batches()
        before, calls = snapshot(model), []

        def interrupt(label, done, total):
            calls.append(done)
            if len(calls) > after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize(model, scheme, calibration=batches, on_progress=interrupt)
        assert_unchanged(model, before)
        assert model.training

    def test_interrupted_while_layers_are_made(self, monkeypatch):
        model, batches = make_decoder(), token_batches()
        before, made = snapshot(model), []
        from_float = Int8Linear.from_float

        def interrupt(*args, **kwargs):
            made.append(1)
            if len(made) == 15:
                raise KeyboardInterrupt
            return from_float(*args, **kwargs)

        monkeypatch.setattr(Int8Linear, "from_float", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, "smoothquant_o3", calibration=batches)
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "smoothquant_o1"}, "calibration is None, expected data with scheme='smoo"),
        ({"scheme": "w8a8_static"}, "calibration is None, expected data with scheme='w8a8_static'"),
        (
            {"scheme": "w8a8", "overrides": {"q_proj": "smoothquant_o2"}},
            "calibration is None, expected data with scheme='smoothquant_o2'",
        ),
        ({"scheme": "smoothquant"}, "scheme is 'smoothquant', expected one of 'w8a8', "),
        ({"scheme": "smoothquant_o1", "alpha": 1.5}, "alpha is 1.5, expected 'search' or a number"),
        ({"scheme": "smoothquant_o1", "alpha": "best"}, "alpha is 'best', expected 'search' or"),
        ({"scheme": "smoothquant_o3", "percentile": 0}, "percentile is 0, expected above 0"),
        ({"scheme": "smoothquant_o3", "rotation": 4}, "rotation is 4, expected 0 with scheme"),
        ({"scheme": "w8a8", "groups": []}, "groups is given, expected it with a smoothquant"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        quantize(make_decoder(), **options)
