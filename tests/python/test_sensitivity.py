"""Which layers are quantised and how: overrides by name, sensitivity, the worst layers kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from decoders import assert_unchanged, make_decoder, snapshot, token_batches
from fastq.nn import Int8Linear, OutlierLinear
from fastq.quantization import DEFAULT_SKIP, quantize, sensitivity


def kinds(model: nn.Module) -> dict[str, str | None]:
    """The scheme of each linear layer, None for one in float."""
    linears = (nn.Linear, Int8Linear, OutlierLinear)
    found = {n: m for n, m in model.named_modules() if isinstance(m, linears)}
    return {
        name: getattr(module, "scheme", "llm_int8" if isinstance(module, OutlierLinear) else None)
        for name, module in found.items()
    }


def nats(model: nn.Module, batches: list[torch.Tensor]) -> float:
    losses = []
    for ids in batches:
        log_p = model(ids).double().log_softmax(-1)
        losses.append(-log_p[:, :-1].gather(-1, ids[:, 1:, None]).flatten())
    return torch.cat(losses).mean().item()


class TestOverrides:
    def test_by_pattern(self):
        model = make_decoder()
        overrides = {
            "down_proj": "llm_int8",
            "layers.1": None,
            "layers.1.mlp.up_proj": "w8a8_tensor",
            "lm_head": "w8a8",
        }
        quantize(model, overrides=overrides)
        found = kinds(model)
        assert found.pop("lm_head") == "w8a8"
        for name, scheme in found.items():
            layer, leaf = name.split(".")[2], name.rpartition(".")[2]
            if layer == "1":
                assert scheme == ("w8a8_tensor" if leaf == "up_proj" else None)
            else:
                assert scheme == ("llm_int8" if leaf == "down_proj" else "w8a8")

    def test_the_last_that_matches_counts(self):
        model = make_decoder()
        quantize(model, overrides={"q_proj": None, "layers.0.self_attn.q_proj": "w8a8_tensor"})
        found = kinds(model)
        assert found["model.layers.0.self_attn.q_proj"] == "w8a8_tensor"
        assert found["model.layers.1.self_attn.q_proj"] is None

    def test_over_skip(self):
        model = make_decoder()
        quantize(model, skip=["mlp"], overrides={"mlp.up_proj": "w8a8"})
        found = kinds(model)
        assert found["model.layers.0.mlp.up_proj"] == "w8a8"
        assert found["model.layers.0.mlp.gate_proj"] is None
        assert found["lm_head"] == "w8a8"

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"nothing": None}, "overrides holds 'nothing', which matches no module"),
            ({"q_proj": "w4"}, r"overrides\['q_proj'\] is 'w4', expected one of 'w8a8'"),
            ({"*": None}, "CausalLM has no torch.nn.Linear to quantise outside of skip"),
        ],
    )
    def test_bad_overrides(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            quantize(make_decoder(), overrides=overrides)


class TestSensitivity:
    @pytest.mark.parametrize("scheme", ["w8a8", "w8a8_tensor", "smoothquant_o3", "llm_int8"])
    def test_of_a_decoder(self, scheme):
        """Each layer's damage is that of a model in which it alone is quantised."""
        model, batches = make_decoder(num_hidden_layers=1), token_batches(2)
        before = snapshot(model)
        ranking = sensitivity(model, scheme, calibration=batches)
        assert_unchanged(model, before)
        assert len(ranking) == 7
        assert [d for _, d in ranking] == sorted((d for _, d in ranking), reverse=True)
        own = nats(model, batches)
        for name, damage in (ranking[0], ranking[-1]):
            other = copy.deepcopy(model)
            alone = {n: None for n, _ in ranking if n != name}
            quantize(other, scheme, calibration=batches, overrides=alone)
            # Quantised alone, a layer is smoothed with its group's factor all the same.
            assert damage == pytest.approx(nats(other, batches) - own, abs=2e-5)

    def test_of_any_module(self, device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(device)
        batches = [torch.randn(n, 16, device=device) for n in (3, 50)]
        for batch in batches:
            batch[:, 3] *= 30
        ranking = sensitivity(model, calibration=batches)
        assert [name for name, _ in ranking] == ["0", "2"]  # the outliers are in its input
        exact = [model(batch) for batch in batches]
        for name, damage in ranking:
            other = copy.deepcopy(model)
            quantize(other, overrides={("2" if name == "0" else "0"): None})
            outputs = [other(batch) for batch in batches]
            error = sum((a - b).square().sum() for a, b in zip(outputs, exact, strict=True))
            expected = (error / sum(a.square().sum() for a in exact)).sqrt().item()
            assert damage == pytest.approx(expected, rel=1e-4)

    def test_of_one_linear_layer(self):
        linear = nn.Linear(16, 24)
        x = torch.randn(7, 16)
        ((name, damage),) = sensitivity(linear, calibration=[x])
        exact = linear(x)
        assert name == ""
        expected = (quantize(linear)(x) - exact).norm() / exact.norm()
        assert damage == pytest.approx(expected.item(), rel=1e-4)

    def test_of_a_model_of_transformers(self):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
        batches = [{"input_ids": ids} for ids in token_batches()]
        ranking = sensitivity(model, "w8a8_tensor", calibration=batches)
        own = [model(**batch).logits for batch in batches]
        name, damage = ranking[0]
        assert name.startswith("model.layers.0.")
        quantize(model, "w8a8_tensor", overrides={n: None for n, _ in ranking[1:]})
        rise = 0.0
        for batch, logits in zip(batches, own, strict=True):
            ids = batch["input_ids"]
            after = model(**batch).logits
            rise += sum(
                sign * F.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() / 3
                for sign, x in ((1, after), (-1, logits))
            )
        assert damage == pytest.approx(rise, abs=1e-5)

    def test_padding_does_not_count(self):
        model = make_decoder(num_hidden_layers=1)
        (ids,) = token_batches(1)
        padded = F.pad(ids, (4, 3))
        mask = F.pad(torch.ones_like(ids), (4, 3))
        expected = dict(sensitivity(model, "w8a8", calibration=[ids]))
        batch = {"input_ids": padded, "attention_mask": mask}
        found = dict(sensitivity(model, "w8a8", calibration=[batch]))
        assert found == pytest.approx(expected, abs=1e-5)

    def test_interrupted(self):
        model = make_decoder(num_hidden_layers=1).train()
        before = snapshot(model)

        def interrupt(label, done, total):
            assert total == 3 * 7
            if done == 10:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sensitivity(model, calibration=token_batches(), on_progress=interrupt)
        assert_unchanged(model, before)
        assert model.training

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"calibration": None}, ValueError, "sensitivity: calibration is None, expected data"),
            ({"calibration": []}, ValueError, "sensitivity: calibration holds no batch"),
            ({"calibration": [], "alpha": 2}, ValueError, "alpha is 2, expected"),
        ],
    )
    def test_bad_input(self, options, error, message):
        with pytest.raises(error, match=message):
            sensitivity(make_decoder(), **options)


class TestKeepWorst:
    @pytest.mark.parametrize("scheme", ["w8a8_tensor", "smoothquant_o3"])
    def test_keeps_those(self, scheme):
        model, batches = make_decoder(num_hidden_layers=1), token_batches(2)
        worst = {name for name, _ in sensitivity(model, scheme, calibration=batches)[:4]}
        own = model(batches[0])
        quantize(model, scheme, calibration=batches, keep_worst=4)
        found = kinds(model)
        assert {name for name, kind in found.items() if kind is None} == worst | set(DEFAULT_SKIP)
        assert (model(batches[0]) - own).norm() < 0.15 * own.norm()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"keep_worst": 1}, "calibration is None, expected data with keep_worst"),
            (
                {"keep_worst": 21, "calibration": []},
                "keep_worst is 21, expected 0 to 20 of 21 layers",
            ),
            ({"keep_worst": -1, "calibration": []}, "keep_worst is -1, expected 0 to 20"),
        ],
    )
    def test_bad_input(self, options, message):
        with pytest.raises(ValueError, match=message):
            quantize(make_decoder(), **options)
