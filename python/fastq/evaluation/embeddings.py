"""The table of schemes for an encoder: how far each turns the embeddings of sentences."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..progress import OnProgress
from ..quantization import quantize
from ..runtime import Encoder, Tokenizer
from .speed import weight_bytes
from .table import ROWS, Row

_BATCH = 32
EMBEDDING_ROWS = tuple(row for row in ROWS if row.kv_cache is None)  # an encoder has no cache


@dataclass
class EmbeddingLine:
    """What a row gave beside the first row: the cosine between the two embeddings of a sentence,
    its mean and the least; and of how many sentences the nearest other one stays the same."""

    name: str
    scheme: str | None
    options: dict[str, Any]
    cosine: float
    min_cosine: float
    same_neighbour: float
    weight_bytes: int


@torch.no_grad()
def embed(encoder: Encoder, tokenizer: Tokenizer, sentences: Sequence[str]) -> Tensor:
    """Sentence embeddings (sentences, hidden_size), float32 on the CPU: the mean of the hidden
    states over a sentence's tokens, of length 1, as sentence-transformers has it.

    Raises ValueError for a sentence of more tokens than the encoder has positions.
    """
    ids = tokenizer.encode_batch(list(sentences))
    limit = encoder.config.max_position_embeddings
    for number, row in enumerate(ids, 1):
        if len(row) > limit:
            raise ValueError(
                f"embed: sentence {number} has {len(row)} tokens, expected at most {limit}"
            )
    rows = []
    for start in range(0, len(ids), _BATCH):
        pieces = [torch.tensor(row) for row in ids[start : start + _BATCH]]
        input_ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        lengths = torch.tensor([len(piece) for piece in pieces])[:, None]
        mask = (torch.arange(input_ids.shape[1]) < lengths).to(encoder.device)
        hidden = encoder(input_ids.to(encoder.device), attention_mask=mask).hidden
        # Hidden states are zeros at padding, and the mean's divisor does not change a direction.
        rows.append(F.normalize(hidden.float().sum(1), dim=-1).cpu())
    return torch.cat(rows)


def measure_embeddings(
    encoder: Encoder,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    *,
    calibration: Sequence[Any],
    rows: Sequence[Row] = EMBEDDING_ROWS,
    on_progress: OnProgress | None = None,
) -> list[EmbeddingLine]:
    """Quantises copies of a float encoder by each row and compares their sentence embeddings.

    Args:
        encoder: in float; it stays as it is. A copy of it is in memory beside it.
        tokenizer: its own.
        sentences: at least two.
        calibration: batches of what the encoder takes, for the rows that need them.
        rows: what to measure; the first is what the others are compared with.
        on_progress: see `OnProgress`.

    Raises:
        ValueError: fewer than two sentences, or one that is too long.
    """
    if len(sentences) < 2:
        raise ValueError(f"measure_embeddings: got {len(sentences)} sentences, expected 2 or more")
    report = on_progress or (lambda label, done, total: None)
    lines: list[EmbeddingLine] = []
    expected = None
    for done, row in enumerate(rows):
        report(row.name, done, len(rows))
        candidate = encoder
        if row.scheme is not None:
            batches = calibration if row.is_calibrated else None
            candidate = quantize(
                copy.deepcopy(encoder), row.scheme, calibration=batches, **row.options
            )
        actual = embed(candidate, tokenizer, sentences)
        expected = actual if expected is None else expected
        cosine = (actual.double() * expected.double()).sum(-1)
        same = _nearest(actual) == _nearest(expected)
        lines.append(
            EmbeddingLine(
                name=row.name,
                scheme=row.scheme,
                options=dict(row.options),
                cosine=cosine.mean().item(),
                min_cosine=cosine.min().item(),
                same_neighbour=same.double().mean().item(),
                weight_bytes=weight_bytes(candidate),
            )
        )
    return lines


def _nearest(embeddings: Tensor) -> Tensor:
    """Of each row, the index of the other one with the largest cosine."""
    return (embeddings @ embeddings.t()).fill_diagonal_(-2).argmax(-1)
