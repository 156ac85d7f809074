"""Perplexity of a language model on a long run of tokens, by a sliding window."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PADDING = -100  # F.cross_entropy leaves these targets out


def windows(tokens: Tensor, context: int, stride: int | None = None) -> tuple[Tensor, Tensor]:
    """Cuts tokens (T,) into inputs and targets, each (count, context); window k begins at token
    k * stride.

    Every token but the first is a target exactly once. Behind the first window, those that an
    earlier one has scored are left out: the others have at least context - stride tokens before
    them, and one more. `stride` is at most the context and by default equal to it: then a window
    sees nothing of the one before. Targets left out, and the padding of the last window, are -100.

    Raises ValueError for fewer than two tokens, or a context or stride out of range.
    """
    stride = context if stride is None else stride
    if tokens.dim() != 1 or len(tokens) < 2:
        raise ValueError(
            f"perplexity: tokens has shape {tuple(tokens.shape)}, expected (T,) with T at least 2"
        )
    if context < 1 or not 1 <= stride <= context:
        raise ValueError(
            f"perplexity: context is {context} and stride {stride}, expected 1 <= stride <= context"
        )
    predicted = len(tokens) - 1
    count = 1 + max(0, -(-(predicted - context) // stride))
    padding = context + (count - 1) * stride - predicted
    inputs = F.pad(tokens[:-1], (0, padding), value=0).unfold(0, context, stride)
    targets = F.pad(tokens[1:], (0, padding), value=_PADDING).unfold(0, context, stride)
    if stride < context:
        targets = targets.clone()
        targets[1:, : context - stride] = _PADDING
    return inputs, targets


@torch.no_grad()
def nats_per_token(
    model: nn.Module,
    tokens: Tensor,
    context: int,
    *,
    stride: int | None = None,
    batch: int = 16,
    kv_cache: str | None = None,
    autocast: torch.dtype | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> float:
    """Mean negative log likelihood of tokens (T,), but for the first.

    Args:
        model: takes ids (batch, context) int64 to logits (batch, context, vocab_size). It is left
            in eval mode.
        tokens: int64, on the model's device.
        context, stride: as in `windows`.
        batch: windows that the model takes at once.
        kv_cache: "int8" has the model, a `fastq.runtime.CausalLM`, attend to keys and values in 8
            bits, as it would while generating.
        autocast: a dtype that torch computes in, where the model's own is another.
        on_progress: is called with the number of tokens that each batch has scored.
    """
    model.eval()
    inputs, targets = windows(tokens, context, stride)
    total, count = 0.0, 0
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        scope = contextlib.nullcontext()
        if autocast is not None:
            scope = torch.autocast(tokens.device.type, autocast)
        with scope:
            logits = _logits(model, x, kv_cache)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")
        predicted = int((y != _PADDING).sum())
        total += loss.item()
        count += predicted
        if on_progress is not None:
            on_progress(predicted)
    return total / count


def perplexity(
    model: nn.Module, tokens: Tensor, *, context: int, stride: int | None = None, **options
) -> float:
    """The exponential of `nats_per_token`, which says what the arguments are.

    A sliding window as Hugging Face documents it ("Perplexity of fixed-length models"), but that
    each token is scored exactly once, at any stride.
    """
    return math.exp(nats_per_token(model, tokens, context, stride=stride, **options))


def _logits(model: nn.Module, ids: Tensor, kv_cache: str | None) -> Tensor:
    if kv_cache is None:
        return model(ids)
    # Here: `evaluation` may be imported where the native library is not built.
    from ..runtime.generation import new_cache

    return model(ids, new_cache(model, *ids.shape, kv_cache))
