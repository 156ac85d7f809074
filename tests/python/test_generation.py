"""Generation: greedy and the penalty against transformers, sampling against probabilities computed
in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastq.runtime import (
    CausalLM,
    ModelConfig,
    generate,
    generate_tokens,
    generation,
    load_model,
    sample,
)
from fastq.runtime.sampling import penalise_repetition, uniforms

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


def make_model(device: torch.device | str = "cpu", **changed) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(replace(CONFIG, **changed)).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.3)
    return model.to(device)


def new_ids(model, prompts, **options) -> list[list[int]]:
    return [result.ids for result in generate(model, prompts, **options)]


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution that `sample` must draw from, in float64, one row at a time."""
    rows = []
    for row in np.asarray(logits, dtype=np.float64):
        order = np.argsort(-row, kind="stable")
        p = np.exp((row - row.max()) / temperature)
        keep = order[: top_k or len(row)]
        p[np.setdiff1d(order, keep)] = 0
        p /= p.sum()
        if top_p is not None:
            reached = np.cumsum(p[order])
            count = int(np.searchsorted(reached, top_p)) + 1
            p[order[count:]] = 0
            p /= p.sum()
        rows.append(p)
    return np.stack(rows)


@pytest.mark.parametrize("prompt_length", [1, 7])
def test_greedy_equals_transformers(tmp_path, device, prompt_length):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=211,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    prompt = torch.randint(211, (3, prompt_length))
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False
    )[:, prompt_length:]
    assert len(expected.unique()) > 5  # not a model that repeats one token
    actual = new_ids(load_model(tmp_path, device=device), prompt, max_new_tokens=30)
    assert actual == expected.tolist()


def test_a_plain_list_is_one_sequence(device):
    model = make_model(device)
    (tokens,) = new_ids(model, [1, 2, 3], max_new_tokens=9)
    assert len(tokens) == 9
    assert new_ids(model, torch.tensor([[1, 2, 3]]), max_new_tokens=9) == [tokens]
    assert new_ids(model, [[1, 2, 3]], max_new_tokens=9) == [tokens]


def test_stops_at_a_token(device):
    model = make_model(device)
    (free,) = generate(model, [1, 2, 3], max_new_tokens=20)
    assert free.finish_reason == "length"
    end = free.ids[4]
    (stopped,) = generate(model, [1, 2, 3], max_new_tokens=20, stop_token_ids=[end])
    assert stopped.ids == free.ids[: free.ids.index(end) + 1]
    assert stopped.finish_reason == "stop"


def test_the_config_names_the_end():
    model = make_model()
    end = new_ids(model, [1, 2, 3], max_new_tokens=5)[0][-1]
    config = ModelConfig(**{**vars(CONFIG), "eos_token_ids": (end,)})
    ended = CausalLM(config).requires_grad_(False)
    ended.load_state_dict(model.state_dict())
    assert len(new_ids(ended, [1, 2, 3], max_new_tokens=20)[0]) <= 5
    assert len(new_ids(ended, [1, 2, 3], max_new_tokens=20, stop_token_ids=())[0]) == 20


def test_a_batch_goes_on_until_every_sequence_has_ended():
    model = make_model()
    prompts = [[1, 2, 3], [7, 8, 9]]
    first, second = new_ids(model, prompts, max_new_tokens=20)
    end = next(t for t in first if t not in second[: first.index(t) + 3])
    stop = first.index(end)
    steps = list(generate_tokens(model, prompts, max_new_tokens=20, stop_token_ids=[end]))
    assert len(steps) > stop + 1
    assert [step.tokens[0] for step in steps[: stop + 1]] == first[: stop + 1]
    assert steps[stop].finish_reasons[0] == "stop"
    assert all(step.tokens[0] is None for step in steps[stop + 1 :])
    assert [step.tokens[1] for step in steps] == second[: len(steps)]


class TestRagged:
    """Prompts of different lengths in one batch."""

    PROMPTS = ([1, 2, 3, 4, 5, 6, 7], [9], [30, 31, 32, 33], [11, 12])

    def test_each_prompt_goes_on_as_it_does_alone(self, device):
        model = make_model(device)
        together = new_ids(model, self.PROMPTS, max_new_tokens=25)
        assert together == [new_ids(model, p, max_new_tokens=25)[0] for p in self.PROMPTS]

    def test_sampled_with_logprobs(self, device):
        model = make_model(device)
        options = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": True}
        options |= {"max_new_tokens": 15}
        together = generate(model, self.PROMPTS, seed=[5, 6, 7, 8], **options)
        for b, prompt in enumerate(self.PROMPTS):
            (alone,) = generate(model, prompt, seed=5 + b, **options)
            assert together[b].ids == alone.ids
            assert together[b].logprobs == pytest.approx(alone.logprobs, abs=1e-4)

    def test_they_end_one_by_one(self):
        model = make_model()
        free = new_ids(model, self.PROMPTS, max_new_tokens=20)
        end = free[1][6]
        results = generate(model, self.PROMPTS, max_new_tokens=20, stop_token_ids=[end])
        for result, tokens in zip(results, free, strict=True):
            stop = tokens.index(end) + 1 if end in tokens else None
            assert result.ids == tokens[:stop]
            assert result.finish_reason == ("stop" if stop else "length")


