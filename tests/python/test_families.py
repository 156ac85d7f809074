"""Every family of decoders against transformers: random models of odd sizes, saved and loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastq.runtime import CausalLM, KVCache, ModelConfig, attention, generate, kv_cache, load_model
from fastq.runtime.families import FAMILIES
from fastq.runtime.layout import from_checkpoint, to_checkpoint

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

TOLERANCE = 1e-4
VOCAB = 1003
LENGTHS = [17, 5, 29]  # of the sequences in a ragged batch

_SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}
_GQA = {
    **_SIZES,
    "hidden_size": 115,
    "intermediate_size": 187,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 80,
    "max_position_embeddings": 128,
}
# Five heads of 80.
_MHA = {**_SIZES, "hidden_size": 400, "num_attention_heads": 5, "max_position_embeddings": 128}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES = {
    "llama": ("llama", _GQA),
    "llama3_rope": ("llama", {**_GQA, "rope_parameters": _LLAMA3}),
    "linear_rope": (
        "llama",
        {
            **_GQA,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
        },
    ),
    "mistral": ("mistral", {**_GQA, "sliding_window": 9}),
    "qwen2": ("qwen2", {**_GQA, "hidden_size": 400}),
    "qwen2_window": (
        "qwen2",
        {
            **_GQA,
            "hidden_size": 400,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", _GQA),
    "opt": ("opt", {**_MHA, "ffn_dim": 187, "word_embed_proj_dim": 400}),
    "gpt2": ("gpt2", {**_MHA, "n_inner": 187}),
    "gptj": ("gptj", {**_MHA, "rotary_dim": 24}),
    "gpt_neox": ("gpt_neox", {**_MHA, "intermediate_size": 187}),
    "gpt_neox_sequential": (
        "gpt_neox",
        {
            **_MHA,
            "intermediate_size": 187,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 777.0,
                "partial_rotary_factor": 0.4,
            },
        },
    ),
    "bloom": ("bloom", _MHA),
}
SHARDED = {"qwen3", "gpt_neox", "gpt2"}
FAMILY_CASES = sorted({family: case for case, (family, _) in reversed(CASES.items())}.values())


def make_oracle(family: str, options: dict):
    """A random float32 model of transformers: biases and norms drawn too."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, **{"initializer_range": 0.1, "init_std": 0.1, "pad_token_id": 0, **options}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(name, transformers' model, the folder it is saved in)."""
    family, options = CASES[request.param]
    model = make_oracle(family, options)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="1MB" if request.param in SHARDED else "1GB")
    assert (folder / "model.safetensors").exists() == (request.param not in SHARDED)
    return request.param, model, folder


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.cpu() - expected).abs().max() / expected.abs().max()).item()


