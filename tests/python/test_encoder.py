"""The BERT encoder against transformers' BertModel: random models of odd sizes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastq.quantization import quantize
from fastq.runtime import EncoderConfig, load_encoder

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

TOLERANCE = 1e-4
VOCAB = 1003


def make_oracle(kind: str = "BertModel", **options):
    """A random float32 BERT of transformers with five heads of 80."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=400,
        intermediate_size=187,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=64,
        type_vocab_size=3,
        initializer_range=0.1,
        **options,
    )
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "LayerNorm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(transformers' model, the folder it is saved in)."""
    model, folder = make_oracle(), tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return model, folder


def batch(side: str):
    """Ids, mask and token types of three sequences padded on a side."""
    torch.manual_seed(1)
    ids = torch.randint(VOCAB, (3, 29))
    types = torch.randint(3, (3, 29))
    lengths = torch.tensor([17, 5, 29])[:, None]
    columns = torch.arange(29)
    mask = columns < lengths if side == "right" else columns >= 29 - lengths
    return ids, mask, types


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.cpu() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("with_types", [True, False])
def test_equals_transformers(oracle, device, with_types):
    theirs, folder = oracle
    ids, _, types = batch("right")
    types = types if with_types else None
    expected = theirs(ids, token_type_ids=types)
    types = types.to(device) if with_types else None
    hidden, pooled = load_encoder(folder, device=device)(ids.to(device), token_type_ids=types)
    assert relative_error(hidden, expected.last_hidden_state) <= TOLERANCE
    assert relative_error(pooled, expected.pooler_output) <= TOLERANCE


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(oracle, device, side):
    theirs, folder = oracle
    ids, mask, types = batch(side)
    expected = theirs(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    model = load_encoder(folder, device=device)
    arguments = {"attention_mask": mask, "token_type_ids": types.to(device)}
    hidden, pooled = model(ids.to(device), **arguments)
    assert relative_error(hidden.cpu()[mask], expected[mask]) <= TOLERANCE
    assert not hidden.cpu()[~mask].any()
    first = expected[torch.arange(3), mask.int().argmax(1)]
    assert relative_error(pooled, theirs.pooler.activation(theirs.pooler.dense(first))) <= TOLERANCE
    loud = ids.masked_fill(~mask, 7).to(device)  # what stands at padding is not read
    assert torch.equal(model(loud, **arguments).hidden, hidden)


def test_gradients_equal_transformers(oracle):
    theirs, folder = oracle
    ids, mask, _ = batch("right")
    model = load_encoder(folder).requires_grad_(True)
    hidden = model(ids, attention_mask=mask).hidden[mask]
    (gradient,) = torch.autograd.grad(hidden.pow(3).mean(), [model.embed_tokens.weight])
    table = theirs.embeddings.word_embeddings.weight.requires_grad_(True)
    expected = theirs(ids, attention_mask=mask).last_hidden_state[mask]
    (wanted,) = torch.autograd.grad(expected.pow(3).mean(), [table])
    table.requires_grad_(False)
    assert relative_error(gradient, wanted) <= TOLERANCE


@pytest.mark.parametrize("old_names", [False, True])
def test_a_head_beside_it(tmp_path, old_names):
    """A masked language model: names with a prefix, a head, no pooler; gamma and beta in old
    files."""
    theirs = make_oracle("BertForMaskedLM")
    theirs.save_pretrained(tmp_path)
    if old_names:
        tensors = load_file(tmp_path / "model.safetensors")
        renamed = {
            name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
            for name, tensor in tensors.items()
        }
        assert renamed.keys() != tensors.keys()
        save_file(renamed, tmp_path / "model.safetensors")
    ids, _, _ = batch("right")
    hidden, pooled = load_encoder(tmp_path)(ids)
    assert pooled is None
    assert relative_error(hidden, theirs.bert(ids).last_hidden_state) <= TOLERANCE


def test_int8_stays_close(oracle, device):
    _, folder = oracle
    ids, mask, _ = batch("right")
    model = load_encoder(folder, device=device)
    expected = model(ids.to(device), attention_mask=mask).hidden
    quantised = quantize(model)(ids.to(device), attention_mask=mask).hidden
    assert not torch.equal(quantised, expected)
    cosine = torch.nn.functional.cosine_similarity(quantised.flatten(), expected.flatten(), dim=0)
    assert cosine >= 0.995


def test_transformers_reads_our_config(oracle, tmp_path):
    theirs, folder = oracle
    ours = EncoderConfig.from_file(folder / "config.json")
    assert EncoderConfig.from_dict(ours.to_dict()) == ours
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    again = transformers.BertModel(config).eval().requires_grad_(False)
    again.load_state_dict(theirs.state_dict())
    ids, _, _ = batch("right")
    wanted = theirs(ids).last_hidden_state
    assert relative_error(again(ids).last_hidden_state, wanted) <= 1e-6


class TestBadInput:
    def test_ids(self, oracle):
        model = load_encoder(oracle[1])
        with pytest.raises(ValueError, match=r"encoder: input_ids must be \(batch, seqlen >= 1\)"):
            model(torch.zeros(3, dtype=torch.int64))
        with pytest.raises(ValueError, match="65 columns, but the model has learned 64 positions"):
            model(torch.zeros(1, 65, dtype=torch.int64))
        ids = torch.zeros(1, 3, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"token_type_ids must be \(1, 3\)"):
            model(ids, token_type_ids=ids[:, :2])
        with pytest.raises(ValueError, match=r"attention_mask must be \(1, 3\)"):
            model(ids, attention_mask=ids[:, :2])

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"is_decoder": True}, "is_decoder True is not supported"),
            ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
            ({"model_type": "llama"}, "model_type 'llama' is not supported; expected one of bert"),
        ],
    )
    def test_options_not_computed(self, oracle, entries, message):
        raw = json.loads((oracle[1] / "config.json").read_text())
        with pytest.raises(NotImplementedError, match=message):
            EncoderConfig.from_dict(raw | entries)

    def test_a_missing_tensor(self, oracle, tmp_path):
        tensors = load_file(oracle[1] / "model.safetensors")
        del tensors["encoder.layer.1.output.dense.bias"]
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((oracle[1] / "config.json").read_text())
        with pytest.raises(ValueError, match=r"missing tensor bert\.encoder\.layer\.1\.output"):
            load_encoder(tmp_path)
