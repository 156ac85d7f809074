"""Keys and values of the tokens seen so far, and attention to them by fastq's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import AttentionRule, has_kernel, scores_mask, self_attention, torch_attention
from .config import ModelConfig
from .packing import Packing
from .rotary import alibi_slopes, apply_rotary, rotary_table


class KVCache:
    """A cache, preallocated for `max_length` positions of each sequence.

    `keys` and `values` are (layers, batch, max_length, kv_heads, head_dim); the first `seqlens[b]`
    positions of sequence b hold data (int32 (batch,), on the device). `length` is the largest of
    them. A model calls `begin`, then `attend` in every layer, then `commit`.

    With dtype torch.int8 they are quantised per token and head, and every query, a prompt's too,
    attends to the quantised ones. `key_scales` and `value_scales` are float32 (layers, batch,
    max_length, kv_heads) then, and None otherwise.
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
        self.key_scales = self.value_scales = None
        if dtype == torch.int8:
            # A head's scales lie side by side, as flash_decode reads them fastest.
            layers, _, _, kv_heads, _ = shape
            scales = torch.ones(2, layers, batch_size, kv_heads, max_length, device=device)
            self.key_scales, self.value_scales = scales.transpose(-1, -2)
        self.length = 0
        self.seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self._committed = self.seqlens.clone()
        self.alibi_slopes = alibi_slopes(config, device)
        self._rotary = rotary_table(config, max_length, device)
        self._interleaved = config.rotary_interleaved

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]

    def begin(self, seqlen: int, packing: Packing | None = None) -> Tensor:
        """So many new tokens come next, or those of a packing, into an empty cache.

        Returns their positions, int64 (batch, seqlen), or (1, total) with a packing.
        """
        if packing is not None:
            self.seqlens.copy_(packing.lengths)
            return packing.positions[None]
        torch.add(self._committed, seqlen, out=self.seqlens)
        return self._committed[:, None] + torch.arange(seqlen, device=self.seqlens.device)

    def commit(self, seqlen: int) -> None:
        """They are in every layer's part; seqlen is that of the longest sequence."""
        self._committed.copy_(self.seqlens)
        self.length += seqlen

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rule: AttentionRule,
        packing: Packing | None = None,
    ) -> Tensor:
        """Writes new keys and values and attends to all so far, causally.

        query is (batch, seqlen, heads, head_dim), key and value (batch, seqlen, kv_heads,
        head_dim), or (1, total, ...) with a packing, not yet rotated; returns a tensor like query.
        """
        attend = self._by_kernels if has_kernel(query) else self._by_torch
        if self.key_scales is not None and not has_kernel(query):
            raise NotImplementedError(
                f"KVCache: an int8 cache takes no {query.dtype} on {query.device.type}; expected "
                "float16 or bfloat16, or float32 on a CPU"
            )
        if packing is None:
            return attend(layer, query, key, value, rule, None)
        # The kernels leave out what stands before a sequence's first token.
        aligned = (packing.align_right(x) for x in (query, key, value))
        return packing.pack_aligned(attend(layer, *aligned, rule, packing))

    def _by_kernels(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rule: AttentionRule,
        packing: Packing | None,
    ) -> Tensor:
        # Here, as in attention.py: `runtime` may be imported by itself.
        from .. import flash_decode, kv_append

        keys, values = self.keys[layer], self.values[layer]
        scales = {}
        if self.key_scales is not None:
            scales = {"k_scale": self.key_scales[layer], "v_scale": self.value_scales[layer]}
        rotation = {}
        if self._rotary is not None:
            cos, sin = self._rotary
            rotation = {"rotary_cos": cos, "rotary_sin": sin}
            rotation["rotary_interleaved"] = self._interleaved
        store = (keys, values, self.seqlens)
        if self.length > 0 or scales:
            new = {"k": key, "v": value, **rotation}
            return flash_decode(query, *store, **scales, **rule.options(), **new)
        if rotation:
            query = kv_append(key, value, *store, q=query, **rotation)
        else:
            kv_append(key, value, *store)
        if packing is None:  # a prompt's kernel is faster there
            return self_attention(query, keys[:, : query.shape[1]], value, rule)
        query, value = packing.pack_aligned(query), packing.pack_aligned(value)
        key = keys[packing.rows, packing.positions][None]
        return packing.align_right(self_attention(query, key, value, rule, packing))

    def _by_torch(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rule: AttentionRule,
        packing: Packing | None,
    ) -> Tensor:
        """Where fastq has no kernel."""
        keys, values = self.keys[layer], self.values[layer]
        seqlen = query.shape[1]
        end = self.length + seqlen
        steps = torch.arange(seqlen - 1, -1, -1, device=query.device)
        positions = self.seqlens[:, None] - 1 - steps  # (batch, seqlen), negative at padding
        if self._rotary is not None:
            table = [part[positions.clamp(min=0)] for part in self._rotary]
            query = apply_rotary(query, *table, interleaved=self._interleaved)
            key = apply_rotary(key, *table, interleaved=self._interleaved)
        rows, columns = (positions >= 0).nonzero(as_tuple=True)
        keys[rows, positions[rows, columns]] = key[rows, columns]
        values[rows, positions[rows, columns]] = value[rows, columns]
        mask = scores_mask(positions, torch.arange(end, device=query.device), rule)
        return torch_attention(
            query, keys[:, :end], values[:, :end], rule, attn_mask=mask.to(query.dtype)
        )
