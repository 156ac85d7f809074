"""Decoders in the shapes of known models, with random weights made where they are needed.

Linear layers are drawn with a standard deviation of 0.01. One norm's gain in a thousand is 16, the
others are 1, so that LLM.int8() has outliers to multiply apart: where those gains stand, and hardly
any elsewhere.
"""

from __future__ import annotations

import torch
from torch import nn

from fastq.nn import Int8Linear, OutlierLinear
from fastq.runtime import CausalLM, ModelConfig


def _llama(
    hidden: int, layers: int, heads: int, inner: int, vocabulary: int = 32000
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
    )


def _opt(hidden: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=50272,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        norm="layer",
        norm_eps=1e-5,
        position="learned",
        position_offset=2,
        mlp_gated=False,
        activation="relu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        family="opt",
    )


# Sources: Zhang et al., "OPT", 2022, table 1; Touvron et al., "LLaMA", 2023, table 2.
CONFIGS = {
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "llama-7b": _llama(4096, 32, 32, 11008),
    "llama-13b": _llama(5120, 40, 40, 13824),
    "tiny": _llama(64, 2, 4, 96, 101),  # to try the benchmarks on
}
DTYPES = {"cpu": torch.bfloat16, "cuda": torch.float16}
SCHEMES = (None, "w8a8", "w8a8_static", "llm_int8")

_STD = 0.01
# Of int8 numbers spread evenly over +-127.
_WEIGHT_SCALE = _STD / 73.3
_INPUT_SCALE = 16 / 127
_GAIN, _GAIN_STEP = 16.0, 1000


def random_decoder(config: ModelConfig, scheme: str | None, device: torch.device) -> CausalLM:
    """A decoder in 16 bits, its layers' linears by the scheme; None leaves them in 16 bits.

    Nothing is ever in memory in another form than its last.
    """
    with torch.device("meta"):
        model = CausalLM(config).requires_grad_(False).eval().to(DTYPES[device.type])
        if scheme is not None:
            _replace_linears(model, scheme)
    model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            fill(name, tensor, generator)
        model.fused_decoder()
    return model


def _replace_linears(model: CausalLM, scheme: str) -> None:
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear:
                continue
            sizes = (child.in_features, child.out_features, child.bias is not None)
            if scheme == "llm_int8":
                linear: nn.Module = OutlierLinear(*sizes)
            else:
                linear = Int8Linear(*sizes, scheme=scheme)
            setattr(module, name, linear.eval())


def fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random numbers for the parameter or buffer of this name, in place."""
    if tensor.dtype == torch.int8:
        tensor.random_(-127, 128, generator=generator)
    elif name.endswith("weight_scale"):
        tensor.fill_(_WEIGHT_SCALE)
    elif name.endswith("input_scale"):
        tensor.fill_(_INPUT_SCALE)
    elif "norm" in name and name.endswith("weight"):
        tensor.fill_(1)[::_GAIN_STEP] = _GAIN
    else:
        tensor.normal_(0, _STD, generator=generator)


def bytes_read(model: nn.Module, skipped: list[nn.Module | None]) -> int:
    """Bytes of all weights but those of the modules skipped, of which a step reads a few rows;
    what they share with others counts."""
    only_there = {id(m) for module in skipped if module is not None for m in module.modules()}
    tensors = {
        (tensor.data_ptr(), tensor.nbytes)
        for module in model.modules()
        if id(module) not in only_there
        for tensor in (*module.parameters(False), *module.buffers(False))
    }
    return sum(nbytes for _, nbytes in tensors)
