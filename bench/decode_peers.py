"""Decoding steps of others: transformers' models in 16 bits and by bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastq.runtime import ModelConfig

from .decoders import DTYPES, fill
from .llm_int8 import bitsandbytes_layers

EAGER, COMPILED, BITSANDBYTES = "transformers", "transformers-compiled", "bitsandbytes"
PEERS = (EAGER, COMPILED, BITSANDBYTES)


def why_not(peer: str, config: ModelConfig, device: torch.device) -> str | None:
    """What keeps a peer from this benchmark; None where nothing does."""
    packages = ["transformers"] + (["bitsandbytes"] if peer == BITSANDBYTES else [])
    for package in packages:
        if find_spec(package) is None:
            return f"{package} is not installed"
    if peer == EAGER:
        return None
    if device.type != "cuda":
        return f"it is timed on a GPU only, not on {device.type}"
    if peer == BITSANDBYTES and config.qkv_bias:
        return "it is timed on LLaMAs only"
    return None


def build(peer: str, config: ModelConfig, device: torch.device) -> nn.Module:
    """transformers' model of the same shape, with random weights and SDPA attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = DTYPES[device.type]
    theirs = AutoConfig.for_model(**config.to_dict())
    with device:
        model = AutoModelForCausalLM.from_config(theirs, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        fill(name, parameter, generator)
    if peer == BITSANDBYTES:
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, bitsandbytes_layers([child.weight])[0])
    return model


class PeerStep:
    """One token for each of `batch` sequences, after `context` tokens of each."""

    def __init__(self, peer: str, model: Any, batch: int, context: int, steps: int) -> None:
        from transformers import DynamicCache, StaticCache

        self._model = model
        self._is_compiled = peer == COMPILED
        device = model.device
        vocabulary = model.config.vocab_size
        self._prompt = torch.randint(vocabulary, (batch, context), device=device)
        self._ids = torch.randint(vocabulary, (batch, 1), device=device)
        self._forward: Callable[..., Any] = model.forward
        if self._is_compiled:
            torch.compiler.reset()
            # As generate() compiles it.
            self._forward = torch.compile(model.forward, mode="reduce-overhead")
            self._cache: Any = StaticCache(config=model.config, max_cache_len=context + steps)
        else:
            self._cache = DynamicCache(config=model.config)
        self._taken = 0
        self._read_prompt()

    def rewind(self) -> None:
        """Back to `context` tokens."""
        if not self._is_compiled:
            if self._taken > 0:
                self._cache.crop(-self._taken)
        elif self._taken > 0:
            self._cache.reset()
            self._read_prompt()
        self._taken = 0

    @torch.no_grad()
    def _read_prompt(self) -> None:
        self._model(self._prompt, past_key_values=self._cache, use_cache=True)

    @torch.no_grad()
    def step(self) -> Tensor:
        self._taken += 1
        if self._is_compiled:
            torch.compiler.cudagraph_mark_step_begin()
        return self._forward(self._ids, past_key_values=self._cache, use_cache=True).logits
