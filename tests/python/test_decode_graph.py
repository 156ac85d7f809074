"""Decoding by CUDA graphs against decoding without."""

from __future__ import annotations

import copy

import pytest
import torch

import fastq
from decoders import VOCABULARY, make_decoder, token_batches
from fastq.runtime import CausalLM, generate, generate_tokens
from fastq.runtime.decode_graph import (
    FEWEST_STEPS,
    DecodeStep,
    why_no_graph,
    why_not_capturable,
)

RAGGED = ([1, 2, 3, 4, 5, 6, 7], [9], [30, 31, 32, 33], [11, 12])
SHAPES = {
    "llama": {},
    "qk_norm_window": {"qk_norm": True, "qkv_bias": True, "sliding_window": 9},
    "learned_positions": {
        "position": "learned",
        "norm": "layer",
        "mlp_gated": False,
        "activation": "relu",
        "mlp_bias": True,
    },
    "parallel": {
        "norm": "layer",
        "parallel_residual": True,
        "shared_norm": True,
        "mlp_gated": False,
        "activation": "gelu_tanh",
        "rotary_interleaved": True,
    },
    "alibi": {"position": "alibi", "norm": "layer", "embed_norm": True},
}


def quantised(device, scheme="w8a8", dtype=torch.bfloat16, **config) -> CausalLM:
    """A decoder by a scheme; None leaves it in float."""
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    model = make_decoder(device, dtype, **{**sizes, "max_position_embeddings": 128, **config})
    for parameter in model.parameters():  # logits far enough from each other
        if parameter.dim() == 2:
            parameter.mul_(4)
    if scheme is None:
        return model
    return fastq.quantize(model, scheme, calibration=token_batches(device=device))


