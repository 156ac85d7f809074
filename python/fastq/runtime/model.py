"""One decoder for every family, in plain torch but for its attention (attention.py, kv_cache.py).

`ModelConfig` says what each part is. Modules carry the names of a Hugging Face LLaMA, whatever the
family, and every linear layer is an `nn.Linear`, so that `fastq.quantize` can replace it. The
arithmetic follows transformers': norms in float32, then rounded. The model trains as well as it
infers.

Sources: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023; Black et al.,
"GPT-NeoX-20B", 2022 (parallel residual); BigScience, "BLOOM", 2022 (ALiBi).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionRule, self_attention
from .config import ModelConfig
from .kv_cache import KVCache
from .packing import Packing
from .rotary import alibi_slopes, apply_rotary, rotary_table

if TYPE_CHECKING:
    from .fused import FusedDecoder

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class ForwardState:
    """What the layers share in one forward pass: `rotary` is cos and sin of every token's position,
    None with a cache, which rotates."""

    cache: KVCache | None = None
    packing: Packing | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    alibi_slopes: Tensor | None = None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, the mean in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of a hidden state."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)


class Attention(nn.Module):
    """Self-attention with grouped key and value heads."""

    def __init__(self, config: ModelConfig, layer: int, *, causal: bool = True) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.interleaved = config.rotary_interleaved
        self.rule = AttentionRule(causal, config.softmax_scale, config.window(layer))
        heads = config.num_attention_heads * config.head_dim
        kv_heads = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, state: ForwardState) -> Tensor:
        projected = (projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.attend(*projected, state))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, state: ForwardState) -> Tensor:
        """What o_proj takes, (batch, seqlen, heads * head_dim), of the projections' outputs, which
        are alike."""
        query, key, value = (
            x.unflatten(-1, (-1, self.head_dim))  # (batch, seqlen, heads, head_dim)
            for x in (query, key, value)
        )
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        rule = replace(self.rule, alibi_slopes=state.alibi_slopes)
        if state.cache is not None:
            return state.cache.attend(self.layer, query, key, value, rule, state.packing).flatten(2)
        if state.rotary is not None:
            query = apply_rotary(query, *state.rotary, interleaved=self.interleaved)
            key = apply_rotary(key, *state.rotary, interleaved=self.interleaved)
        return self_attention(query, key, value, rule, state.packing).flatten(2)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias) if config.mlp_gated else None
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.activation = ACTIVATION_FUNCTIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm, one after the other or side by side."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = None if config.shared_norm else make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, state: ForwardState) -> Tensor:
        normed = self.input_layernorm(x)
        attention = self.self_attn(normed, state)
        if not self.parallel:
            x = x + attention
            return x + self.mlp(self.post_attention_layernorm(x))
        if self.post_attention_layernorm is not None:
            normed = self.post_attention_layernorm(x)
        return x + attention + self.mlp(normed)


class Decoder(nn.Module):
    """Token ids to normalised hidden states: everything but the output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.embed_positions = None
        if config.position == "learned":
            rows = config.max_position_embeddings + config.position_offset
            self.embed_positions = nn.Embedding(rows, size)
        self.embed_norm = make_norm(config) if config.embed_norm else None
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config)

    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        packing: Packing | None = None,
        fused: FusedDecoder | None = None,
    ) -> Tensor:
        """Hidden states (batch, seqlen, hidden_size) of ids (batch, seqlen), or of a packing's
        (1, total); `fused` computes the layers, else their modules do."""
        seqlen = input_ids.shape[1] if packing is None else packing.max_length
        if cache is not None:
            positions = cache.begin(seqlen, packing)
        elif packing is not None:
            positions = packing.positions[None]
        else:
            positions = torch.arange(seqlen, device=input_ids.device)[None]
        x = self.embed(input_ids, positions)
        state = self._forward_state(seqlen, x.device, cache, packing)
        if fused is not None:
            x = fused(x, state)
        else:
            for layer in self.layers:
                x = layer(x, state)
        if cache is not None:
            cache.commit(seqlen)
        return self.norm(x)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """What the first layer takes, of ids and positions (batch, seqlen)."""
        x = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + self.config.position_offset)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _forward_state(
        self, seqlen: int, device: torch.device, cache: KVCache | None, packing: Packing | None
    ) -> ForwardState:
        if cache is not None:
            return ForwardState(cache, packing, None, cache.alibi_slopes)
        rotary = rotary_table(self.config, seqlen, device)
        if rotary is not None and packing is not None:
            rotary = tuple(part[packing.positions] for part in rotary)
        return ForwardState(None, packing, rotary, alibi_slopes(self.config, device))


