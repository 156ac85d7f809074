"""The fused path of quantised decoders against their modules, which other tests hold against
transformers."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import fastq
from decoders import make_decoder, token_batches
from fastq.evaluation.speed import weight_bytes
from fastq.nn import Int8Linear
from fastq.runtime import CausalLM, ModelConfig, generate, load_model
from fastq.runtime.families import FAMILIES
from fastq.runtime.fused import why_not_fused

VOCABULARY = 101
SCHEMES = ("w8a8", "smoothquant_o3")  # a scale a token, and static ones

_SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 64}
_GQA = {
    **_SIZES,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 12,
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64}
_MHA = {**_SIZES, "hidden_size": 48, "num_attention_heads": 3}
CASES = {
    "llama": {**_GQA, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_GQA, "sliding_window": 9},
    "qwen2": _GQA,
    "qwen3": {**_GQA, "hidden_act": "gelu_pytorch_tanh"},
    "opt": {**_MHA, "ffn_dim": 52},
    "gpt2": {**_GPT, "n_inner": 52},
    "gptj": {**_GPT, "rotary_dim": 8},
    "gpt_neox": {**_MHA, "intermediate_size": 52},
    "gpt_neox_sequential": {
        **_MHA,
        "model_type": "gpt_neox",
        "intermediate_size": 52,
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "bloom": {"vocab_size": VOCABULARY, "n_layer": 2, "hidden_size": 48, "n_head": 3},
}


def test_every_family_is_here():
    assert {raw.get("model_type", name) for name, raw in CASES.items()} == set(FAMILIES)


def make_family(case: str, scheme: str, device: torch.device) -> CausalLM:
    """A random decoder, quantised, its biases and norms drawn too."""
    torch.manual_seed(3)
    model = CausalLM(ModelConfig.from_dict({"model_type": case, **CASES[case]}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 0.3 if "embed" in name else 0.15)
    model.eval().requires_grad_(False).to(device)
    return fastq.quantize(model, scheme, calibration=token_batches(device=device))


def by_modules(model: CausalLM, function):
    model.use_fused = False
    try:
        return function()
    finally:
        model.use_fused = True


def fused(model: CausalLM, function):
    result = function()
    assert model._fused is not None, model._why_not_fused
    return result


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Both paths compute in float32, in orders of their own. So an activation that lies between
    two steps of its quantisation may go either way: rarely, and by one of 127 steps in one of a
    sum's terms. On a GPU, where the orders differ more, such a step may be seen whole."""
    error = (actual - expected).abs() / expected.abs().max()
    assert error.max() < (1 / 127 if error.is_cuda else 1e-3)
    assert error.median() < 1e-5


RAGGED = ([1, 2, 3, 4, 5, 6, 7], [9], [30, 31, 32, 33], [11, 12])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", CASES)
def test_against_modules(device, case, scheme):
    model = make_family(case, scheme, device)
    ids = torch.randint(VOCABULARY, (3, 17), device=device)
    mask = torch.arange(17, device=device) < torch.tensor([[17], [5], [11]], device=device)

    def logits():
        cache = model.new_cache(3, 20)
        steps = [model(ids), model(ids, attention_mask=mask)]
        steps.append(model(ids, cache, attention_mask=mask))
        steps += [model(ids[:, i : i + 1], cache) for i in range(3)]
        return torch.cat(steps, dim=1)

    def greedy():
        results = generate(model, RAGGED, max_new_tokens=12, stop_token_ids=())
        return [result.ids for result in results]

    assert_close(fused(model, logits), by_modules(model, logits))
    assert fused(model, greedy) == by_modules(model, greedy)


def quantised(scheme: str = "w8a8", device="cpu", dtype=torch.float32, **config) -> CausalLM:
    model = make_decoder(device, dtype, **config)
    return fastq.quantize(model, scheme, calibration=token_batches(device=device))


IDS = token_batches()[0]


