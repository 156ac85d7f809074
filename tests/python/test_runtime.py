"""The runtime against transformers: logits of random LLaMA models, whole and step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastq.quantization import quantize
from fastq.runtime import CausalLM, KVCache, ModelConfig, load_model

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

TOLERANCE = 1e-4

CONFIGS = {
    "odd_sizes_gqa_5_to_1": {
        "vocab_size": 1003,
        "hidden_size": 115,
        "intermediate_size": 187,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 80,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rms_norm_eps": 1e-5,
    },
    "tied": {
        "vocab_size": 1003,
        "hidden_size": 64,
        "intermediate_size": 99,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "biases": {
        "vocab_size": 257,
        "hidden_size": 96,
        "intermediate_size": 131,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "one_layer_one_head": {
        "vocab_size": 17,
        "hidden_size": 6,
        "intermediate_size": 5,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    },
}


def make_oracle(**options):
    """A random float32 model of transformers, biases and norms drawn too."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"initializer_range": 0.1, "max_position_embeddings": 256, **options}
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def save_oracle(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def oracle(request, tmp_path_factory):
    """(transformers' model, the folder it is saved in, ids (2, 41), its logits)."""
    model = make_oracle(**CONFIGS[request.param])
    folder = save_oracle(model, tmp_path_factory.mktemp("oracle"))
    ids = torch.randint(model.config.vocab_size, (2, 41))
    with torch.no_grad():
        return model, folder, ids, model(ids).logits


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.cpu() - expected).abs().max() / expected.abs().max()).item()


def test_logits_equal_transformers(oracle, device):
    _, folder, ids, expected = oracle
    model = load_model(folder, device=device)
    assert model.dtype == torch.float32
    assert relative_error(model(ids.to(device)), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "chunks", [[1] * 41, [20] + [1] * 21, [7, 13, 1, 20], [41]], ids=lambda c: f"{len(c)}_chunks"
)
def test_cached_logits_equal_transformers(oracle, device, chunks):
    _, folder, ids, expected = oracle
    model = load_model(folder, device=device)
    cache = model.new_cache(2, 41)
    logits = [model(part, cache) for part in ids.to(device).split(chunks, dim=1)]
    assert cache.length == 41
    assert relative_error(torch.cat(logits, dim=1), expected) <= TOLERANCE


def test_a_longer_cache_changes_nothing(oracle):
    _, folder, ids, expected = oracle
    model = load_model(folder)
    cache = model.new_cache(2, 100)
    cache.keys.fill_(torch.nan)  # what lies beyond the length must not be read
    cache.values.fill_(torch.nan)
    model(ids[:, :30], cache)
    assert relative_error(model(ids[:, 30:], cache), expected[:, 30:]) <= TOLERANCE


def test_last_only_is_the_last_row(oracle):
    _, folder, ids, expected = oracle
    logits = load_model(folder)(ids, last_only=True)
    assert relative_error(logits, expected[:, -1:]) <= TOLERANCE


def test_gradients_equal_transformers(oracle):
    """With parameters that require grad attention is torch's."""
    theirs, folder, ids, expected = oracle
    model = load_model(folder).requires_grad_(True)
    logits = model(ids)
    assert relative_error(logits.detach(), expected) <= TOLERANCE
    logits.square().mean().backward()
    theirs.zero_grad()
    theirs(ids).logits.square().mean().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, wanted[name].grad) <= TOLERANCE
    theirs.zero_grad()


def test_torch_attends_only_where_gradients_are_wanted(oracle, monkeypatch):
    _, folder, ids, _ = oracle

    def refuse(*_, **__):
        raise AssertionError("torch's attention was called")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    model = load_model(folder)
    model(ids)
    model(ids, model.new_cache(2, 41))
    with pytest.raises(AssertionError, match="torch's attention"):
        model.requires_grad_(True)(ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_transformers(oracle, device, dtype):
    _, folder, ids, expected = oracle
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        their_error = relative_error(theirs(ids).logits.float(), expected)
    ours = load_model(folder, dtype=dtype, device=device)
    assert ours.dtype == dtype
    ids = ids.to(device)
    assert relative_error(ours(ids).float(), expected) <= 2 * their_error + 1e-5
    for chunks in ([1] * 41, [20] + [1] * 21, [7, 13, 1, 20], [41]):
        cache = ours.new_cache(2, 50)
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        logits = torch.cat([ours(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
        assert relative_error(logits.float(), expected) <= 2 * their_error + 1e-5


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_theta": 1234.5},
        {"rope_theta": 1234.5, "rope_scaling": None},
        {"rope_theta": 1234.5, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 1234.5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}},
    ],
    ids=["old", "old_null_scaling", "old_default_scaling", "older_default_scaling", "new"],
)
def test_rope_theta_of_every_config_generation(tmp_path, entries):
    model = make_oracle(
        **CONFIGS["tied"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}}
    )
    folder = save_oracle(model, tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "rope_theta", "rope_scaling"):
        raw.pop(name, None)
    (folder / "config.json").write_text(json.dumps(raw | entries))
    ids = torch.randint(1003, (1, 50))
    with torch.no_grad():
        expected = model(ids).logits
    assert relative_error(load_model(folder)(ids), expected) <= TOLERANCE


