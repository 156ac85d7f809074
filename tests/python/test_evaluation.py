"""Perplexity by a sliding window against a plain loop, the table of schemes, and speed."""

from __future__ import annotations

import math

import pytest
import torch

from fastq.evaluation import nats_per_token, perplexity, windows
from fastq.evaluation.speed import measure_speed
from fastq.evaluation.table import ROWS, Row, measure_table
from fastq.nn import Int8Linear
from fastq.runtime import CausalLM, ModelConfig

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def make_model(device: torch.device | str = "cpu") -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.3)
    return model.to(device)


def make_tokens(length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(CONFIG.vocab_size, (length,), generator=generator).to(device)


def reference_nats(model, tokens, context, stride) -> float:
    """Token by token: each by the window that scores it, with the tokens before it in there."""
    total = 0.0
    for target in range(1, len(tokens)):
        window = 0 if target <= context else -(-(target - context) // stride)
        before = tokens[window * stride : target]
        assert len(before) <= context
        assert window == 0 or len(before) >= context - stride + 1
        logits = model(before[None])[0, -1].double()
        total -= logits.log_softmax(-1)[tokens[target]].item()
    return total / (len(tokens) - 1)


class TestSlidingWindow:
    @pytest.mark.parametrize("stride", [1, 3, 8])
    @pytest.mark.parametrize("length", [2, 5, 9, 10, 26])
    def test_windows(self, length, stride):
        inputs, targets = windows(torch.arange(100, 100 + length), 8, stride)
        seen = targets[targets >= 0]
        assert sorted(seen.tolist()) == list(range(101, 100 + length))  # each exactly once
        assert torch.equal(inputs[targets >= 0], seen - 1)
        for k in range(1, len(inputs)):
            assert (targets[k, : 8 - stride] < 0).all()
            assert inputs[k, 0] == 100 + k * stride

    @pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (64, 32)])
    def test_perplexity(self, device, context, stride):
        model, tokens = make_model(device), make_tokens(45, device)
        expected = reference_nats(model, tokens, context, stride)
        progress = []
        options = {"batch": 3, "on_progress": progress.append}
        nats = nats_per_token(model, tokens, context, stride=stride, **options)
        assert nats == pytest.approx(expected, rel=1e-5)
        assert sum(progress) == 44
        actual = perplexity(model, tokens, context=context, stride=stride)
        assert actual == pytest.approx(math.exp(expected), rel=1e-5)

    def test_by_default_windows_do_not_overlap(self):
        model, tokens = make_model(), make_tokens(40)
        assert nats_per_token(model, tokens, 8) == nats_per_token(model, tokens, 8, stride=8)

    def test_int8_cache(self, device):
        model, tokens = make_model(device), make_tokens(60, device)
        if device.type == "cuda":
            model.to(torch.bfloat16)
        cache = model.new_cache(1, 59, dtype=torch.int8)
        log_p = model(tokens[None, :-1], cache)[0].double().log_softmax(-1)
        expected = -log_p.gather(-1, tokens[1:, None]).mean().item()
        nats = nats_per_token(model, tokens, 59, kv_cache="int8")
        assert nats == pytest.approx(expected, rel=1e-5)
        assert nats != nats_per_token(model, tokens, 59)

    @pytest.mark.parametrize(
        ("length", "context", "stride", "message"),
        [
            (1, 8, 8, r"tokens has shape \(1,\), expected \(T,\) with T at least 2"),
            (9, 0, None, "context is 0 and stride 0, expected 1 <= stride <= context"),
            (9, 8, 9, "context is 8 and stride 9"),
            (9, 8, 0, "context is 8 and stride 0"),
        ],
    )
    def test_bad_input(self, length, context, stride, message):
        with pytest.raises(ValueError, match=message):
            windows(torch.zeros(length, dtype=torch.int64), context, stride)


class TestTable:
    def test_every_scheme(self):
        model, tokens = make_model(), make_tokens(97)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        calibration = list(make_tokens(64).view(2, 2, 16))
        seen = set()
        lines = measure_table(
            model,
            tokens,
            calibration=calibration,
            context=32,
            on_progress=lambda label, done, total: seen.add(label.partition(":")[0]),
        )
        assert (
            [line.name for line in lines]
            == [row.name for row in ROWS]
            == list(dict.fromkeys(row.name for row in ROWS))
        )
        assert seen == {row.name for row in ROWS}
        own = perplexity(model, tokens, context=32)
        assert lines[0].perplexity == own
        assert lines[0].change == 0
        for line in lines[1:]:
            assert line.change == line.perplexity / own - 1 != 0
            assert abs(line.change) < 0.5
            assert (line.weight_bytes < lines[0].weight_bytes) == (line.scheme is not None)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not any(isinstance(module, Int8Linear) for module in model.modules())

    def test_planted_outliers(self):
        model, tokens = make_model(), make_tokens(97)
        rows = (Row("float"), Row("per-tensor", "w8a8_tensor", {"per_tensor_weight": True}))
        options = {"calibration": [], "context": 32, "rows": rows}
        plain = measure_table(model, tokens, **options)
        planted = measure_table(model, tokens, plant=True, **options)
        assert planted[0].perplexity == pytest.approx(plain[0].perplexity, rel=1e-4)
        assert abs(planted[1].change) > 5 * abs(plain[1].change)


class TestSpeed:
    @pytest.mark.parametrize("kv_cache", [None, "int8"])
    def test_figures(self, device, kv_cache):
        model = make_model(device)
        if device.type == "cuda":
            model.to(torch.bfloat16)
        runs = []
        speed = measure_speed(
            model,
            batch_size=2,
            prompt_tokens=8,
            new_tokens=4,
            kv_cache=kv_cache,
            repeats=2,
            on_progress=runs.append,
        )
        assert sum(runs) == 3
        assert speed.prefill_tokens_per_second == pytest.approx(16 / speed.prefill_seconds)
        assert speed.decode_tokens_per_second > 0
        parameters = sum(p.numel() for p in model.parameters())
        assert speed.weight_bytes == parameters * model.dtype.itemsize
        cache = model.new_cache(2, 12, dtype=torch.int8 if kv_cache else None)
        tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
        assert speed.cache_bytes == sum(x.nbytes for x in tensors if x is not None)
        assert speed.peak_bytes > speed.weight_bytes

    @pytest.mark.parametrize("options", [{"new_tokens": 1}, {"repeats": 0}], ids=str)
    def test_bad_input(self, options):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            measure_speed(make_model(), **options)
