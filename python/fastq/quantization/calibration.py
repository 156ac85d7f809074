"""The data that a model is calibrated on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 64
LENGTH = 512
_BATCH = 4
_SEED = 0


def calibration_batches(
    source: str | Path,
    tokenizer: Any,
    *,
    samples: int = SAMPLES,
    length: int = LENGTH,
    batch_size: int = _BATCH,
) -> list[Tensor]:
    """Token ids of a text, in pieces that lie spread over it.

    Args:
        source: the path of a UTF-8 text file, or "stdlib": the source of the running Python's
            standard library, without the modules that :mod:`fastq.demo.corpus` holds out.
        tokenizer: has `encode(text, add_special_tokens=...)`, which returns ids: the runtime's
            :class:`fastq.runtime.Tokenizer` or one of transformers.
        samples: how many pieces; fewer where the text is too short.
        length: tokens of a piece.
        batch_size: pieces of a batch.

    Returns:
        int64 ``(batch_size, length)`` tensors; the last one may hold fewer pieces. A text shorter
        than `length` gives one piece of its own length.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a text of less than two tokens, or a size below 1.
    """
    for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"calibration_batches: {name} is {value}, expected 1 or more")
    ids: list[int] = []
    if source == "stdlib":
        for text in _stdlib_texts():
            ids += _encode(tokenizer, text)
            if len(ids) >= samples * length:
                break
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"calibration: {path}: no such file; 'stdlib' needs none")
        ids = _encode(tokenizer, path.read_text(encoding="utf-8", errors="replace"))
    if len(ids) < 2:
        raise ValueError(f"calibration: {source} holds {len(ids)} tokens, expected 2 or more")
    length = min(length, len(ids))
    count = min(samples, len(ids) // length)
    step = (len(ids) - length) / max(count - 1, 1)
    starts = [int(i * step) for i in range(count)]
    pieces = torch.tensor([ids[start : start + length] for start in starts], dtype=torch.int64)
    return list(pieces.split(batch_size))


def resolve(calibration: Any, tokenizer: Any, model: nn.Module) -> Iterable[Any] | None:
    """`calibration` of :func:`fastq.quantize` as batches that can be gone through twice."""
    if calibration is None:
        return None
    if isinstance(calibration, (str, Path)):
        if tokenizer is None:
            raise ValueError(
                f"quantize: tokenizer is None, expected one with calibration={str(calibration)!r}"
            )
        most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        length = min(LENGTH, most) if isinstance(most, int) else LENGTH
        return calibration_batches(calibration, tokenizer, length=length)
    if isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"quantize: calibration is a {type(calibration).__name__}, expected batches in an "
            "iterable, or the path of a text"
        )
    if iter(calibration) is calibration:  # an iterator, which would be exhausted
        calibration = list(calibration)
    return calibration


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _stdlib_texts() -> Iterator[str]:
    """The training texts in an order of no meaning, the same each time."""
    from ..demo import corpus

    texts = [text for _, text in corpus.training_texts(corpus.stdlib_folder())]
    random.Random(_SEED).shuffle(texts)
    yield from texts
