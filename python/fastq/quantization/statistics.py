"""What calibration sees of the inputs of linear layers, with bounded memory.

Of each layer two things stay: the largest magnitude of every input channel, and, where asked for, a
sample of a fixed number of rows. A runtime decoder is calibrated layer by layer: the hidden states
of the whole calibration set wait on the host between one layer and the next, and one layer's
statistics are there at a time. Any other module runs whole, with hooks on all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import OnProgress

SAMPLE_ROWS = 512


class InputStatistics:
    """The inputs of one linear layer, row by row.

    Attributes:
        absmax: float32 ``(K,)``, on the inputs' device; NaN where an input was.
        rows: how many were seen.
    """

    def __init__(self, name: str, in_features: int, sample_rows: int) -> None:
        self.name = name
        self.absmax = torch.zeros(in_features)
        self.rows = 0
        self._limit = sample_rows
        self._stride = 1
        self._sample: list[Tensor] = []
        self._kept = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Takes ``(..., K)``."""
        x = x.detach().reshape(-1, x.shape[-1])
        if x.shape[0] == 0:
            return
        # amax keeps NaN, and so does maximum.
        self.absmax = torch.maximum(self.absmax.to(x.device), x.abs().amax(0).float())
        if self._limit:
            self._take(x)
        self.rows += x.shape[0]

    def _take(self, x: Tensor) -> None:
        # Every stride-th row of all that come; when there are too many, every second one goes.
        first = -self.rows % self._stride
        taken = x[first :: self._stride].clone()
        self._sample.append(taken)
        self._kept += taken.shape[0]
        while self._kept > self._limit:
            rows = torch.cat(self._sample)[::2].clone()
            self._sample, self._kept, self._stride = [rows], rows.shape[0], 2 * self._stride

    def sample(self) -> Tensor:
        """At most `sample_rows` rows, evenly spaced over what was seen, in the inputs' dtype."""
        return torch.cat(self._sample)

    def check(self) -> None:
        """Raises ValueError unless something was seen, and all of it was finite."""
        if self.rows == 0:
            raise ValueError(
                f"quantize: {self.name} received no input from calibration, expected one; a layer "
                "that the model does not call belongs in skip"
            )
        if not bool(self.absmax.isfinite().all()):
            raise ValueError(f"quantize: the input of {self.name} holds a NaN or an Inf")


def input_statistics(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    batches: Iterable[Any],
    *,
    sample_rows: int = 0,
    on_progress: OnProgress | None = None,
) -> Iterator[dict[str, InputStatistics]]:
    """Statistics of linear layers, a part of them at a time; the parts come in the model's order.

    Args:
        model: runs in eval mode, without gradients; its mode is as before afterwards.
        linears: layers of it by name.
        batches: what the model takes: see :func:`run`.
        sample_rows: how many rows each layer's sample may hold; 0 for none.
        on_progress: see `OnProgress`.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    report = on_progress or (lambda label, done, total: None)
    collect = _decoder_statistics if is_decoder(model) else _module_statistics
    try:
        yield from collect(model, linears, batches, sample_rows, report)
    finally:
        for module in was_training:
            module.training = True


def is_decoder(model: nn.Module) -> bool:
    """Whether a model is the runtime's causal language model."""
    from .. import runtime  # here: the runtime's loader imports this package

    return isinstance(model, runtime.CausalLM)


def run(model: nn.Module, batch: Any) -> Any:
    """``model(batch)``; a tuple holds its arguments, a mapping its named ones. Tensors move to the
    device of the model's first parameter."""
    device = next((p.device for p in [*model.parameters(), *model.buffers()]), None)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and device is not None else value

    if isinstance(batch, tuple):
        return model(*map(moved, batch))
    if hasattr(batch, "keys"):  # a dict, or what a Hugging Face tokenizer returns
        return model(**{key: moved(batch[key]) for key in batch.keys()})  # noqa: SIM118
    return model(moved(batch))


@contextlib.contextmanager
def _observed(
    linears: dict[str, nn.Linear], sample_rows: int
) -> Iterator[dict[str, InputStatistics]]:
    """Hooks on layers, gone at the end however it comes."""
    statistics, handles = {}, []
    try:
        for name, linear in linears.items():
            observer = InputStatistics(name, linear.in_features, sample_rows)
            statistics[name] = observer

            def see(module: nn.Module, args: tuple, named: dict, observer=observer) -> None:
                observer.add(args[0] if args else named["input"])

            handles.append(linear.register_forward_pre_hook(see, with_kwargs=True))
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _module_statistics(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    batches: Iterable[Any],
    sample_rows: int,
    report: OnProgress,
) -> Iterator[dict[str, InputStatistics]]:
    total = len(batches) if hasattr(batches, "__len__") else 0
    with _observed(linears, sample_rows) as statistics:
        for done, batch in enumerate(batches, 1):
            run(model, batch)
            report("calibrating", done, total)
    yield statistics


@dataclass
class _LayerCall:
    """What a decoder layer is called with: the hidden states, on the host, and the rest."""

    hidden: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]


class _ReachedFirstLayer(Exception):  # noqa: N818 (no error)
    pass


@torch.no_grad()
def _decoder_statistics(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    batches: Iterable[Any],
    sample_rows: int,
    report: OnProgress,
) -> Iterator[dict[str, InputStatistics]]:
    layers = model.model.layers
    calls = [_first_layer_call(model, layers[0], batch) for batch in batches]
    steps, total = 0, len(calls) * len(layers)
    left = dict(linears)
    for index, layer in enumerate(layers):
        inside = {name for name in left if name.startswith(f"model.layers.{index}.")}
        with _observed({name: left.pop(name) for name in sorted(inside)}, sample_rows) as part:
            for call in calls:
                hidden = layer(call.hidden.to(model.device), *call.rest, **call.named)
                call.hidden = hidden.cpu()
                steps += 1
                report(f"calibrating layer {index + 1} of {len(layers)}", steps, total)
        yield {name: part[name] for name in linears if name in part}
    if left:  # the head
        with _observed(left, sample_rows) as part:
            for call in calls:
                model.lm_head(model.model.norm(call.hidden.to(model.device)))
        yield part


def _first_layer_call(model: nn.Module, layer: nn.Module, batch: Any) -> _LayerCall:
    """Runs a model up to its first layer."""
    calls = []

    def stop(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(_LayerCall(args[0].cpu(), args[1:], named))
        raise _ReachedFirstLayer

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run(model, batch)
    except _ReachedFirstLayer:
        return calls[0]
    finally:
        handle.remove()
    raise RuntimeError("quantize: the model did not call its first layer")
