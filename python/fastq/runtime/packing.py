"""Batches of sequences of different lengths, without their padding."""

from __future__ import annotations

import torch
from torch import Tensor


class Packing:
    """Where the tokens of a padded batch are.

    `mask` is (batch, seqlen), bool or 0 and 1, true at tokens: padding may stand on the left, on
    the right or between. Of the `total` tokens, sequence after sequence, `rows` and `columns` are
    the places in the batch and `positions` the places in their own sequence, int64 (total,).
    `lengths` is int32 (batch,), `cu_seqlens` int32 (batch + 1,). Building one waits for a GPU.

    Raises ValueError for a sequence without tokens.
    """

    def __init__(self, mask: Tensor) -> None:
        mask = mask.bool()
        self.shape = mask.shape
        self.rows, self.columns = mask.nonzero(as_tuple=True)
        self.positions = (mask.cumsum(1) - 1)[self.rows, self.columns]
        self.lengths = mask.sum(1, dtype=torch.int32)
        lengths = self.lengths.tolist()
        self.max_length = max(lengths)
        if min(lengths) == 0:
            raise ValueError(
                f"model: attention_mask has no token in sequence {lengths.index(0)}, expected at "
                "least one"
            )
        self.cu_seqlens = torch.nn.functional.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self.last = self.cu_seqlens[1:].long() - 1

    def pack(self, x: Tensor) -> Tensor:
        """(batch, seqlen, ...) to (1, total, ...)."""
        return x[self.rows, self.columns][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, total, ...) to (batch, seqlen, ...), zeros at the padding."""
        return self._spread(x, self.shape[1], self.columns)

    def align_right(self, x: Tensor) -> Tensor:
        """(1, total, ...) to (batch, max_length, ...), every sequence's last token at the end."""
        return self._spread(x, self.max_length, self._right_columns)

    def pack_aligned(self, x: Tensor) -> Tensor:
        """`align_right` back."""
        return x[self.rows, self._right_columns][None]

    @property
    def _right_columns(self) -> Tensor:
        return self.max_length - self.lengths[self.rows] + self.positions

    def _spread(self, x: Tensor, seqlen: int, columns: Tensor) -> Tensor:
        out = x.new_zeros(self.shape[0], seqlen, *x.shape[2:])
        return out.index_put((self.rows, columns), x[0])