class TestInt8Cache:
    def quantised(self, cache, layer):
        """The cache's keys and values as it means them."""
        pairs = ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
        return [(x[layer] * s[layer][..., None]).double() for x, s in pairs]

    def test_it_holds_what_a_float_cache_holds(self, device):
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = make_model(device).to(dtype)
        ids = torch.tensor([[0, 0, 4, 5], [6, 7, 8, 9]], device=device)
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], device=device)
        exact, cache = model.new_cache(2, 8), model.new_cache(2, 8, dtype=torch.int8)
        for some in (exact, cache):
            model(ids, some, attention_mask=mask)
            model(ids[:, -1:], some)
        assert cache.keys.dtype == cache.values.dtype == torch.int8
        for b, length in enumerate((3, 5)):
            for x, x_exact in zip(
                self.quantised(cache, 0), (exact.keys[0], exact.values[0]), strict=True
            ):
                x, x_exact = x[b, :length], x_exact[b, :length].double()
                half_a_step = x_exact.abs().amax(-1, keepdim=True) / 127 / 2
                slack = 1e-6 if dtype == torch.float32 else 2**-7 * x_exact.abs()
                assert ((x - x_exact).abs() <= half_a_step + slack).all()

    def test_generation_goes_on_as_the_whole_sequence_does(self, device):
        model = make_model(device)
        if device.type == "cuda":
            model.to(torch.bfloat16)
        prompt = [3, 1, 4, 1, 5]
        options = {"max_new_tokens": 10, "kv_cache": "int8", "logprobs": True}
        (result,) = generate(model, prompt, **options)
        ids = torch.tensor([prompt + result.ids], device=device)
        log_p = model(ids, model.new_cache(1, 15, dtype=torch.int8))[0].double().log_softmax(-1)
        expected = [log_p[i + 4, token].item() for i, token in enumerate(result.ids)]
        tolerance = 1e-4 if device.type == "cpu" else 0.1
        assert result.logprobs == pytest.approx(expected, abs=tolerance)
        exact = model(ids)[0].double().log_softmax(-1)
        assert 0 < (log_p - exact).abs().mean() < 0.05

    def test_ragged(self, device):
        model = make_model(device)
        if device.type == "cuda":
            model.to(torch.bfloat16)
        options = {"max_new_tokens": 12, "kv_cache": "int8"}
        prompts = TestRagged.PROMPTS
        together = new_ids(model, prompts, **options)
        if device.type == "cpu":  # in 16 bits a product's last bits depend on the batch
            assert together == [new_ids(model, prompt, **options)[0] for prompt in prompts]

    def test_a_dtype_without_a_kernel(self):
        model = make_model().double()
        with pytest.raises(NotImplementedError, match=r"an int8 cache takes no torch\.float64"):
            generate(model, [1, 2], max_new_tokens=2, kv_cache="int8")


def test_min_new_tokens(device):
    model = make_model(device)
    (free,) = new_ids(model, [1, 2, 3], max_new_tokens=12)
    options = {"max_new_tokens": 12, "min_new_tokens": 6, "stop_token_ids": free[:1]}
    (tokens,) = new_ids(model, [1, 2, 3], **options)
    assert len(tokens) >= 6
    assert free[0] not in tokens[:6]


def test_a_stop_token_outside_the_vocabulary_never_comes():
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    expected = new_ids(make_model(), [1, 2], stop_token_ids=(), **options)
    assert new_ids(make_model(), [1, 2], stop_token_ids=(10**6, -1), **options) == expected


def test_the_longest_generation_fits():
    assert len(new_ids(make_model(), [1] * 4, max_new_tokens=60)[0]) == 60


