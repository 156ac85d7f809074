"""The fused path of decoders in LLM.int8(): joint products whose results are the layers' own."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import fastq
from decoders import BLOCKS, make_decoder, token_batches
from fastq.evaluation.speed import weight_bytes
from fastq.nn import OutlierLinear, outlier_linear
from fastq.nn.joint_linear import JointOutlierLinear, why_not_joint_outliers
from fastq.runtime import CausalLM, load_model
from fastq.runtime.fused import why_not_fused
from test_fused_decoder import assert_close, by_modules, fused, run

THRESHOLD = 2.0  # the small decoders' norms give a few activations beyond
COLUMNS = [3, 20, 37]


def quantised(device="cpu", dtype=torch.float32, kept=True, **config) -> CausalLM:
    options = {"scheme": "llm_int8", "threshold": THRESHOLD}
    if kept:
        options |= {"calibration": token_batches(device=device), "keep_outlier_weights": True}
    return fastq.quantize(make_decoder(device, dtype, **config), **options)


def make_linears(
    device, dtype, kept: bool, biases=(True, False, True), k: int = 44
) -> list[OutlierLinear]:
    torch.manual_seed(4)
    columns = {"keep_outlier_weights": True, "outlier_columns": COLUMNS} if kept else {}
    linears = []
    for n, bias in zip((17, 5, 32), biases, strict=True):
        linear = torch.nn.Linear(k, n, bias=bias, device=device, dtype=dtype)
        linears.append(OutlierLinear.from_float(linear, **columns))
    return linears


def draw(device, dtype, k: int = 44) -> torch.Tensor:
    """Rows with outliers in kept columns and in another, and a row without."""
    x = torch.randn(2, 7, k, generator=torch.Generator().manual_seed(5)).clamp(-5, 5)
    x[:, :6, [*COLUMNS[:2], 11]] += 30
    return x.to(device, dtype)


@pytest.mark.parametrize("k", [44, 48])  # rows with padding and without
@pytest.mark.parametrize("biases", [(True, False, True), (False,) * 3], ids=str)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_joint_products_are_the_layers_own(device, dtype, kept, biases, k):
    linears, x = make_linears(device, dtype, kept, biases, k), draw(device, dtype, k)
    before = [linear(x) for linear in linears]
    states = [copy.deepcopy(linear.state_dict()) for linear in linears]
    joint = JointOutlierLinear(linears)
    assert joint.weight.shape == (sum(joint.sizes), k)
    parts = joint(x).split(joint.sizes, -1)
    assert all(map(torch.equal, parts, before))
    assert all(torch.equal(linear(x), y) for linear, y in zip(linears, before, strict=True))
    assert joint.is_current()  # a call finds rows as it wants them
    for linear, state in zip(linears, states, strict=True):
        after = linear.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_bits_of_the_modules(device, block, kept):
    """With relu, whose bits do not depend on strides as those of torch's silu on CPUs do."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = quantised(device, dtype, kept, **{**BLOCKS[block], "activation": "relu"})
    ids = token_batches(device=device)[0]
    mask = torch.arange(17, device=device) < torch.tensor([[17], [5]], device=device)

    @torch.no_grad()
    def logits():
        cache = model.new_cache(2, 20)
        steps = [model(ids), model(ids, cache, attention_mask=mask)]
        steps += [model(ids[:, i : i + 1], cache) for i in range(2)]
        return torch.cat([steps[0], *(step[:, -1:] for step in steps[1:])], dim=1)

    assert torch.equal(fused(model, logits), by_modules(model, logits))


def test_silu(device):
    model = quantised(device)
    assert_close(fused(model, partial(run, model)), by_modules(model, partial(run, model)))


def test_four_products_a_layer(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args[1].shape[0])
        return fastq.llm_int8_matmul(*args, **options)

    monkeypatch.setattr(outlier_linear, "llm_int8_matmul", counted)
    model = quantised()
    fused(model, partial(run, model))
    # Heads of 10, 4 for q and 2 each for k and v; then o, gate and up, down; and lm_head.
    layers = [n for n in calls if n != model.config.vocab_size]
    assert layers == [80, 40, 104, 40] * 3