class CausalLM(nn.Module):
    """A language model of any family that `ModelConfig` describes.

    `model(input_ids, cache)` takes (batch, seqlen) int64 token ids and returns logits
    (batch, seqlen, vocab_size). With a cache, the ids continue what the cache holds.

    A decoder in W8A8 or LLM.int8() runs on fastq's fused ops (`fused.py`) where `use_fused` is set,
    as it is from the start, all its layers are quantised, and nothing asks for gradients, autocast
    or hooks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.use_fused = True
        self._fused: FusedDecoder | None = None
        self._why_not_fused: str | None = "not known yet"
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
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

    def new_cache(
        self, batch_size: int, max_length: int, *, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache on the model's device, in its dtype or a given one: torch.int8 quantises
        keys and values."""
        dtype = self.dtype if dtype is None else dtype
        return KVCache(self.config, batch_size, max_length, dtype=dtype, device=self.device)

    def fused_decoder(self, cache: KVCache | None = None) -> FusedDecoder | None:
        """What computes the layers as things stand; None: their modules do.

        Whether the model can be fused is decided where sequences begin, and anew where it has
        changed.
        """
        # A model is trained where the native library may not be built, with `runtime` by itself.
        if "." not in __package__ or torch.compiler.is_compiling():
            return None
        if type(self.model.layers[0].mlp.up_proj) is nn.Linear:
            return None  # a float model
        if self._fused is None and cache is not None and cache.length > 0:
            return None
        from .fused import up_to_date

        return up_to_date(self)

    def _apply(self, fn: Callable, recurse: bool = True) -> CausalLM:
        self._fused = None  # whose weights would stay where they are
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fused": None}  # a copy has its own

    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        *,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (batch, seqlen, vocab_size), or with `last_only` (batch, 1, vocab_size), those of
        every sequence's last token.

        `attention_mask` (batch, seqlen), bool or integer, is 1 at tokens and 0 at padding, on
        either side: every sequence's logits are those it has alone, positions count its tokens, and
        those of padding are arbitrary. With a cache, a mask with padding comes first; what follows
        continues every sequence where its own tokens end.

        Raises ValueError for ids that are not (batch, seqlen >= 1) int64 or do not fit the cache or
        a learned position table, and for a mask of another shape, of a sequence without tokens, or
        with padding where the cache is not empty.
        """
        _check_input(input_ids, cache)
        packing = make_packing(input_ids, cache, attention_mask)
        check_room(input_ids.shape[1] if packing is None else packing.max_length, cache, self)
        fused = self.fused_decoder(cache)
        if packing is None:
            hidden = self.model(input_ids, cache, None, fused)
            return self.lm_head(hidden[:, -1:] if last_only else hidden)
        hidden = self.model(packing.pack(input_ids), cache, packing, fused)
        return self.lm_head(
            hidden[0, packing.last][:, None] if last_only else packing.unpack(hidden)
        )


def _check_input(input_ids: Tensor, cache: KVCache | None) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype != torch.int64:
        raise ValueError(
            "model: input_ids must be (batch, seqlen >= 1) int64, got "
            f"{tuple(input_ids.shape)} {input_ids.dtype}"
        )
    if cache is not None and cache.batch_size != input_ids.shape[0]:
        raise ValueError(
            f"model: the cache holds {cache.batch_size} sequences, input_ids {input_ids.shape[0]}"
        )


def make_packing(
    input_ids: Tensor, cache: KVCache | None, attention_mask: Tensor | None
) -> Packing | None:
    """None where there is no padding."""
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape or attention_mask.is_floating_point():
        raise ValueError(
            f"model: attention_mask must be {tuple(input_ids.shape)} as input_ids, bool or integer,"
            f" got {tuple(attention_mask.shape)} {attention_mask.dtype}"
        )
    mask = attention_mask.to(input_ids.device)
    if bool(mask.all()):
        return None
    if cache is not None and cache.length > 0:
        raise ValueError(
            f"model: attention_mask has padding, but the cache already holds {cache.length} "
            "positions; expected padding in the first call only"
        )
    return Packing(mask)


def check_room(seqlen: int, cache: KVCache | None, model: CausalLM) -> None:
    """Raises ValueError where so many more tokens do not fit."""
    taken = 0 if cache is None else cache.length
    if cache is not None and taken + seqlen > cache.max_length:
        raise ValueError(
            f"model: the cache has room for {cache.max_length} positions; {taken} are "
            f"taken and {seqlen} more were given"
        )
    limit = model.config.max_position_embeddings
    if model.config.position == "learned" and taken + seqlen > limit:
        raise ValueError(
            f"model: input_ids reach position {taken + seqlen}, but the model has learned {limit}"
        )
