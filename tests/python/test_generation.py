"""Generation: greedy against transformers, sampling against probabilities computed in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastq.runtime import (
    CausalLM,
    ModelConfig,
    Tokenizer,
    generate,
    generate_tokens,
    load_model,
    sample,
)

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
    actual = generate(load_model(tmp_path, device=device), prompt, max_new_tokens=30)
    assert torch.equal(actual.cpu(), expected)


def test_a_plain_list_is_one_sequence(device):
    model = make_model(device)
    tokens = generate(model, [1, 2, 3], max_new_tokens=9)
    assert tokens.shape == (1, 9)
    assert torch.equal(tokens, generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=9))


def test_stops_at_eos(device):
    model = make_model(device)
    free = generate(model, [1, 2, 3], max_new_tokens=20)[0].tolist()
    end = free[4]
    stopped = generate(model, [1, 2, 3], max_new_tokens=20, eos_token_ids=[end])[0].tolist()
    assert stopped == free[: free.index(end) + 1]


def test_the_config_names_the_eos():
    model = make_model()
    end = generate(model, [1, 2, 3], max_new_tokens=5)[0, -1].item()
    config = ModelConfig(**{**vars(CONFIG), "eos_token_ids": (end,)})
    ended = CausalLM(config).requires_grad_(False)
    ended.load_state_dict(model.state_dict())
    assert generate(ended, [1, 2, 3], max_new_tokens=20).shape[1] <= 5
    assert generate(ended, [1, 2, 3], max_new_tokens=20, eos_token_ids=()).shape[1] == 20


def test_a_batch_goes_on_until_every_sequence_has_ended():
    model = make_model()
    prompts = torch.tensor([[1, 2, 3], [7, 8, 9]])
    free = generate(model, prompts, max_new_tokens=20)
    first = free[0].tolist()
    end = next(t for t in first if t not in free[1, : first.index(t) + 3].tolist())
    stop = first.index(end)
    tokens = generate(model, prompts, max_new_tokens=20, eos_token_ids=[end])
    assert tokens.shape[1] > stop + 1
    assert torch.equal(tokens[1], free[1, : tokens.shape[1]])
    assert tokens[0, :stop].tolist() == first[:stop]
    assert set(tokens[0, stop:].tolist()) == {end}


def test_the_longest_generation_fits():
    assert generate(make_model(), [1] * 4, max_new_tokens=60).shape == (1, 60)


def test_same_seed_same_tokens(device):
    model = make_model(device)

    def draw(seed):
        generator = torch.Generator(device=device).manual_seed(seed)
        return generate(model, [5], max_new_tokens=30, temperature=1.0, generator=generator)

    assert torch.equal(draw(7), draw(7))
    assert not torch.equal(draw(7), draw(8))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}], ids=str)
def test_narrow_sampling_is_greedy(options):
    model = make_model()
    sampled = generate(model, [5, 6], max_new_tokens=20, **{"temperature": 1.0, **options})
    assert torch.equal(sampled, generate(model, [5, 6], max_new_tokens=20))


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


def test_tokens_come_one_by_one():
    stream = generate_tokens(make_model(), [1], max_new_tokens=3)
    assert next(stream).shape == (1,)
    assert len(list(stream)) == 2


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
            ({"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 to 62"),
            ({"max_new_tokens": 63}, "max_new_tokens is 63, expected 1 to 62: the prompt takes 2"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            generate(make_model(), [1, 2], **{"max_new_tokens": 4, **options})

    @pytest.mark.parametrize("prompt", [[], torch.zeros(2, 0), torch.zeros(1, 1, 1)])
    def test_prompt(self, prompt):
        with pytest.raises(ValueError, match=r"expected \(batch, seqlen >= 1\)"):
            generate(make_model(), prompt, max_new_tokens=1)


class TestTokenizer:
    @pytest.fixture
    def folder(self, tmp_path):
        from tokenizers import Tokenizer as Trained
        from tokenizers import decoders, models, pre_tokenizers, trainers

        trained = Trained(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        trained.train_from_iterator(
            ["def f(x):\n    return x + 1\n"] * 3,
            trainers.BpeTrainer(
                vocab_size=300,
                special_tokens=["<end>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        trained.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    @pytest.mark.parametrize("text", ["", "def f(x):\n    return x", "naïve 漢字 🙂\t\r\n  end"])
    def test_round_trip(self, folder, text):
        tokenizer = Tokenizer(folder)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)

    def test_batch(self, folder):
        tokenizer = Tokenizer(folder)
        texts = ["def f", "", "return x + 1"]
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]

    def test_special_tokens(self, folder):
        tokenizer = Tokenizer(folder)
        ids = [0, *tokenizer.encode("def")]
        assert tokenizer.decode(ids) == "def"
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<end>def"
