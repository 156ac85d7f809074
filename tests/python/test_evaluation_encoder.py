"""The table of schemes of an encoder: embeddings against transformers, figures against NumPy."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import test_minilm
from fastq import cli
from fastq.evaluation.embeddings import EMBEDDING_ROWS, embed, measure_embeddings
from fastq.evaluation.table import ROWS, Row
from fastq.quantization import quantize
from fastq.runtime import Tokenizer, load_encoder

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

SENTENCES = test_minilm.SENTENCES.read_text(encoding="utf-8").splitlines()[:40]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, minilm_folder):
    """A small BERT of random weights, with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.BertConfig(
        vocab_size=30522,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        **sizes,
    )
    transformers.BertModel(config).save_pretrained(folder)
    shutil.copy(minilm_folder / "tokenizer.json", folder)
    return folder


def test_tokens_are_those_of_transformers(minilm_folder):
    """MiniLM's file asks for 128 tokens, padded or cut."""
    theirs = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    ours = Tokenizer(minilm_folder)
    for text in ("a few words", "many words " * 300, ""):
        assert ours.encode(text) == theirs(text, truncation=False)["input_ids"]
    assert ours.encode_batch(SENTENCES) == theirs(SENTENCES)["input_ids"]


def test_embeddings_equal_those_of_transformers(minilm_folder, device):
    theirs = transformers.AutoModel.from_pretrained(minilm_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    expected = test_minilm.embed(theirs, tokenizer, SENTENCES, torch.device("cpu"))
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    model = load_encoder(minilm_folder, dtype=dtype, device=device)
    actual = embed(model, Tokenizer(minilm_folder), SENTENCES)
    assert (actual - expected).abs().max() <= (1e-5 if device.type == "cpu" else 2e-3)


def test_figures(folder):
    model, tokenizer = load_encoder(folder), Tokenizer(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = (Row("float"), Row("per-tensor", "w8a8_tensor", {"per_tensor_weight": True}))
    own, line = measure_embeddings(model, tokenizer, SENTENCES, calibration=[], rows=rows)
    assert (own.cosine, own.min_cosine, own.same_neighbour) == pytest.approx((1, 1, 1))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    exact = embed(model, tokenizer, SENTENCES).double().numpy()
    quantize(model, "w8a8_tensor", per_tensor_weight=True)
    found = embed(model, tokenizer, SENTENCES).double().numpy()
    cosines = np.array([np.dot(a, b) for a, b in zip(exact, found, strict=True)])
    nearest = [
        [max((j for j in range(40) if j != i), key=lambda j, i=i: x[i] @ x[j]) for i in range(40)]
        for x in (exact, found)
    ]
    assert line.cosine == pytest.approx(cosines.mean(), abs=1e-6)
    assert line.min_cosine == pytest.approx(cosines.min(), abs=1e-6)
    assert line.same_neighbour == pytest.approx(np.mean(np.equal(*nearest)))
    assert 0.9 < line.min_cosine < line.cosine < 1
    assert line.weight_bytes < own.weight_bytes


def test_every_scheme_by_the_command(folder, tmp_path, monkeypatch, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "table.json"
    text.write_text("\n\n".join(SENTENCES))
    arguments = ["eval", str(folder), "--table", "--text", str(text), "--device", "cpu"]
    arguments += ["--calibration", str(text), "--output", str(output)]
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    stored = json.loads(output.read_text())
    assert stored["sentences"] == 40
    assert {"commit", "torch", "fastq", "time"} < stored.keys()
    names = [row.name for row in EMBEDDING_ROWS]
    assert [row["name"] for row in stored["rows"]] == names
    assert set(names) == {row.name for row in ROWS if row.kv_cache is None}
    for row in stored["rows"]:
        assert row["name"] in out
        assert f"{row['cosine']:.5f}" in out
        assert (row["cosine"] > 1 - 1e-6) == (row["scheme"] is None)
        assert row["cosine"] > 0.98


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "absent"], "is an encoder: expected --table, too"),
        (["--table"], "is an encoder: expected --text, too"),
        (["--table", "--text", "absent", "--plant-outliers"], "--plant-outliers has no use"),
        (["--table", "--text", "absent", "--context", "8"], "--context has no use"),
        (["--table", "--text", "one.txt"], "got 1 sentences, expected 2 or more"),
        (["--table", "--text", "long.txt"], "sentence 2 has 102 tokens, expected at most 64"),
    ],
    ids=str,
)
def test_bad_input(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a sentence\n")
    (tmp_path / "long.txt").write_text("a sentence\n" + "word " * 100)
    assert cli.main(["eval", str(folder), "--device", "cpu", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "fastq_eval.json").exists()