def ragged(side: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Sequences of LENGTHS; padded on a side, ids and mask."""
    torch.manual_seed(1)
    sequences = [torch.randint(VOCAB, (length,)) for length in LENGTHS]
    width = max(LENGTHS) + (side == "both")
    ids, mask = torch.zeros(2, len(LENGTHS), width, dtype=torch.int64)
    for row, tokens in enumerate(sequences):
        first = {"left": width - len(tokens), "right": 0, "both": 1}[side]
        ids[row, first : first + len(tokens)] = tokens
        mask[row, first : first + len(tokens)] = 1
    return sequences, ids, mask


def test_logits_equal_transformers(case, device):
    _, theirs, folder = case
    ids = torch.randint(VOCAB, (2, 41))
    expected = theirs(ids).logits
    model = load_model(folder, device=device)
    ids = ids.to(device)
    assert relative_error(model(ids), expected) <= TOLERANCE
    cache = model.new_cache(2, 50)
    chunks = [model(part, cache) for part in ids.split([13, 7, 1, 1, 19], dim=1)]
    assert relative_error(torch.cat(chunks, dim=1), expected) <= TOLERANCE


def test_bfloat16_is_as_close_as_transformers(case, device):
    """Whole, and a padded prompt with the tokens that follow."""
    _, theirs, folder = case
    ids = torch.randint(VOCAB, (2, 41))
    expected = theirs(ids).logits
    halved = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        bound = 2 * relative_error(halved(ids).logits.float(), expected) + 1e-5
    model = load_model(folder, dtype=torch.bfloat16, device=device)
    ids = ids.to(device)
    assert relative_error(model(ids).float(), expected) <= bound
    cache = model.new_cache(2, 50)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, :17] = 0
    padded = ids[:, :30].clone()
    padded[1, 17:] = ids[1, :13]
    prompt = model(padded, cache, attention_mask=mask)
    assert relative_error(prompt[0].float(), expected[0, :30]) <= bound
    assert relative_error(prompt[1, 17:].float(), expected[1, :13]) <= bound
    following = torch.stack((ids[0, 30:41], ids[1, 13:24]))
    steps = torch.cat([model(part, cache) for part in following.split([1, 1, 9], 1)], 1).float()
    assert relative_error(steps[0], expected[0, 30:41]) <= bound
    assert relative_error(steps[1], expected[1, 13:24]) <= bound


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_sequences_are_as_alone(case, device, side):
    """Without a cache, and with one that then grows by tokens of every sequence."""
    _, theirs, folder = case
    model = load_model(folder, device=device)
    sequences, ids, mask = ragged(side)
    more = torch.randint(VOCAB, (len(LENGTHS), 12))
    expected = [
        theirs(torch.cat((tokens, more[row]))[None]).logits[0]
        for row, tokens in enumerate(sequences)
    ]
    ids, more = ids.to(device), more.to(device)
    logits = model(ids, attention_mask=mask.bool().to(device))
    last = model(ids, attention_mask=mask, last_only=True)
    cache = model.new_cache(len(LENGTHS), 50)
    cached = model(ids, cache, attention_mask=mask)
    assert cache.length == max(LENGTHS)
    assert cache.seqlens.tolist() == LENGTHS
    steps = [model(part, cache) for part in more.split([1, 1, 10], dim=1)]
    assert cache.seqlens.tolist() == [length + 12 for length in LENGTHS]
    for row, (length, wanted) in enumerate(zip(LENGTHS, expected, strict=True)):
        tokens = mask[row].bool()
        assert relative_error(logits[row].cpu()[tokens], wanted[:length]) <= TOLERANCE
        assert relative_error(last[row], wanted[length - 1 : length]) <= TOLERANCE
        assert relative_error(cached[row].cpu()[tokens], wanted[:length]) <= TOLERANCE
        assert relative_error(torch.cat(steps, 1)[row], wanted[length:]) <= TOLERANCE


def test_padded_sequences_without_a_kernel(case, monkeypatch):
    """Where fastq has no kernel torch attends, by masks."""
    for module in (attention, kv_cache):
        monkeypatch.setattr(module, "has_kernel", lambda _: False)
    test_padded_sequences_are_as_alone(case, torch.device("cpu"), "left")


def test_left_padding_is_that_of_transformers(case, device):
    """Their logits at the tokens, with the positions that their generate gives."""
    name, theirs, folder = case
    _, ids, mask = ragged("left")
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if name != "bloom" else {}
    expected = theirs(ids, attention_mask=mask, **positions).logits[mask.bool()]
    logits = load_model(folder, device=device)(ids.to(device), attention_mask=mask)
    assert relative_error(logits.cpu()[mask.bool()], expected) <= TOLERANCE


def test_greedy_tokens_equal_transformers(case, device):
    _, theirs, folder = case
    prompt = torch.randint(1, VOCAB, (2, 11))
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False
    )[:, 11:]
    assert expected.shape == (2, 64)
    assert len(expected.unique()) > 5  # not a model that repeats one token
    actual = generate(load_model(folder, device=device), prompt, max_new_tokens=64)
    assert [result.ids for result in actual] == expected.tolist()


def test_gradients_equal_transformers(case):
    """Where gradients are wanted attention is torch's: padding, windows and ALiBi by masks."""
    _, theirs, folder = case
    model = load_model(folder).requires_grad_(True)
    _, ids, mask = ragged("right")
    logits = model(ids, attention_mask=mask)[mask.bool()]
    (gradient,) = torch.autograd.grad(logits.square().mean(), [model.model.embed_tokens.weight])
    table = theirs.get_input_embeddings().weight.requires_grad_(True)
    expected = theirs(ids, attention_mask=mask).logits[mask.bool()]
    assert relative_error(logits.detach(), expected.detach()) <= TOLERANCE
    (wanted,) = torch.autograd.grad(expected.square().mean(), [table])
    table.requires_grad_(False)
    assert relative_error(gradient, wanted) <= TOLERANCE


def test_names_are_those_of_the_contract(case):
    _, _, folder = case
    model = load_model(folder)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    mlp = {"mlp.up_proj", "mlp.down_proj"} | (
        {"mlp.gate_proj"} if model.config.mlp_gated else set()
    )
    layers = {f"model.layers.{i}.{name}" for i in range(2) for name in attention | mlp}
    assert linear == layers | {"lm_head"}


def test_a_checkpoint_is_written_back(case):
    """The state in the family's names is what transformers saved, tensor by tensor."""
    _, _, folder = case
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    model = load_model(folder)
    written = to_checkpoint(model.config, model.state_dict())
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    state = from_checkpoint(model.config, written)
    own = model.state_dict()
    assert state.keys() == own.keys() - (
        {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    )
    assert all(torch.equal(state[name], own[name]) for name in state)


def test_transformers_reads_our_config(case, tmp_path):
    """Our config.json makes the model that theirs made."""
    _, theirs, folder = case
    ours = ModelConfig.from_file(folder / "config.json")
    assert ModelConfig.from_dict(ours.to_dict()) == ours
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    again = type(theirs)(config).eval().requires_grad_(False)
    again.load_state_dict(theirs.state_dict())
    ids = torch.randint(VOCAB, (1, 41))
    assert relative_error(again(ids).logits, theirs(ids).logits) <= 1e-6


OLD_BUFFERS = {
    "llama": ["layers.1.self_attn.rotary_emb.inv_freq"],
    "gpt2": ["h.0.attn.bias", "h.1.attn.masked_bias"],
    "gpt_neox": [
        "layers.0.attention.bias",
        "layers.0.attention.masked_bias",
        "layers.1.attention.rotary_emb.inv_freq",
    ],
    "opt": ["decoder.version"],
}


# GPT-J's head has a bias, which a base model lacks.
@pytest.mark.parametrize("name", [name for name in FAMILY_CASES if name != "gptj"])
def test_a_checkpoint_without_its_head(name, tmp_path):
    """Base models are saved without the prefix of their names, and may hold old buffers."""
    family, options = CASES[name]
    theirs = make_oracle(family, {**options, "tie_word_embeddings": True})
    theirs.base_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for buffer in OLD_BUFFERS.get(family, ()):
        tensors[buffer] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    ids = torch.randint(VOCAB, (1, 9))
    assert relative_error(load_model(tmp_path)(ids), theirs(ids).logits) <= TOLERANCE


def test_every_family_is_tested():
    assert {family for family, _ in CASES.values()} == set(FAMILIES)


class TestOptions:
    """Of ModelConfig, which no family here uses: against the same function said otherwise."""

    CONFIG = ModelConfig(
        vocab_size=31,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        norm="layer",
    )

    def equal(self, other: ModelConfig, edit) -> None:
        torch.manual_seed(0)
        model = CausalLM(self.CONFIG).requires_grad_(False)
        changed = CausalLM(other).requires_grad_(False)
        state = model.state_dict()
        edit(state)
        changed.load_state_dict(state)
        ids = torch.randint(31, (2, 9))
        torch.testing.assert_close(changed(ids), model(ids))
        torch.testing.assert_close(changed(ids, changed.new_cache(2, 9)), model(ids))

    def test_softmax_scale(self):
        def halve(state):
            for name in state:
                if "q_proj" in name:
                    state[name] = state[name] / 2

        self.equal(replace(self.CONFIG, softmax_scale=2 / 6**0.5), halve)

    def test_no_norm_bias(self):
        def drop(state):
            for name in [name for name in state if name.endswith("bias")]:
                assert not state.pop(name).any()

        self.equal(replace(self.CONFIG, norm_bias=False), drop)


class TestBadInput:
    @pytest.fixture
    def model(self) -> CausalLM:
        raw = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11}
        return CausalLM(ModelConfig.from_dict(raw | {"n_positions": 6})).requires_grad_(False)

    def test_past_the_learned_positions(self, model):
        ids = torch.zeros(1, 7, dtype=torch.int64)
        with pytest.raises(ValueError, match="reach position 7, but the model has learned 6"):
            model(ids)
        cache = model.new_cache(1, 9)
        model(ids[:, :5], cache)
        with pytest.raises(ValueError, match="reach position 7, but the model has learned 6"):
            model(ids[:, :2], cache)

    @pytest.mark.parametrize("mask", [torch.ones(1, 4, dtype=torch.int64), torch.ones(2, 3)])
    def test_mask(self, model, mask):
        with pytest.raises(ValueError, match=r"attention_mask must be \(2, 3\) as input_ids"):
            model(torch.zeros(2, 3, dtype=torch.int64), attention_mask=mask)

    def test_no_token(self, model):
        mask = torch.tensor([[True, True], [False, False]])
        with pytest.raises(ValueError, match="attention_mask has no token in sequence 1"):
            model(torch.zeros(2, 2, dtype=torch.int64), attention_mask=mask)

    def test_padding_after_the_first_call(self, model):
        cache = KVCache(model.config, 2, 6)
        ids = torch.zeros(2, 2, dtype=torch.int64)
        model(ids, cache)
        mask = torch.tensor([[1, 1], [0, 1]])
        with pytest.raises(ValueError, match="cache already holds 2 positions"):
            model(ids, cache, attention_mask=mask)
        model(ids, cache, attention_mask=torch.ones(2, 2, dtype=torch.bool))

    @pytest.mark.parametrize(
        ("family", "entries", "message"),
        [
            ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False is not supported"),
            ("opt", {"word_embed_proj_dim": 4}, r"word_embed_proj_dim 4 .* hidden_size \(8\)"),
            ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx True"),
            ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm True"),
        ],
    )
    def test_options_not_computed(self, family, entries, message):
        raw = transformers.AutoConfig.for_model(
            family, hidden_size=8, num_attention_heads=2, num_hidden_layers=1
        ).to_dict()
        with pytest.raises(NotImplementedError, match=message):
            ModelConfig.from_dict(raw | entries)

    def test_a_config_that_the_family_cannot_say(self, model):
        config = ModelConfig(**{**vars(model.config), "position": "rotary"})
        with pytest.raises(ValueError, match=r"config\.json of 'gpt2' cannot say"):
            config.to_dict()

    def test_a_tensor_of_another_family(self, model):
        with pytest.raises(ValueError, match=r"'gpt2' has no tensor model\.norm\.weight"):
            from_checkpoint(model.config, {"model.norm.weight": torch.ones(8)})

    def test_a_missing_tensor_has_the_familys_name(self, model, tmp_path: Path):
        (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
        tensors = to_checkpoint(model.config, model.state_dict())
        del tensors["transformer.h.0.attn.c_attn.bias"]
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(
            ValueError, match=r"missing tensor transformer\.h\.0\.attn\.c_attn\.bias"
        ):
            load_model(tmp_path)
