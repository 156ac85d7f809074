"""Outliers planted without changing the function; what they do to each scheme on the demo model."""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from decoders import BLOCKS, linear_inputs, make_decoder, token_batches
from fastq.demo import corpus, run
from fastq.evaluation import nats_per_token
from fastq.quantization import calibration_batches, plant_outliers, quantize
from fastq.runtime import CausalLM, Tokenizer, load_model


class TestPlanting:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("block", BLOCKS)
    def test_the_function_stays(self, device, block, dtype):
        model, (ids,) = make_decoder(device, dtype, **BLOCKS[block]), token_batches(1, device)
        before, expected = copy.deepcopy(model), model(ids).float()
        channels = plant_outliers(model, channels=6, factor=64)
        assert len(set(channels)) == 6
        assert channels == sorted(channels)
        logits = model(ids).float()
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        for layer, old in zip(model.model.layers, before.model.layers, strict=True):
            factor = torch.ones(40, dtype=dtype, device=device)
            factor[channels] = 64
            for name, norm in old.named_modules():
                if name.endswith("layernorm"):
                    assert torch.equal(layer.get_submodule(name).weight, norm.weight * factor)
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(old.self_attn, name).weight / factor
                assert torch.equal(getattr(layer.self_attn, name).weight, weight)

    def test_the_inputs_have_outliers(self):
        model, batches = make_decoder(), token_batches()
        before = linear_inputs(model, batches)
        assert plant_outliers(model, [3, 30], 32.0) == [3, 30]
        after = linear_inputs(model, batches)
        for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj"):
            ratio = after[f"model.layers.1.{name}"] / before[f"model.layers.1.{name}"]
            torch.testing.assert_close(ratio[:, [3, 30]], torch.full((102, 2), 32.0))
        for name in ("model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj", "lm_head"):
            torch.testing.assert_close(after[name], before[name])

    def test_the_seed_draws_the_channels(self):
        drawn = [tuple(plant_outliers(make_decoder(), seed=seed)) for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((6, 60), "factor is 60, expected a power of two"),
            ((6, 0), "factor is 0, expected a power of two"),
            (([40],), r"channels is \[40\], expected distinct ones from 0 to 39"),
            (([1, 1],), r"channels is \[1, 1\], expected distinct"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            plant_outliers(make_decoder(), *arguments)


class Demo:
    """The demo model in float32, 4096 held-out tokens, calibration on another module's source."""

    def __init__(self) -> None:
        tokenizer = Tokenizer(run.MODEL_FOLDER)
        self.model = load_model(run.MODEL_FOLDER, dtype=torch.float32)
        ids = [self.model.config.bos_token_id]
        for text in corpus.held_out_texts().values():
            ids += tokenizer.encode(text)
            if len(ids) > 4096:
                break
        self.tokens = torch.tensor(ids[:4097])
        source = Path(argparse.__file__)
        self.calibration = calibration_batches(source, tokenizer, samples=8, length=256)
        self.own = self.perplexity(self.model)
        self.planted = copy.deepcopy(self.model)
        plant_outliers(self.planted, channels=6, factor=64)

    def perplexity(self, model: nn.Module) -> float:
        return math.exp(nats_per_token(model, self.tokens, 512))

    def change(self, model: CausalLM, scheme: str, **options: object) -> float:
        """Of the perplexity, by a scheme: 0.01 is 1 %."""
        model = quantize(copy.deepcopy(model), scheme, calibration=self.calibration, **options)
        return self.perplexity(model) / self.own - 1


@pytest.fixture(scope="module")
def demo() -> Demo:
    if not (run.MODEL_FOLDER / "model.safetensors").is_file():
        pytest.skip("the demo's model is not in this checkout")
    return Demo()


class TestDemoModel:
    def test_float_stays(self, demo):
        assert demo.perplexity(demo.planted) == pytest.approx(demo.own, rel=1e-5)
        ids = demo.tokens[None, :256]
        expected = demo.model(ids)
        assert (demo.planted(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()

    def test_per_tensor_breaks(self, demo):
        options = {"per_tensor_weight": True}
        assert demo.change(demo.model, "w8a8_tensor", **options) < 0.05
        assert demo.change(demo.planted, "w8a8_tensor", **options) > 1
        assert demo.change(demo.planted, "w8a8") > 0.05

    @pytest.mark.parametrize(
        ("scheme", "options", "bar"),
        [
            ("llm_int8", {"keep_outlier_weights": True}, 0.005),
            ("smoothquant_o1", {}, 0.01),
            ("smoothquant_o2", {}, 0.02),
            ("smoothquant_o3", {}, 0.02),
        ],
        ids=str,
    )
    def test_schemes_that_hold(self, demo, scheme, options, bar):
        assert abs(demo.change(demo.planted, scheme, **options)) < bar