class TestStillAModel:
    def test_every_weight_is_there_once(self, device):
        model = quantised(device, qkv_bias=True)
        before = weight_bytes(model)
        fused(model, partial(run, model))
        assert weight_bytes(model) <= before

        def storages(tensors):
            return {t.untyped_storage().data_ptr() for t in tensors if t is not None}

        held = storages(model.buffers())
        for layer in model._fused._layers:
            for joint in layer.joints:
                names = ("weight", "weight_scale", "bias", "outlier_columns", "outlier_weight")
                assert storages(getattr(joint, name) for name in names) <= held

    def test_its_state_is_as_before(self, device):
        model = quantised(device, qkv_bias=True)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fused(model, partial(run, model))
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_saving_and_loading(self, tmp_path):
        """The format has no kept columns."""
        model = quantised(kept=False)
        fastq.save_quantized(model, tmp_path / "before")
        expected = fused(model, partial(run, model))
        fastq.save_quantized(model, tmp_path / "after")
        files = [f.read_bytes() for f in sorted((tmp_path / "before").glob("*.safetensors"))]
        assert files == [f.read_bytes() for f in sorted((tmp_path / "after").glob("*.safetensors"))]
        loaded = load_model(tmp_path / "after")
        assert torch.equal(fused(loaded, partial(run, loaded)), expected)

    @pytest.mark.parametrize("kept", [False, True])
    def test_loading_a_state(self, device, kept):
        """Also one that has other kept columns, or none."""
        model, other = quantised(device, kept=kept), quantised(device)
        expected = fused(model, partial(run, model))
        for module in other.modules():
            if isinstance(module, OutlierLinear):
                module.weight_scale.mul_(3)
        assert not torch.equal(fused(other, partial(run, other)), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(fused(other, partial(run, other)), expected)

    def test_copies_and_moves(self, device):
        model = quantised()
        expected = fused(model, partial(run, model))
        other = copy.deepcopy(model)
        model.model.layers[1].mlp.up_proj.weight_scale.zero_()
        assert not torch.equal(fused(model, partial(run, model)), expected)
        other.to(device)
        assert_close(fused(other, partial(run, other)).cpu(), expected)

    def test_another_threshold(self):
        model, other = quantised(), quantised()
        fused(model, partial(run, model))
        layer = model.model.layers[1]
        layer.mlp.down_proj.threshold = other.model.layers[1].mlp.down_proj.threshold = 0.5
        assert torch.equal(
            fused(model, partial(run, model)),
            fused(other, partial(run, other)),
        )
        layer.mlp.up_proj.threshold = 5.0
        run(model)
        assert model._fused is None
        assert model._why_not_fused == (
            "model.layers.1.mlp.up_proj has threshold 5, expected 2 as model.layers.1.mlp."
            "gate_proj, which reads the same input"
        )


class TestReasons:
    def test_a_layer_in_float(self):
        model = fastq.quantize(make_decoder(), "llm_int8", skip=["layers.1.mlp.up_proj"])
        run(model)
        assert model._fused is None
        assert model._why_not_fused == (
            "model.layers.1.mlp.up_proj is a Linear, expected an OutlierLinear"
        )

    def test_layers_of_different_schemes(self, device):
        """A layer as a whole has to be of one."""
        model = make_decoder(device)
        model = fastq.quantize(model, "llm_int8", overrides={"layers.1.*": "w8a8"})
        assert_close(fused(model, partial(run, model)), by_modules(model, partial(run, model)))

    @pytest.mark.parametrize("columns", [[3, 20], [3, 20, 38], None], ids=str)
    def test_other_columns(self, columns):
        model = quantised(kept=False)
        attention = model.model.layers[0].self_attn
        for name, own in (("q_proj", COLUMNS), ("k_proj", columns), ("v_proj", COLUMNS)):
            linear = torch.nn.Linear(40, getattr(attention, name).out_features, bias=False)
            options = {"keep_outlier_weights": True, "outlier_columns": own} if own else {}
            setattr(attention, name, OutlierLinear.from_float(linear, threshold=2, **options))
        assert why_not_fused(model) == (
            "model.layers.0.self_attn.k_proj keeps other columns than "
            "model.layers.0.self_attn.q_proj, which reads the same input"
        )

    def test_columns_in_another_dtype(self):
        linears = dict(zip("abc", make_linears("cpu", torch.float32, True), strict=True))
        assert why_not_joint_outliers(linears) is None
        linears["c"].outlier_weight = linears["c"].outlier_weight.half()
        assert "c keeps other columns than a" in why_not_joint_outliers(linears)