@pytest.mark.cuda
class TestGraph:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("scheme", ["w8a8", "smoothquant_o3", "llm_int8"])
    @pytest.mark.parametrize("kv_cache", [None, "int8"])
    def test_64_tokens_of_a_ragged_batch(self, shape, scheme, kv_cache):
        model = quantised("cuda", scheme, **SHAPES[shape])
        options = {"max_new_tokens": 64, "stop_token_ids": (), "logprobs": True}
        options["kv_cache"] = kv_cache
        actual = generate(model, RAGGED, use_graph=True, **options)
        expected = generate(model, RAGGED, use_graph=False, **options)
        assert [result.ids for result in actual] == [result.ids for result in expected]
        assert len({token for result in actual for token in result.ids}) > 5
        for one, other in zip(actual, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("scheme", [None, "w8a8", "w8a8_tensor", "llm_int8"])
    @pytest.mark.parametrize("kv_cache", [None, "int8"])
    def test_modules(self, shape, scheme, kv_cache):
        """Decoders in float, of other schemes, or with the fused path switched off."""
        model = quantised("cuda", scheme, **SHAPES[shape])
        model.use_fused = False
        options = {"max_new_tokens": 24, "stop_token_ids": (), "kv_cache": kv_cache}
        actual = generate(model, RAGGED, use_graph=True, **options)
        assert actual == generate(model, RAGGED, use_graph=False, **options)

    def test_sampling_and_penalty(self):
        model = quantised("cuda")
        options = {"max_new_tokens": 40, "temperature": 0.8, "top_p": 0.9, "seed": 3}
        options |= {"repetition_penalty": 1.2, "stop_token_ids": ()}
        actual = generate(model, RAGGED, use_graph=True, **options)
        assert actual == generate(model, RAGGED, use_graph=False, **options)

    def test_it_is_taken_unasked(self):
        model = quantised("cuda")
        cache = model.new_cache(1, 20)
        with torch.no_grad():
            logits = model(torch.tensor([[1, 2, 3]], device="cuda"), cache, last_only=True)[:, -1]
        step = DecodeStep(model, cache, FEWEST_STEPS)
        for _ in range(4):
            logits = step(logits.argmax(-1))
        assert step._graph is not None
        assert cache.length == 7
        assert cache.seqlens.tolist() == [7]
        step = DecodeStep(model, cache, FEWEST_STEPS - 1)
        for _ in range(2):
            logits = step(logits.argmax(-1))
        assert step._graph is None

    def test_two_at_once(self):
        """Each has its own graph and its own cache."""
        model = quantised("cuda")
        options = {"max_new_tokens": 20, "stop_token_ids": (), "use_graph": True}
        prompts = [[1, 2, 3]], [[40, 50]]
        alone = [[s.tokens for s in generate_tokens(model, p, **options)] for p in prompts]
        pairs = zip(*(generate_tokens(model, p, **options) for p in prompts), strict=True)
        together = list(zip(*([a.tokens, b.tokens] for a, b in pairs), strict=True))
        assert [list(tokens) for tokens in together] == alone

    def test_the_cache_is_full(self):
        model = quantised("cuda")
        cache = model.new_cache(1, 6)
        tokens = torch.tensor([5], device="cuda")
        model(tokens[:, None], cache)
        step = DecodeStep(model, cache, 8, use_graph=True)
        for _ in range(5):
            step(tokens)
        with pytest.raises(ValueError, match=r"room for 6 positions; 6 are taken"):
            step(tokens)

    def test_its_memory_is_given_back(self):
        model = quantised("cuda")
        used = []
        for _ in range(4):
            generate(model, RAGGED, max_new_tokens=20, stop_token_ids=(), use_graph=True)
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
        assert used[-1] == used[1]

    def test_no_host_wait_in_a_step(self):
        model = quantised("cuda")
        cache = model.new_cache(2, 20)
        tokens = torch.tensor([5, 6], device="cuda")
        model(tokens[:, None], cache)
        step = DecodeStep(model, cache, 8, use_graph=True)
        for _ in range(3):
            step(tokens)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class TestWithoutGraph:
    def test_steps_are_those_of_the_model(self, device):
        model = quantised(device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
        prompt = torch.tensor([[3, 1, 4], [1, 5, 9]], device=device)
        cache, other = model.new_cache(2, 12), model.new_cache(2, 12)
        with torch.no_grad():
            model(prompt, cache), model(prompt, other)
            step = DecodeStep(model, cache, 8, use_graph=False)
            for tokens in torch.randint(VOCABULARY, (5, 2), device=device):
                assert torch.equal(step(tokens), model(tokens[:, None], other)[:, -1])

    def test_modules_that_are_not_known(self):
        model = make_decoder()
        assert why_not_capturable(model) is None
        assert why_not_capturable(quantised("cpu", "llm_int8", torch.float32)) is None
        mlp = model.model.layers[1].mlp
        mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
        assert why_not_capturable(model) == (
            "model.layers.1.mlp.up_proj is a Sequential, expected a Linear, Int8Linear or "
            "OutlierLinear"
        )
        mlp.up_proj = mlp.up_proj[0]
        handle = mlp.register_forward_hook(lambda *args: None)
        assert why_not_capturable(model) == "its modules have hooks"
        handle.remove()
        model.model.layers[2] = torch.nn.Sequential()
        assert why_not_capturable(model) == (
            "model.layers.2 is a Sequential, expected a DecoderLayer"
        )

    def test_a_cpu_has_none(self):
        model = quantised("cpu", dtype=torch.float32)
        assert why_no_graph(model, model.new_cache(1, 4)) == ("the model is on cpu, expected cuda")
        with pytest.raises(NotImplementedError, match=r"no CUDA graph can be captured: the model"):
            generate(model, [1], max_new_tokens=FEWEST_STEPS, use_graph=True)

    @pytest.mark.cuda
    def test_reasons(self):
        model = quantised("cuda")
        cache = model.new_cache(1, 4)
        assert why_no_graph(model, cache) is None
        with torch.autocast("cuda", torch.bfloat16):
            assert why_no_graph(model, cache) == "autocast is on"
        assert "no kernel for torch.float32" in why_no_graph(copy.deepcopy(model).float(), cache)
        model.lm_head.register_forward_hook(lambda *args: None)
        assert why_no_graph(model, cache) == "its modules have hooks"