def test_logprobs(device):
    model = make_model(device)
    prompts = [[1, 2, 3], [7, 8, 9]]
    options = {"max_new_tokens": 6, "temperature": 0.7, "top_k": 20, "seed": 3}
    results = generate(model, prompts, logprobs=True, repetition_penalty=1.3, **options)
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt + result.ids], device=device)
        log_p = model(ids)[0].double().log_softmax(-1).cpu()
        expected = [log_p[i + 2, token].item() for i, token in enumerate(result.ids)]
        assert result.logprobs == pytest.approx(expected, abs=1e-4)
    assert generate(model, prompts, **options)[0].logprobs is None


class TestSeed:
    def test_same_seed_same_tokens(self, device):
        model = make_model(device)

        def draw(seed):
            return new_ids(model, [5], max_new_tokens=30, temperature=1.0, seed=seed)

        assert draw(7) == draw(7)
        assert draw(7) != draw(8)
        assert draw(None) != draw(None)

    def test_a_sequence_draws_the_same_in_any_batch(self, device):
        model = make_model(device)
        options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.95}
        together = new_ids(model, [[5, 6], [5, 6], [9, 2]], seed=[3, 4, 5], **options)
        assert together[0] != together[1]
        assert together == new_ids(model, [[5, 6], [5, 6], [9, 2]], seed=3, **options)
        assert new_ids(model, [[9, 2]], seed=5, **options) == [together[2]]

    @pytest.mark.parametrize("count", [1, 7, 16, 40])
    def test_streams_are_independent_of_each_other_and_the_count(self, count):
        whole = uniforms([11, 12, 13], 64, "cpu")
        assert torch.equal(uniforms([13, 11], count, "cpu"), whole[:count, [2, 0]])
        assert 0 <= whole.min() <= whole.max() < 1
        assert len(whole.unique()) > 180


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}, {"temperature": 1e-50}],
    ids=str,
)
def test_narrow_sampling_is_greedy(options):
    model = make_model()
    sampled = new_ids(model, [5, 6], max_new_tokens=20, **{"temperature": 1.0, **options})
    assert sampled == new_ids(model, [5, 6], max_new_tokens=20)


def test_a_draw_never_falls_on_a_token_that_was_cut():
    logits = torch.linspace(0, -9, 5000).repeat(3, 1)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24])
    for options in ({"top_k": 7}, {"top_p": 0.3}, {"top_k": 11, "top_p": 0.999999}):
        allowed = probabilities(logits[:1], **options)[0] > 0
        drawn = sample(logits, uniform=uniform, **options)
        assert allowed[drawn.numpy()].all()
        assert drawn[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 1000},
        {"top_p": 0.6},
        {"top_p": 1.0},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.8},
    ],
    ids=str,
)
def test_sampled_frequencies(device, options):
    draws = 40000
    logits = torch.tensor(
        [[0.3, 2.0, -1.0, 1.1, 0.0, 1.9, -3.0, 0.7], [0.01 * i for i in range(8)]]
    )
    expected = probabilities(logits, **options)
    generator = torch.Generator(device=device).manual_seed(0)
    many = logits.to(device).repeat_interleave(draws, dim=0)
    drawn = sample(many, generator=generator, **options).cpu().view(2, draws)
    for row, p in zip(drawn, expected, strict=True):
        frequency = torch.bincount(row, minlength=8).numpy() / draws
        assert (frequency[p == 0] == 0).all()
        # Five standard deviations of a binomial frequency.
        assert (abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / draws) + 1e-12).all()


