"""A step of decoding as one CUDA graph.

A step of a fused decoder is some ten kernels a layer, one of a decoder's modules some thirty, each
of a few microseconds: launching them one by one takes the host longer than running them takes the
GPU. A graph launches all of them at once. All that changes from step to step is read on the device:
the tokens and the lengths of the sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import has_kernel
from .kv_cache import KVCache
from .model import CausalLM, DecoderLayer, check_room

# A capture takes about as long as two steps without a graph.
FEWEST_STEPS = 8


@torch.no_grad()
def why_no_graph(model: CausalLM, cache: KVCache) -> str | None:
    """What keeps a model's steps from a CUDA graph; None where nothing does."""
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}, expected cuda"
    if not has_kernel(torch.empty(0, dtype=model.dtype, device=model.device)):
        return f"attention has no kernel for {model.dtype} on cuda"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"  # its cache of cast weights would stay in the graph
    return why_not_capturable(model)


def why_not_capturable(model: CausalLM) -> str | None:
    """Which module is not known to launch the same kernels in every step, without waiting."""
    # Here: `runtime` may be imported by itself.
    from ..nn import Int8Linear, OutlierLinear

    linears = (nn.Linear, Int8Linear, OutlierLinear)
    for index, layer in enumerate(model.model.layers):
        if type(layer) is not DecoderLayer:
            return f"model.layers.{index} is a {type(layer).__name__}, expected a DecoderLayer"
    for name, module in model.named_modules():
        if name.endswith(("_proj", "lm_head")) and type(module) not in linears:
            kinds = "Linear, Int8Linear or OutlierLinear"
            return f"{name} is a {type(module).__name__}, expected a {kinds}"
        if module._forward_hooks or module._forward_pre_hooks:
            return "its modules have hooks"
    return None


class DecodeStep:
    """`model(tokens[:, None], cache)` step by step, by a CUDA graph where that can be.

    The first step runs without: it loads the kernels and lets libraries choose theirs, which a
    capture does not allow. The second is captured, with the addresses of the model's weights and
    the cache's buffers, and this and all later ones are replayed. The model must not change
    meanwhile, nor the cache but by this.

    Args:
        model: the decoder.
        cache: holds the prompts.
        num_steps: how many will be asked for, at most.
        use_graph: False runs every step without a graph; True raises where there can be none; None
            takes one where there can be and it pays for so many steps.

    Raises NotImplementedError where `use_graph` cannot be had, with the reason.
    """

    def __init__(
        self, model: CausalLM, cache: KVCache, num_steps: int, *, use_graph: bool | None = None
    ) -> None:
        if use_graph is None and num_steps < FEWEST_STEPS:
            use_graph = False
        reason = "use_graph is False" if use_graph is False else why_no_graph(model, cache)
        if use_graph and reason is not None:
            raise NotImplementedError(f"generate: no CUDA graph can be captured: {reason}")
        self._model = model
        self._cache = cache
        self._has_graph = reason is None
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=model.device)
        self._logits: Tensor | None = None
        self._held: list[Any] = []

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab_size) after tokens (batch,) int64 on the model's device. The next
        call may overwrite them."""
        if not self._has_graph:
            return self._model(tokens[:, None], self._cache, last_only=True)[:, -1]
        self._ids.copy_(tokens[:, None])
        if not self._is_warm:
            self._is_warm = True
            return self._step()
        check_room(1, self._cache, self._model)
        if self._graph is None:
            self._capture()
        self._graph.replay()
        self._cache.length += 1
        return self._logits

    def _step(self) -> Tensor:
        from ..ops import settled_weights  # here: `runtime` may be imported by itself

        with settled_weights():  # the embedding's kernel comes after whatever wrote a weight
            return self._model(self._ids, self._cache, last_only=True)[:, -1]

    def _capture(self) -> None:
        """Records a step, which runs nothing: but the host has counted a token, so it is taken
        back. What the step allocates stays in the graph's own pool of memory."""
        model, cache = self._model, self._cache
        length = cache.length
        graph = torch.cuda.CUDAGraph()
        # A stream of its own, because torch's would stay on the device of its first capture.
        stream = torch.cuda.Stream(model.device)
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._logits = self._step()
        finally:
            cache.length = length
        # The graph knows addresses only: what lies there must live as long as it does.
        self._held = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        self._held.append(model.fused_decoder(cache))
        self._graph = graph