def test_transformers_reads_our_config():
    ours = ModelConfig.from_dict(
        {"model_type": "llama", "rope_theta": 777.0, "eos_token_id": [3, 5], **CONFIGS["biases"]}
    )
    theirs = transformers.LlamaConfig.from_dict(ours.to_dict())
    for name in ("vocab_size", "head_dim", "mlp_bias", "num_key_value_heads"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert theirs.attention_bias == ours.qkv_bias == ours.out_bias
    assert theirs.rope_parameters["rope_theta"] == 777.0
    assert ModelConfig.from_dict(theirs.to_dict()) == ours


def test_int8_model_stays_close(oracle, device):
    _, folder, ids, expected = oracle
    model = quantize(load_model(folder, device=device))
    logits = model(ids.to(device)).cpu()
    cosine = torch.nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), dim=0)
    assert cosine >= 0.995


def test_decode_writes_into_the_preallocated_cache(oracle):
    _, folder, ids, _ = oracle
    model = load_model(folder)
    cache = model.new_cache(2, 41)
    address = cache.keys.data_ptr()
    model(ids[:, :5], cache)
    model(ids[:, 5:6], cache)
    assert cache.keys.data_ptr() == address
    assert cache.keys[:, :, :6].abs().sum(-1).all()
    assert not cache.keys[:, :, 6:].any()


class TestBadInput:
    @pytest.fixture
    def model(self):
        raw = {"model_type": "llama", **CONFIGS["one_layer_one_head"]}
        return CausalLM(ModelConfig.from_dict(raw)).requires_grad_(False)

    @pytest.mark.parametrize(
        "ids",
        [
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(1, 0, dtype=torch.int64),
            torch.zeros(1, 3, dtype=torch.int32),
            torch.zeros(1, 3),
        ],
        ids=["rank", "empty", "int32", "float"],
    )
    def test_input_ids(self, model, ids):
        with pytest.raises(ValueError, match=r"input_ids must be \(batch, seqlen >= 1\) int64"):
            model(ids)

    def test_cache_too_small(self, model):
        cache = model.new_cache(1, 4)
        model(torch.zeros(1, 3, dtype=torch.int64), cache)
        with pytest.raises(ValueError, match="room for 4 positions; 3 are taken and 2 more"):
            model(torch.zeros(1, 2, dtype=torch.int64), cache)
        assert cache.length == 3

    def test_cache_of_another_batch(self, model):
        cache = KVCache(model.config, 2, 4)
        with pytest.raises(ValueError, match="cache holds 2 sequences, input_ids 1"):
            model(torch.zeros(1, 3, dtype=torch.int64), cache)

    @pytest.mark.parametrize(
        ("entries", "error", "message"),
        [
            ({"model_type": "mamba"}, NotImplementedError, "model_type 'mamba'"),
            ({"model_type": None}, ValueError, "no model_type"),
            ({"hidden_act": "mish"}, NotImplementedError, "hidden_act 'mish'"),
            (
                {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
                NotImplementedError,
                "rope_scaling has rope_type 'dynamic'",
            ),
            ({"rope_scaling": {"type": "linear"}}, ValueError, "rope_type 'linear' but no factor"),
            (
                {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
                NotImplementedError,
                "rope_parameters has rope_type 'yarn'",
            ),
            (
                {"quantization_config": {"quant_method": "gptq"}},
                NotImplementedError,
                r"already quantised \(gptq\)",
            ),
            ({"hidden_size": None}, ValueError, "missing hidden_size"),
            ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers must be a positive integer"),
            ({"vocab_size": "17"}, ValueError, "vocab_size must be a positive integer, got '17'"),
            ({"head_dim": 3}, ValueError, "head_dim must be even"),
            (
                {"num_attention_heads": 3, "num_key_value_heads": 2},
                ValueError,
                r"num_attention_heads \(3\) must be a multiple of num_key_value_heads \(2\)",
            ),
        ],
    )
    def test_config(self, entries, error, message):
        raw = {"model_type": "llama", **CONFIGS["one_layer_one_head"], **entries}
        with pytest.raises(error, match=message) as caught:
            ModelConfig.from_dict(raw, source="some/config.json")
        assert "some/config.json" in str(caught.value)
