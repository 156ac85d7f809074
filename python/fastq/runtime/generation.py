"""Greedy and sampled generation with a KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .model import CausalLM


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token for each row of logits (batch, vocab_size); returns (batch,) int64.

    `temperature` 0 takes the most likely token. `top_k` keeps the k most likely tokens, `top_p`
    then the fewest whose probabilities reach p (at least one); `generator` is on logits' device.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020 (top-p).
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        largest, index = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, largest)
    probability = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = probability.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        probability = torch.zeros_like(probability).scatter(
            -1, index, ordered.masked_fill(before >= top_p, 0.0)
        )
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate_tokens(
    model: CausalLM,
    input_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_ids: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every sequence, (batch,) int64 on the model's device.

    Args:
        model: the decoder.
        input_ids: (batch, seqlen) int64, all of one length, or one sequence of ids.
        max_new_tokens: an upper bound; prompt and new tokens must fit the model's
            max_position_embeddings.
        temperature, top_k, top_p: as in `sample`; the default temperature of 0 is greedy.
        eos_token_ids: tokens that end a sequence; None takes the config's, () none. The ending
            token is yielded. A sequence that has ended repeats it until all have.
        generator: for sampling, on the model's device; None uses torch's own.

    Raises:
        ValueError: an empty prompt, too many positions, or a sampling value out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    ids = torch.as_tensor(input_ids, dtype=torch.int64, device=model.device)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"generate: input_ids has shape {tuple(ids.shape)}, expected (batch, seqlen >= 1)"
        )
    total = ids.shape[1] + max_new_tokens
    limit = model.config.max_position_embeddings
    if max_new_tokens < 1 or total > limit:
        raise ValueError(
            f"generate: max_new_tokens is {max_new_tokens}, expected 1 to "
            f"{limit - ids.shape[1]}: the prompt takes {ids.shape[1]} of {limit} positions"
        )
    ends = model.config.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
    end_ids = torch.tensor(ends, dtype=torch.int64, device=ids.device)
    cache = model.new_cache(ids.shape[0], total)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    token = None
    for _ in range(max_new_tokens):
        logits = model(ids, cache, last_only=True)[:, -1]
        drawn = sample(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        token = drawn if token is None else torch.where(ended, token, drawn)
        yield token
        if ends:
            ended |= torch.isin(token, end_ids)
            if ended.all():
                return
        ids = token[:, None]


def generate(model: CausalLM, input_ids: Tensor | Sequence[int], **options) -> Tensor:
    """The new tokens, (batch, new) int64 with new <= max_new_tokens.

    Takes what `generate_tokens` takes, and raises the same.
    """
    return torch.stack(list(generate_tokens(model, input_ids, **options)), dim=1)


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature is {temperature}, expected a number >= 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}, expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}, expected a number in (0, 1]")
