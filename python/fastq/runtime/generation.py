"""Generation with a cache of keys and values: prompts of any lengths, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .decode_graph import DecodeStep
from .kv_cache import KVCache
from .memory import explained_out_of_memory
from .model import CausalLM
from .sampling import SamplingParameters, penalise_repetition, sample, uniforms
from .text_stream import TextStream
from .tokenizer import Tokenizer

KV_CACHES = (None, "int8")


@dataclass
class Generation:
    """What followed one prompt.

    `ids` are the new tokens, the one that ended it included. `logprobs`, where asked for, are their
    log-probabilities under the model itself, before any penalty, temperature or cut.
    `finish_reason` is "stop" (a stop token or a stop string) or "length". `text`, where a tokenizer
    was given, is what the tokens say, up to a stop string.
    """

    ids: list[int]
    logprobs: list[float] | None
    finish_reason: str
    text: str | None = None


class Step(NamedTuple):
    """The next token of every sequence, None of those that have ended before, and likewise their
    log-probabilities (None where not asked for) and the reasons of those that end with it."""

    tokens: list[int | None]
    logprobs: list[float | None] | None
    finish_reasons: list[str | None]


@torch.no_grad()
def generate_tokens(
    model: CausalLM,
    prompts: Tensor | Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    logprobs: bool = False,
    kv_cache: str | None = None,
    use_graph: bool | None = None,
    ended: set[int] | None = None,
) -> Iterator[Step]:
    """Yields a `Step` for each new token, until every sequence has ended.

    The host waits for the device once a step, for the tokens. A GPU computes the step after them
    meanwhile, in vain where all sequences end.

    Args:
        model: the decoder.
        prompts: lists of token ids, of any lengths; one such list; or (batch, seqlen) int64.
        max_new_tokens: an upper bound; the longest prompt and the new tokens must fit the model's
            max_position_embeddings.
        min_new_tokens: no stop token is chosen before so many tokens.
        temperature, top_k, top_p, repetition_penalty: as in `SamplingParameters`; the default
            temperature of 0 is greedy.
        seed: an int s gives sequence b the seed s + b; or one for each sequence; None takes new
            ones. The n-th draw of a sequence depends on its seed and n alone. So it has the same
            tokens alone, in any batch and on any device, as far as its logits are the same: their
            last bits may depend on the batch where torch multiplies in floating point.
        stop_token_ids: tokens that end a sequence; None takes the config's eos_token_ids, () none.
            The ending token is yielded.
        logprobs: tell the log-probabilities of the tokens, under the model itself.
        kv_cache: "int8" stores keys and values in 8 bits, with a scale for each token and head;
            None in the model's dtype.
        use_graph: whether decoding runs as a CUDA graph (see `DecodeStep`); None: where it can and
            it pays.
        ended: a set which the caller may add indices of sequences to, to end them.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, too many positions, or a number
            out of range.
        NotImplementedError: a CUDA graph is asked for, but there can be none.
        torch.OutOfMemoryError: says what the cache takes and which batch or length would fit.
    """
    sampling = SamplingParameters(temperature, top_k, top_p, repetition_penalty)
    rows = _checked_prompts(prompts, model.config.vocab_size)
    longest = max(map(len, rows))
    _check_lengths(longest, max_new_tokens, min_new_tokens, model.config.max_position_embeddings)
    if kv_cache not in KV_CACHES:
        raise ValueError(f"generate: kv_cache is {kv_cache!r}, expected None or 'int8'")
    stops = model.config.eos_token_ids if stop_token_ids is None else tuple(stop_token_ids)
    chooser = _Chooser(model, rows, sampling, _seeds(seed, len(rows)), max_new_tokens, stops)
    ended = set() if ended is None else ended
    capacity = longest + max_new_tokens
    explained = partial(
        explained_out_of_memory,
        model.config,
        len(rows),
        capacity,
        dtype=model.dtype,
        kv_cache=kv_cache,
        device=model.device,
    )
    with explained():
        cache = new_cache(model, len(rows), capacity, kv_cache)
        logits = _prefill(model, rows, cache)
    decode = DecodeStep(model, cache, max_new_tokens - 1, use_graph=use_graph)
    runs_ahead = _runs_ahead(model.device)
    for step in range(max_new_tokens):
        tokens = chooser.choose(logits, step, may_stop=step >= min_new_tokens)
        chosen = _Chosen(tokens, logits if logprobs else None)
        is_last = step + 1 == max_new_tokens
        if runs_ahead and not is_last:
            with explained():
                logits = decode(tokens)
        yield _tell(chosen, stops, ended, is_last)
        if len(ended) == len(rows):  # all have after the last step
            return
        if not runs_ahead:
            with explained():
                logits = decode(tokens)


def generate(
    model: CausalLM,
    prompts: Tensor | Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokenizer: Tokenizer | None = None,
    stop: str | Sequence[str] = (),
    **options,
) -> list[Generation]:
    """What follows each prompt, in their order; a list of one for a single prompt.

    Args:
        tokenizer: of the model, for `stop` and for the text of the results.
        stop: strings that end a sequence; its text then ends before the string.
        model, prompts, max_new_tokens, options: as in `generate_tokens`, which raises the same.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if stop and tokenizer is None:
        raise ValueError("generate: stop is given, expected a tokenizer too, which tells the text")
    rows = _checked_prompts(prompts, model.config.vocab_size)
    results = [Generation([], [] if options.get("logprobs") else None, "length") for _ in rows]
    streams = None
    if tokenizer is not None:
        streams = [TextStream(tokenizer, stop=stop, prompt=row) for row in rows]
        pieces: list[list[str]] = [[] for _ in rows]
    ended: set[int] = set()
    for step in generate_tokens(model, rows, max_new_tokens=max_new_tokens, ended=ended, **options):
        for b, token in enumerate(step.tokens):
            if token is None:
                continue
            results[b].ids.append(token)
            if step.logprobs is not None:
                results[b].logprobs.append(step.logprobs[b])
            results[b].finish_reason = step.finish_reasons[b] or "length"
            if streams is None:
                continue
            pieces[b].append(streams[b].push(token))
            if streams[b].stopped:
                results[b].finish_reason = "stop"
                ended.add(b)
    if streams is not None:
        for result, stream, texts in zip(results, streams, pieces, strict=True):
            result.text = "".join(texts) + stream.finish()
    return results