class TestAgainstTransformers:
    """transformers' logits processors, on the same logits."""

    @pytest.mark.parametrize("penalty", [0.8, 1.0, 1.7])
    def test_repetition_penalty(self, device, penalty):
        transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
        torch.manual_seed(0)
        logits, ids = torch.randn(3, 50), torch.randint(50, (3, 20))
        expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
        actual = penalise_repetition(logits.to(device), seen.to(device), penalty)
        torch.testing.assert_close(actual.cpu(), expected)

    def test_repetition_penalty_in_generation(self, tmp_path, device):
        transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
        torch.manual_seed(2)
        config = transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.3,
            eos_token_id=None,
        )
        theirs = transformers.LlamaForCausalLM(config).eval()
        theirs.save_pretrained(tmp_path)
        prompt = torch.randint(97, (2, 5))
        expected = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=25,
            do_sample=False,
            repetition_penalty=1.4,
        )[:, 5:]
        model = load_model(tmp_path, device=device)
        options = {"max_new_tokens": 25, "repetition_penalty": 1.4}
        assert new_ids(model, prompt, **options) == expected.tolist()
        assert new_ids(model, prompt, max_new_tokens=25) != expected.tolist()

    @pytest.mark.parametrize(
        "options",
        [{"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.8}],
        ids=str,
    )
    def test_which_tokens_remain(self, options):
        transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
        torch.manual_seed(0)
        logits = torch.randn(1, 30)
        scores = logits / options.get("temperature", 1.0)
        if "top_k" in options:
            scores = transformers.TopKLogitsWarper(options["top_k"])(None, scores)
        if "top_p" in options:
            scores = transformers.TopPLogitsWarper(options["top_p"])(None, scores)
        expected = scores.softmax(-1)[0]
        # Evenly spaced numbers fall on each token in proportion to its probability.
        uniform = (torch.arange(100_000) + 0.5) / 100_000
        drawn = sample(logits.expand(len(uniform), -1), uniform=uniform, **options)
        frequency = torch.bincount(drawn, minlength=30) / len(uniform)
        assert torch.equal(frequency > 1e-5, expected > 1e-5)
        assert (frequency[expected == 0] == 0).all()
        torch.testing.assert_close(frequency, expected, rtol=0, atol=3e-5)


def test_tokens_come_one_by_one():
    stream = generate_tokens(make_model(), [1], max_new_tokens=3)
    assert len(next(stream).tokens) == 1
    assert len(list(stream)) == 2


def test_the_host_waits_once_a_step(monkeypatch):
    """Tensors reach the host by `tolist` only, and once for each token."""
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t.shape) or tolist(t))
    for name in ("item", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(name))
    options = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 1}
    steps = generate_tokens(
        make_model(), [[1, 2], [3, 4]], max_new_tokens=5, logprobs=True, **options
    )
    next(steps)
    reads.clear()
    assert len(list(steps)) == 4
    assert len(reads) == 4


class TestRunningAhead:
    """The next step is launched before the tokens are looked at, as on a GPU."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"logprobs": True, "stop_token_ids": (3, 14, 15, 92, 65)},
            {"temperature": 0.9, "repetition_penalty": 1.3, "seed": 4, "logprobs": True},
            {"min_new_tokens": 3, "stop_token_ids": tuple(range(0, 100, 3))},
        ],
    )
    def test_the_same_comes_out(self, monkeypatch, options):
        model = make_model()
        prompts = [[1, 2, 3, 4], [50, 51], [7]]
        expected = generate(model, prompts, max_new_tokens=9, **options)
        monkeypatch.setattr(generation, "_runs_ahead", lambda device: True)
        assert generate(model, prompts, max_new_tokens=9, **options) == expected

    def test_a_step_in_vain(self, monkeypatch):
        """None after the last token that may come; one where the sequences end before."""
        monkeypatch.setattr(generation, "_runs_ahead", lambda device: True)
        model, lengths = make_model(), []
        model.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
        first = generate(model, [1, 2, 3], max_new_tokens=4, stop_token_ids=())[0].ids[0]
        assert lengths == [3, 1, 1, 1]
        lengths.clear()
        result = generate(model, [1, 2, 3], max_new_tokens=4, stop_token_ids=(first,))[0]
        assert result.finish_reason == "stop"
        assert lengths == [3, 1]


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": -1.0}, "temperature is -1.0, expected a number >= 0"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"temperature": float("inf")}, "temperature is inf"),
            ({"top_k": 0}, "top_k is 0, expected at least 1"),
            ({"top_p": 0.0}, r"top_p is 0.0, expected a number in \(0, 1\]"),
            ({"top_p": 1.5}, "top_p is 1.5"),
            ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected a number > 0"),
            ({"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 to 62"),
            ({"max_new_tokens": 63}, "max_new_tokens is 63, expected 1 to 62: the prompt takes 2"),
            ({"min_new_tokens": 5}, "min_new_tokens is 5, expected 0 to 4"),
            ({"kv_cache": "int4"}, "kv_cache is 'int4', expected None or 'int8'"),
            ({"seed": [1, 2]}, "seed holds 2 seeds, expected 1"),
            ({"stop": "x"}, "expected a tokenizer too"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            generate(make_model(), [1, 2], **{"max_new_tokens": 4, **options})

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([], "prompts is empty"),
            ([[1], []], r"prompt 1 is \[\], expected at least one token id"),
            (torch.zeros(2, 0), "prompt 0 is"),
            (torch.zeros(1, 1, 1), "prompt 0 is"),
            ([1.5], "prompt 0 is"),
            ([[3], [60, 61]], "prompt 1 holds token 61, expected 0 to 60"),
            ([-1], "prompt 0 holds token -1"),
        ],
    )
    def test_prompt(self, prompt, message):
        with pytest.raises(ValueError, match=message):
            generate(make_model(), prompt, max_new_tokens=1)
