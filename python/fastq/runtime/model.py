"""A LLaMA-style decoder in plain torch, but for its attention (attention.py, kv_cache.py).

Modules and parameters carry the names of Hugging Face checkpoints, so that a state dict loads as
it is, and every linear layer is an `nn.Linear`, so that `fastq.quantize` can replace it. The
arithmetic follows transformers' `LlamaForCausalLM`: the norm in float32, rotary on halves of the
head, SwiGLU. The model trains as well as it infers.

Source: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import causal_attention
from .config import ModelConfig
from .kv_cache import KVCache
from .rotary import apply_rotary, rotary_table


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, the mean in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        heads = config.num_attention_heads * config.head_dim
        kv_heads = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=bias)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None
    ) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim))  # (batch, seqlen, heads, head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            return self.o_proj(cache.attend(self.layer, query, key, value).flatten(2))
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        return self.o_proj(causal_attention(query, key, value).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids to normalised hidden states: everything but the output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        length = input_ids.shape[1]
        x = self.embed_tokens(input_ids)
        rotary = None
        if cache is None:
            rotary = rotary_table(self.config, length, x.device)
        else:
            cache.begin(length)
        for layer in self.layers:
            x = layer(x, rotary, cache)
        if cache is not None:
            cache.commit(length)
        return self.norm(x)


class CausalLM(nn.Module):
    """A LLaMA-style language model.

    `model(input_ids, cache)` takes (batch, seqlen) int64 token ids and returns logits
    (batch, seqlen, vocab_size). With a cache, the ids continue what the cache holds.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes `lm_head` share the embedding's weight where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache in the model's dtype and on its device."""
        return KVCache(self.config, batch_size, max_length, dtype=self.dtype, device=self.device)

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, *, last_only: bool = False
    ) -> Tensor:
        """Logits (batch, seqlen, vocab_size), or (batch, 1, vocab_size) with `last_only`.

        Raises ValueError for ids that are not (batch, seqlen >= 1) int64 or do not fit the cache.
        """
        _check_input(input_ids, cache)
        hidden = self.model(input_ids, cache)
        return self.lm_head(hidden[:, -1:] if last_only else hidden)


def _check_input(input_ids: Tensor, cache: KVCache | None) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype != torch.int64:
        raise ValueError(
            "model: input_ids must be (batch, seqlen >= 1) int64, got "
            f"{tuple(input_ids.shape)} {input_ids.dtype}"
        )
    if cache is None:
        return
    if cache.batch_size != input_ids.shape[0]:
        raise ValueError(
            f"model: the cache holds {cache.batch_size} sequences, input_ids {input_ids.shape[0]}"
        )
    if cache.length + input_ids.shape[1] > cache.max_length:
        raise ValueError(
            f"model: the cache has room for {cache.max_length} positions; {cache.length} are "
            f"taken and {input_ids.shape[1]} more were given"
        )