def stream_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    **options,
) -> Iterator[str]:
    """Yields the text that follows one prompt, piece by piece, as soon as it is certain.

    A character whose bytes are spread over tokens comes whole; what may begin a stop string waits.

    Args:
        prompt: a text, or its token ids.
        model, max_new_tokens, stop, options: as in `generate`, which raises the same.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    stream = TextStream(tokenizer, stop=stop, prompt=ids)
    for step in generate_tokens(model, ids, max_new_tokens=max_new_tokens, **options):
        piece = stream.push(step.tokens[0])
        if piece:
            yield piece
        if stream.stopped:
            return
    rest = stream.finish()
    if rest:
        yield rest


def new_cache(
    model: CausalLM, batch_size: int, max_length: int, kv_cache: str | None = None
) -> KVCache:
    """An empty cache in the model's dtype, or with kv_cache="int8" in 8 bits."""
    if kv_cache is None:
        return model.new_cache(batch_size, max_length)
    return model.new_cache(batch_size, max_length, dtype=torch.int8)


class _Chooser:
    """Chooses every sequence's next token, all of it on the device."""

    def __init__(
        self,
        model: CausalLM,
        rows: list[list[int]],
        sampling: SamplingParameters,
        seeds: list[int],
        max_new_tokens: int,
        stops: tuple[int, ...],
    ) -> None:
        self._sampling = sampling
        known = [stop for stop in stops if 0 <= stop < model.config.vocab_size]
        self._stops = torch.tensor(known, dtype=torch.int64, device=model.device)
        self._uniforms = self._seen = None
        if sampling.temperature > 0:
            self._uniforms = uniforms(seeds, max_new_tokens, model.device)
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool)
            for seen, row in zip(self._seen, rows, strict=True):
                seen[row] = True
            self._seen = self._seen.to(model.device)

    def choose(self, logits: Tensor, step: int, *, may_stop: bool) -> Tensor:
        """Tokens (batch,) int64 for logits (batch, vocab_size)."""
        how = self._sampling
        if self._seen is not None:
            logits = penalise_repetition(logits, self._seen, how.repetition_penalty)
        if not may_stop:
            logits = logits.index_fill(-1, self._stops, -torch.inf)
        tokens = sample(
            logits,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            uniform=None if self._uniforms is None else self._uniforms[step],
        )
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens


def _prefill(model: CausalLM, rows: list[list[int]], cache: KVCache) -> Tensor:
    """Logits (batch, vocab_size) of what follows the prompts, which go into the cache."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = {}
    if any(len(row) < longest for row in rows):
        tokens = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        mask["attention_mask"] = torch.tensor(tokens, device=model.device)
    return model(ids, cache, last_only=True, **mask)[:, -1]


def _runs_ahead(device: torch.device) -> bool:
    """Whether the next step is launched before the host looks at the tokens that it follows."""
    return device.type == "cuda"


class _Chosen:
    """The tokens that were chosen and, where `logits` are given, their log-probabilities, on their
    way to the host. What is launched later may overwrite the logits, and is not waited for."""

    def __init__(self, tokens: Tensor, logits: Tensor | None) -> None:
        values = tokens
        if logits is not None:
            chosen = logits.float().log_softmax(-1).gather(-1, tokens[:, None])
            values = torch.cat((tokens[:, None].double(), chosen.double()), dim=1)
        self._has_logprobs = logits is not None
        self._arrived = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.current_stream(values.device).record_event()
        else:
            self._values = values

    def wait(self) -> tuple[list[int], list[float] | None]:
        """Tokens and log-probabilities; None where those were not asked for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values = self._values.tolist()
        if not self._has_logprobs:
            return values, None
        return [int(token) for token, _ in values], [logprob for _, logprob in values]


def _tell(chosen: _Chosen, stops: tuple[int, ...], ended: set[int], is_last: bool) -> Step:
    """Waits for the tokens; adds to `ended` what ends with them."""
    values, logprobs = chosen.wait()
    if logprobs is not None:
        logprobs = [None if b in ended else logprob for b, logprob in enumerate(logprobs)]
    reasons: list[str | None] = [None] * len(values)
    shown: list[int | None] = list(values)
    for b, token in enumerate(values):
        if b in ended:
            shown[b] = None
        elif token in stops:
            reasons[b] = "stop"
        elif is_last:
            reasons[b] = "length"
    ended.update(b for b, reason in enumerate(reasons) if reason is not None)
    return Step(shown, logprobs, reasons)


def _checked_prompts(
    prompts: Tensor | Sequence[int] | Sequence[Sequence[int]], vocab_size: int
) -> list[list[int]]:
    given = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if given and not any(isinstance(row, (Sequence, Tensor)) for row in given):
        given = [given]
    rows = []
    for row in given:
        row = row.tolist() if isinstance(row, Tensor) else row
        is_ids = isinstance(row, Sequence) and len(row) > 0
        if not is_ids or not all(isinstance(token, int) for token in row):
            raise ValueError(
                f"generate: prompt {len(rows)} is {row!r}, expected at least one token id"
            )
        rows.append(list(row))
        if not 0 <= min(row) <= max(row) < vocab_size:
            wrong = min(row) if min(row) < 0 else max(row)
            raise ValueError(
                f"generate: prompt {len(rows) - 1} holds token {wrong}, expected 0 to "
                f"{vocab_size - 1}"
            )
    if not rows:
        raise ValueError("generate: prompts is empty, expected at least one prompt")
    return rows


def _check_lengths(longest: int, max_new_tokens: int, min_new_tokens: int, limit: int) -> None:
    if max_new_tokens < 1 or longest + max_new_tokens > limit:
        raise ValueError(
            f"generate: max_new_tokens is {max_new_tokens}, expected 1 to {limit - longest}: "
            f"the prompt takes {longest} of {limit} positions"
        )
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(
            f"generate: min_new_tokens is {min_new_tokens}, expected 0 to {max_new_tokens}"
        )


def _seeds(seed: int | Sequence[int] | None, batch_size: int) -> list[int]:
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, int):
        return [seed + b for b in range(batch_size)]
    if len(seed) != batch_size:
        raise ValueError(f"generate: seed holds {len(seed)} seeds, expected {batch_size}")
    return list(seed)
