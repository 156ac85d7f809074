"""Keys and values of the tokens seen so far, and attention to them by fastq's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import has_kernel, torch_attention
from .config import ModelConfig
from .rotary import apply_rotary, rotary_table


class KVCache:
    """A cache, preallocated for `max_length` positions.

    `keys` and `values` are (layers, batch, max_length, kv_heads, head_dim); the first `length`
    positions hold data. A model calls `begin`, then `attend` in every layer, then `commit`.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (
            config.num_hidden_layers,
            batch_size,
            max_length,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0
        self._seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self._rotary = rotary_table(config, max_length, device)

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]

    def begin(self, seqlen: int) -> None:
        """So many new tokens come next."""
        self._seqlens.fill_(self.length + seqlen)

    def commit(self, seqlen: int) -> None:
        """They are in every layer's part."""
        self.length += seqlen

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Writes new keys and values and attends to all so far, causally.

        query is (batch, seqlen, heads, head_dim), key and value (batch, seqlen, kv_heads,
        head_dim), not yet rotated; returns (batch, seqlen, heads, head_dim).
        """
        # Here, as in attention.py: `runtime` may be imported by itself.
        from .. import flash_attention, flash_decode, kv_append

        keys, values = self.keys[layer], self.values[layer]
        cos, sin = self._rotary
        if not has_kernel(query):
            return self._attend_by_torch(keys, values, query, key, value)
        query = kv_append(
            key, value, keys, values, self._seqlens, rotary_cos=cos, rotary_sin=sin, q=query
        )
        if self.length == 0:  # nothing but the new: a prompt's kernel is faster there
            seqlen = query.shape[1]
            return flash_attention(query, keys[:, :seqlen], value, causal=True)
        return flash_decode(query, keys, values, self._seqlens)

    def _attend_by_torch(
        self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Where fastq has no kernel."""
        seqlen = query.shape[1]
        end = self.length + seqlen
        table = [part[self.length : end] for part in self._rotary]
        keys[:, self.length : end] = apply_rotary(key, *table)
        values[:, self.length : end] = value
        rows = torch.arange(self.length, end, device=query.device)
        mask = torch.arange(end, device=query.device) <= rows[:, None]
        query = apply_rotary(query, *table)
        return torch_attention(query, keys[:, :end], values[:, :end], attn_mask=mask)
