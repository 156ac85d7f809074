"""Perplexity of a language model on a long run of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PADDING = -100  # F.cross_entropy leaves these targets out


def windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Cuts tokens (T,) into inputs and targets, each (ceil((T - 1) / context), context).

    Every token but the first is a target exactly once, predicted from the tokens before it in its
    own window: a window sees nothing of the one before. The last window is padded, its targets
    there with -100.
    """
    count = -(-(len(tokens) - 1) // context)
    padding = count * context - (len(tokens) - 1)
    inputs = F.pad(tokens[:-1], (0, padding), value=0)
    targets = F.pad(tokens[1:], (0, padding), value=_PADDING)
    return inputs.view(count, context), targets.view(count, context)


@torch.no_grad()
def nats_per_token(
    model: nn.Module,
    tokens: Tensor,
    context: int,
    *,
    batch: int = 16,
    autocast: torch.dtype | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> float:
    """Mean negative log likelihood of tokens (T,); its exponential is the perplexity.

    `on_progress` is called with the number of tokens of each finished batch. Leaves the model in
    eval mode.
    """
    model.eval()
    inputs, targets = windows(tokens, context)
    total, count = 0.0, 0
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        scope = contextlib.nullcontext()
        if autocast is not None:
            scope = torch.autocast(tokens.device.type, autocast)
        with scope:
            logits = model(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")
        predicted = int((y != _PADDING).sum())
        total += loss.item()
        count += predicted
        if on_progress is not None:
            on_progress(predicted)
    return total / count
