"""A BERT encoder: the decoder's attention and MLP, each followed by a norm of the residual sum.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import (
    Quantised,
    check_tensors,
    fill_parameters,
    find_config,
    locate_tensors,
    read_tensors,
    resolve_dtype,
)
from .config import EncoderConfig, read_json
from .families import family_of
from .layout import stored_tensors
from .model import MLP, Attention, ForwardState, make_norm, make_packing

# What models with a task's head hold beside the encoder.
_HEADS = ("cls.", "classifier.", "qa_outputs.")


class EncoderOutput(NamedTuple):
    """`hidden` (batch, seqlen, hidden_size), zeros at padding; `pooled` (batch, hidden_size), a
    dense layer and tanh of every sequence's first token, None where the checkpoint has no pooler.
    """

    hidden: Tensor
    pooled: Tensor | None


class EncoderLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, causal=False)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.output_layernorm = make_norm(config)

    def forward(self, x: Tensor, state: ForwardState) -> Tensor:
        x = self.post_attention_layernorm(x + self.self_attn(x, state))
        return self.output_layernorm(x + self.mlp(x))


class Encoder(nn.Module):
    """`encoder(input_ids, attention_mask=mask)` gives an `EncoderOutput`.

    Every linear layer is an `nn.Linear`, so that `fastq.quantize` can replace it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, size)
        self.embed_types = nn.Embedding(config.type_vocab_size, size)
        self.embed_norm = make_norm(config)
        self.layers = nn.ModuleList(
            EncoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.pooler = nn.Linear(size, size)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> EncoderOutput:
        """Hidden states and their pooled form.

        `input_ids` and `token_type_ids` (None: zeros) are (batch, seqlen) int64; `attention_mask`
        (batch, seqlen), bool or integer, is 1 at tokens and 0 at padding, which costs nothing:
        sequences are packed. Positions count columns, as in transformers' `BertModel`.

        Raises ValueError for another shape or dtype, more columns than learned positions, or a
        sequence without tokens.
        """
        self._check(input_ids, token_type_ids)
        packing = make_packing(input_ids, None, attention_mask)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if packing is not None:
            input_ids, token_type_ids = packing.pack(input_ids), packing.pack(token_type_ids)
            columns = packing.columns[None]
        x = self.embed_tokens(input_ids) + self.embed_types(token_type_ids)
        x = self.embed_norm(x + self.embed_positions(columns))
        state = ForwardState(packing=packing)
        for layer in self.layers:
            x = layer(x, state)
        first = x[:, 0] if packing is None else x[0, packing.cu_seqlens[:-1].long()]
        pooled = None if self.pooler is None else self.pooler(first).tanh()
        return EncoderOutput(x if packing is None else packing.unpack(x), pooled)

    def _check(self, input_ids: Tensor, token_type_ids: Tensor | None) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype != torch.int64:
            raise ValueError(
                "encoder: input_ids must be (batch, seqlen >= 1) int64, got "
                f"{tuple(input_ids.shape)} {input_ids.dtype}"
            )
        if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
            raise ValueError(
                f"encoder: token_type_ids must be {tuple(input_ids.shape)} as input_ids, got "
                f"{tuple(token_type_ids.shape)}"
            )
        limit = self.config.max_position_embeddings
        if input_ids.shape[1] > limit:
            raise ValueError(
                f"encoder: input_ids have {input_ids.shape[1]} columns, but the model has learned "
                f"{limit} positions"
            )


def load_encoder(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    convert: Callable[[str, nn.Module], nn.Module] | None = None,
) -> Encoder:
    """Loads a BERT encoder for inference; a task's head beside it is left out.

    Takes what `load_model` takes, and raises the same.
    """
    folder = Path(folder)
    config_file = find_config(folder)
    raw = read_json(config_file)
    config = EncoderConfig.from_dict(raw, source=str(config_file))
    dtype = resolve_dtype(dtype, config.dtype, config_file)
    with torch.device("meta"):
        model = Encoder(config)
    family = family_of(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = stored_tensors(family, config.head_dim, shapes)
    locations = locate_tensors(folder, tensors, family.prefix)
    locations = {n: at for n, at in locations.items() if not n.startswith(_HEADS)}
    if not any(name.startswith("bert.pooler.") for name in locations):
        model.pooler = None
        tensors = {n: t for n, t in tensors.items() if not n.startswith("bert.pooler.")}
    quantised = Quantised.take(tensors, raw, config_file, model, locations)
    check_tensors(folder, tensors, locations, quantised.tensors)
    quantised.fill(model, locations, torch.device(device))
    parameters = read_tensors(tensors, locations, dtype, device, lasting=convert is None)
    fill_parameters(model, parameters, convert)
    return model.eval().requires_grad_(False)
