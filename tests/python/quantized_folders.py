"""Small models of several families, quantised, for the tests of quantised checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastq
from fastq.runtime import load_model

IDS = torch.tensor(
    [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 97, 93], [2, 7, 1, 8, 2, 8, 1, 8] + [9] * 6]
)

_SIZES = {"vocab_size": 103, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = _SIZES | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FAMILIES = {
    "llama": ("Llama", _LLAMA | {"num_key_value_heads": 2, "attention_bias": True}),
    "qwen2": ("Qwen2", _LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "opt": ("OPT", _LLAMA | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt_neox": ("GPTNeoX", _LLAMA),
    "bloom": ("Bloom", _SIZES | {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gpt2": ("GPT2", _SIZES | {"n_embd": 64, "n_layer": 2, "n_head": 4}),
}
_HEADS = {"GPT2": "GPT2LMHeadModel"}


def make_transformers_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of transformers with random weights and biases."""
    import transformers

    name, entries = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**entries)
    torch.manual_seed(0)
    model = getattr(transformers, _HEADS.get(name, f"{name}ForCausalLM"))(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if bool(parameter.any()) else 0.0, 0.1)
        else:
            nn.init.normal_(parameter, 0.0, 0.1)
    return model.to(dtype).eval().requires_grad_(False)


def save_float(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A float checkpoint as transformers writes it."""
    make_transformers_model(family, dtype).save_pretrained(folder)
    return folder


def quantize(model: nn.Module, scheme: str) -> nn.Module:
    """The model, quantised; calibrated with `IDS` where the scheme wants it."""
    options = {"threshold": 1.5} if scheme == "llm_int8" else {}
    return fastq.quantize(model, scheme, calibration=[IDS], **options)


def input_scales(model: nn.Module) -> dict[str, torch.Tensor]:
    """absmax / 127 of the input of each linear layer but the head, where the model gets `IDS`."""
    scales = {}

    def observe(name: str):
        def hook(module, arguments):
            scales[name] = arguments[0].abs().max().float() / 127

        return hook

    hooks = [
        module.register_forward_pre_hook(observe(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    model(IDS)
    for hook in hooks:
        hook.remove()
    return scales


def make_quantized(tmp_path: Path, scheme: str = "w8a8", family: str = "llama", **options):
    """A quantised model of the runtime, and the float checkpoint that it came from."""
    source = save_float(tmp_path / "float", family, **options)
    return quantize(load_model(source), scheme), source


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def edit_quantization(folder: Path, edit) -> None:
    """`edit` changes config.json's quantization_config in place."""
    raw = read_config(folder)
    edit(raw["quantization_config"])
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


def edit_tensors(folder: Path, edit) -> None:
    """`edit` changes the tensors of a checkpoint in one file in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
