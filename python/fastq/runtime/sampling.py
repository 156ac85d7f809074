"""From logits to tokens: repetition penalty, temperature, top-k, top-p, and the draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_TEMPERATURE = 1e-30  # float32 holds it


@dataclass(frozen=True)
class SamplingParameters:
    """How the next token is chosen. The steps come in this order.

    Args:
        repetition_penalty: of every token that the sequence holds already, prompt included: a
            positive logit is divided by it, a negative one multiplied. 1 changes nothing. Keskar
            et al., "CTRL: A Conditional Transformer Language Model", 2019.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens; None keeps all.
        top_p: then keeps the fewest whose probabilities reach p, at least one; None keeps all.
            Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.

    Raises:
        ValueError: a number out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check(self.temperature, 0 <= self.temperature < math.inf, "temperature", "a number >= 0")
        penalty = self.repetition_penalty
        _check(penalty, 0 < penalty < math.inf, "repetition_penalty", "a number > 0")
        if self.top_k is not None:
            _check(self.top_k, self.top_k >= 1, "top_k", "at least 1")
        if self.top_p is not None:
            _check(self.top_p, 0 < self.top_p <= 1, "top_p", "a number in (0, 1]")


def _check(value: float, is_right: bool, name: str, expected: str) -> None:
    if not is_right:
        raise ValueError(f"generate: {name} is {value}, expected {expected}")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (batch, vocab_size) with those of the tokens in `seen`, bool of the same shape,
    divided by the penalty where positive and multiplied by it where negative."""
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalised, logits)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token for each row of logits (batch, vocab_size); returns (batch,) int64.

    `temperature`, `top_k` and `top_p` are those of `SamplingParameters`. `uniform` (batch,) holds
    a number in [0, 1) for each row and decides its draw; by default the numbers come from
    `generator`, which is on logits' device, or torch's own. Nothing waits for the device.

    Raises ValueError for a number out of its range.
    """
    SamplingParameters(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    ordered, index = logits.float().sort(-1, descending=True)
    # The largest becomes 0 first, so that no temperature makes it overflow.
    ordered = (ordered - ordered[:, :1]) / max(temperature, _LEAST_TEMPERATURE)
    if top_k is not None:
        ordered, index = ordered[:, :top_k], index[:, :top_k]
    probability = ordered.softmax(-1)
    if top_p is not None and top_p < 1:
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= top_p, 0.0)
    if uniform is None:
        uniform = torch.rand(len(logits), generator=generator, device=logits.device)
    # In float64 no draw of 24 bits can reach the sum, so none falls on a token of probability 0.
    reached = probability.double().cumsum(-1)
    threshold = uniform[:, None].double() * reached[:, -1:]
    place = torch.searchsorted(reached, threshold, right=True).clamp_max(reached.shape[-1] - 1)
    return index.gather(-1, place).squeeze(-1)


def uniforms(seeds: list[int], count: int, device: torch.device | str) -> Tensor:
    """(count, len(seeds)) float32 in [0, 1): column b is the stream of seeds[b], whatever the
    other seeds, the count and the device are."""
    columns = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        columns.append(torch.rand(count, generator=generator))
    return torch.stack(columns, dim=1).to(device)
