"""Folders of LLM.int8() models. bitsandbytes does not run here: its names, dtypes and values are
checked, as transformers writes them."""

from __future__ import annotations

import pytest
import torch

import fastq
from fastq.integrations.bitsandbytes import Linear8bitLt
from fastq.nn import OutlierLinear
from fastq.runtime import load_model
from quantized_folders import (
    IDS,
    edit_quantization,
    edit_tensors,
    make_quantized,
    read_config,
    read_tensors,
)

DOWN = "model.layers.1.mlp.down_proj"  # (64, 96), of llama without a bias


def test_tensors(tmp_path):
    model, source = make_quantized(tmp_path, "llm_int8")
    fastq.save_quantized(model, tmp_path / "int8")
    tensors, weights = read_tensors(tmp_path / "int8"), read_tensors(source)
    weight = weights[f"{DOWN}.weight"]
    assert torch.equal(tensors[f"{DOWN}.SCB"], weight.abs().amax(1))
    expected = (weight.double() * 127 / weight.abs().amax(1, keepdim=True)).round()
    assert torch.equal(tensors[f"{DOWN}.weight"], expected.to(torch.int8))
    assert tensors[f"{DOWN}.SCB"].dtype == torch.float32
    kind = tensors[f"{DOWN}.weight_format"]
    assert (kind.dtype, kind.shape, kind.item()) == (torch.uint8, (), 0)
    quantised = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, OutlierLinear)
        for leaf in ("SCB", "weight_format")
    }
    assert tensors.keys() == weights.keys() | quantised


def test_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, _ = make_quantized(tmp_path, "llm_int8")
    fastq.save_quantized(model, tmp_path / "int8")
    expected = transformers.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=1.5, llm_int8_skip_modules=["lm_head"]
    )
    found = read_config(tmp_path / "int8")["quantization_config"]
    assert found == expected.to_dict()


def test_linear8bitlt_takes_the_layer(tmp_path):
    model, _ = make_quantized(tmp_path, "llm_int8")
    fastq.save_quantized(model, tmp_path / "int8")
    tensors = read_tensors(tmp_path / "int8")
    state = {k.removeprefix(f"{DOWN}."): t for k, t in tensors.items() if k.startswith(DOWN)}
    module = Linear8bitLt(96, 64, bias=False, has_fp16_weights=False, threshold=1.5)
    module.load_state_dict(state)
    x = torch.randn(5, 96)
    assert torch.equal(module(x), model.get_submodule(DOWN)(x))


def test_without_a_format_or_skipped_modules(tmp_path):
    """As older versions write it."""
    model, _ = make_quantized(tmp_path, "llm_int8")
    fastq.save_quantized(model, tmp_path / "int8")
    edit_tensors(
        tmp_path / "int8", lambda t: [t.pop(k) for k in list(t) if k.endswith("weight_format")]
    )
    edit_quantization(
        tmp_path / "int8",
        lambda raw: (raw.pop("quant_method"), raw.update(llm_int8_skip_modules=None)),
    )
    assert torch.equal(load_model(tmp_path / "int8")(IDS), model(IDS))


def test_a_row_of_zeros(tmp_path):
    """bitsandbytes' SCB of it is 0."""
    model, _ = make_quantized(tmp_path, "llm_int8")
    model.get_submodule(DOWN).weight[3] = 0
    fastq.save_quantized(model, tmp_path / "int8")
    edit_tensors(tmp_path / "int8", lambda t: t[f"{DOWN}.SCB"].__setitem__(3, 0))
    assert torch.equal(load_model(tmp_path / "int8")(IDS), model(IDS))