def run(model: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_no_further_from_float32_than_the_modules_are(device, dtype):
    """The exact one has the same INT8 weights and the 16-bit model's other ones, in float32.
    Where few activations lie between two steps, chance has a part in which path is closer."""
    model = quantised(device=device, dtype=dtype)
    actual, modules = fused(model, partial(run, model)), by_modules(model, partial(run, model))
    exact = by_modules(model, partial(run, copy.deepcopy(model).float()))
    error, error_of_modules = ((x.float() - exact).square().mean() for x in (actual, modules))
    assert 0 < error <= 1.5 * error_of_modules


def test_an_int8_cache(device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = quantised(device=device, dtype=dtype)

    def logits():
        cache = model.new_cache(2, 20, dtype=torch.int8)
        return model(IDS.to(device), cache).float()

    actual, expected = fused(model, logits), by_modules(model, logits)
    tolerance = 1e-2 if dtype == torch.float32 else 5e-2  # its own rounding may flip, too
    assert (actual - expected).abs().max() < tolerance * expected.abs().max()


class TestMemory:
    def storages(self, tensors):
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    @pytest.mark.parametrize("config", [{}, {"mlp_gated": False, "activation": "gelu"}], ids=str)
    def test_every_weight_is_there_once(self, device, config):
        model = quantised("w8a8_static", device, qkv_bias=True, **config)
        by_modules(model, partial(run, model))
        before = weight_bytes(model)
        fused(model, partial(run, model))
        assert weight_bytes(model) <= before
        held = self.storages(model.state_dict(keep_vars=True).values())
        held |= self.storages(buffer for buffer in model.buffers())
        joints = [joint for layer in model._fused._layers for joint in layer.joints]
        for joint in joints:
            data = joint.weight.data if joint.weight.__class__ is not torch.Tensor else joint.weight
            tensors = [data, joint.weight_scale, joint.bias, joint.input_scale]
            assert self.storages(t for t in tensors if t is not None).keys() <= held.keys()

    def test_the_plain_weights_are_let_go(self):
        model = quantised()
        size = model.model.layers[0].mlp.up_proj.weight.shape

        def plain_weights():
            gc.collect()
            tensors = (t for t in gc.get_objects() if type(t) is torch.Tensor)
            return sum(t.dtype == torch.int8 and t.shape == size for t in tensors)

        assert plain_weights() == 6  # gate and up of three layers
        fused(model, partial(run, model))
        assert plain_weights() == 0


class TestStillAModel:
    """A fused model is saved, loaded, moved, copied and changed like any other."""

    def test_its_state_is_as_before(self, device):
        model = quantised("w8a8_static", device, qkv_bias=True)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fused(model, partial(run, model))
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_loading_a_state(self, device):
        model, other = quantised(device=device), quantised(device=device)
        expected = fused(model, partial(run, model))
        for module in other.modules():
            if isinstance(module, Int8Linear):
                module.weight.neg_() if device.type == "cuda" else None
                module.weight_scale.mul_(3)
        assert not torch.allclose(fused(other, partial(run, other)), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(fused(other, partial(run, other)), expected)

    def test_saving_and_loading(self, tmp_path):
        model = quantised("w8a8_static")
        expected = fused(model, partial(run, model))
        fastq.save_quantized(model, tmp_path)
        loaded = load_model(tmp_path)
        assert torch.equal(fused(loaded, partial(run, loaded)), expected)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, device, copied):
        model = quantised(device=device)
        expected = fused(model, partial(run, model))
        other = copied(model)
        model.model.layers[1].mlp.up_proj.weight_scale.zero_()
        assert torch.equal(fused(other, partial(run, other)), expected)
        assert not torch.equal(fused(model, partial(run, model)), expected)

    def test_moves(self, device):
        model = quantised()
        expected = fused(model, partial(run, model))
        model.to(device)
        assert_close(fused(model, partial(run, model)).cpu(), expected)
        model.model.layers[0].to(torch.float64).to(torch.float32)  # behind the model's back
        assert_close(fused(model, partial(run, model)).cpu(), expected)

    def test_a_replaced_layer_counts(self, device):
        model, other = quantised(device=device), quantised(device=device)
        fused(model, partial(run, model))
        for some in (model, other):
            layer = some.model.layers[1]
            layer.mlp.up_proj, layer.mlp.gate_proj = layer.mlp.gate_proj, layer.mlp.up_proj
        assert torch.equal(
            fused(model, partial(run, model)),
            fused(other, partial(run, other)),
        )

    def test_fewer_layers(self):
        model, other = quantised(), quantised()
        fused(model, partial(run, model))
        del model.model.layers[2]
        expected = fused(model, partial(run, model))
        fused(other, partial(run, other))
        other.model.layers = other.model.layers[:2]
        assert torch.equal(fused(other, partial(run, other)), expected)
        assert_close(by_modules(model, partial(run, model)), expected)

    def test_first_calls_by_many_threads(self):
        expected = run(quantised())
        for _ in range(5):
            model = quantised()
            with ThreadPoolExecutor(4) as threads:
                results = list(threads.map(run, [model] * 8))
            assert all(torch.equal(result, expected) for result in results)

    def test_modules_give_what_they_gave(self, device):
        model = quantised("w8a8_static", device, mlp_bias=True)
        layer, x = model.model.layers[0], torch.randn(5, 40, device=device)
        before = [linear(x) for linear in (layer.mlp.up_proj, layer.self_attn.v_proj)]
        expected = by_modules(model, partial(run, model))
        joint = fused(model, partial(run, model))
        after = [linear(x) for linear in (layer.mlp.up_proj, layer.self_attn.v_proj)]
        assert all(map(torch.equal, before, after))
        assert torch.equal(fused(model, partial(run, model)), joint)
        assert torch.equal(by_modules(model, partial(run, model)), expected)
        assert model._fused is None


class TestWhoAsksForModules:
    def test_compiled(self):
        model = quantised("w8a8_static", mlp_bias=True)
        fused(model, partial(run, model))
        with torch.no_grad():
            actual = torch.compile(model, backend="eager")(IDS)
        assert model._fused is not None  # a graph has no side effects
        assert torch.equal(actual, by_modules(model, partial(run, model)))

    def test_hooks_are_called(self):
        model = quantised()
        fused(model, partial(run, model))
        seen = []
        hook = model.model.layers[1].mlp.down_proj.register_forward_hook(
            lambda module, args, out: seen.append(out)
        )
        run(model)
        run(model)
        assert len(seen) == 2
        assert model._fused is None
        assert model._why_not_fused == "its modules have hooks"
        hook.remove()
        fused(model, partial(run, model))

    def test_gradients(self):
        model = quantised()
        fused(model, partial(run, model))
        model.model.embed_tokens.weight.requires_grad_(True)
        model(IDS).sum().backward()
        assert model.model.embed_tokens.weight.grad.abs().max() > 0
        assert model._why_not_fused == "gradients are asked for"
        fused(model, partial(run, model))  # without

    def test_autocast(self):
        model = quantised()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(model)
        assert model._why_not_fused == "autocast is on"


def _smooth(model):
    old = model.model.layers[1].self_attn.o_proj
    new = torch.nn.Linear(old.in_features, old.out_features, bias=False)
    smooth = torch.ones(old.in_features)
    model.model.layers[1].self_attn.o_proj = Int8Linear.from_float(new, smooth=smooth)


REASONS = {
    "float": ({"skip": ["layers.1.mlp.up_proj"]}, r"model\.layers\.1\.mlp\.up_proj is a Linear"),
    "overridden": (
        {"overrides": {"layers.2.self_attn.k_proj": "w8a8_static"}},
        r"model\.layers\.2\.self_attn\.k_proj has scheme 'w8a8_static', expected 'w8a8'",
    ),
    "per tensor": ({"scheme": "w8a8_tensor"}, r"q_proj has scheme 'w8a8_tensor', expected 'w8a8'"),
    "outliers": (
        {"overrides": {"layers.1.mlp.up_proj": "llm_int8"}},
        r"model\.layers\.1\.mlp\.up_proj is a OutlierLinear, expected an Int8Linear",
    ),
    "rotation": ({"rotation": 4}, r"model\.layers\.0\.self_attn\.q_proj has rotation"),
}


class TestReasons:
    @pytest.mark.parametrize(("options", "reason"), REASONS.values(), ids=REASONS)
    def test_of_a_quantisation(self, options, reason):
        model = fastq.quantize(make_decoder(), calibration=token_batches(), **options)
        run(model)
        assert model._fused is None
        assert torch.equal(run(model), by_modules(model, partial(run, model)))
        with pytest.raises(AssertionError, match=reason):
            fused(model, partial(run, model))

    def test_of_layers_with_schemes_of_their_own(self):
        """Only layers of one input have to be alike."""
        overrides = {"o_proj": "w8a8_static", "layers.1.mlp.*_proj": "w8a8_static"}
        model = fastq.quantize(make_decoder(), calibration=token_batches(), overrides=overrides)
        actual = fused(model, partial(run, model))
        assert_close(actual, by_modules(model, partial(run, model)))

    def test_smoothing_of_a_layer_by_itself(self):
        model = quantised()
        _smooth(model)
        assert why_not_fused(model) == (
            "model.layers.1.self_attn.o_proj has smooth, expected a layer without"
        )

    def test_other_input_scales(self):
        model = quantised("w8a8_static")
        assert why_not_fused(model) is None
        model.model.layers[1].mlp.up_proj.input_scale *= 2
        assert "mlp.up_proj has input_scale" in why_not_fused(model)

    def test_an_mlp_without_a_fused_op(self):
        model = quantised(mlp_gated=False)
        assert "silu without a gate" in why_not_fused(model)

    def test_norms_in_another_dtype(self):
        model = quantised(dtype=torch.bfloat16)
        model.model.layers[1].input_layernorm.float()
        assert why_not_fused(model) == (
            "model.layers.1.input_layernorm has no weight in the model's dtype, torch.bfloat16"
        )

    def test_of_a_float_model(self):
        model = make_decoder()
        assert "is a Linear, expected an Int8Linear" in why_not_fused(model)
        assert model.fused_decoder() is None

    def test_switched_off(self):
        model = quantised()
        model.use_fused = False
        run(model)
        assert model._fused is None
        assert why_not_fused(model) == "use_fused is False"

    def test_is_logged_once(self, capfd, monkeypatch):
        monkeypatch.setenv("FASTQ_LOG", "dispatch")
        model = quantised()
        for _ in range(2):
            run(model)
        model.use_fused = False
        for _ in range(2):
            run(model)
        lines = [line for line in capfd.readouterr().err.splitlines() if "decoder" in line]
        assert lines == [
            "fastq: decoder -> fused",
            "fastq: decoder -> modules: use_fused is False",
        ]
