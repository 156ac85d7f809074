"""How much damage quantising each layer alone does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..progress import OnProgress
from .calibration import resolve
from .plan import quantize_linear
from .planning import Options, Plans, check_options, make_plans
from .selection import DEFAULT_SKIP, Target, select
from .statistics import is_decoder, run


def sensitivity(
    model: nn.Module,
    scheme: str = "w8a8",
    skip: Iterable[str] = DEFAULT_SKIP,
    *,
    calibration: Any,
    tokenizer: Any = None,
    overrides: Mapping[str, str | None] | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> list[tuple[str, float]]:
    """Ranks a model's linear layers by the damage that quantising each one alone does.

    The model runs once a layer over the calibration data, and all its quantised layers are in
    memory beside it; it is unchanged afterwards.

    Args:
        model, scheme, skip, calibration, tokenizer, overrides, on_progress, options: those of
            :func:`fastq.quantize`. calibration is needed with every scheme, for the damage is
            measured on it.

    Returns:
        (name, damage), the worst first. For a causal language model (the runtime's, or one of
        transformers named so) the damage is the increase of the mean negative log likelihood, in
        nats a token; for any other module it is the relative error of its output,
        ``norm(quantised - float) / norm(float)``.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`fastq.quantize`.
    """
    targets = select(model, scheme, skip, overrides)
    checked = Options(**options)
    check_options(scheme, targets, checked, is_calibrated=calibration is not None)
    batches = resolve(calibration, tokenizer, model)
    if batches is None:
        raise ValueError("sensitivity: calibration is None, expected data to measure damage on")
    plans = make_plans(model, targets, checked, batches, on_progress)
    return measure_damage(model, targets, plans, batches, on_progress)


@torch.no_grad()
def measure_damage(
    model: nn.Module,
    targets: dict[str, Target],
    plans: Plans,
    batches: Iterable[Any],
    on_progress: OnProgress | None = None,
) -> list[tuple[str, float]]:
    """What :func:`sensitivity` returns, for plans that were made."""
    report = on_progress or (lambda label, done, total: None)
    is_causal = is_decoder(model) or type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    quantised = {
        # By itself a layer cannot fold its smoothing into a norm that others read, too.
        name: quantize_linear(target.linear, replace(plans.linears[name], is_folded=False))
        for name, target in targets.items()
    }
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    damage = dict.fromkeys(targets, 0.0)
    weight, seen, steps = 0.0, 0, 0
    total = len(batches) * len(targets) if hasattr(batches, "__len__") else 0
    try:
        for batch in batches:
            exact = _output(run(model, batch))
            ids = _next_tokens(batch).to(exact.device) if is_causal else None
            own = _nats(exact, ids) if is_causal else 0.0
            weight += int((ids >= 0).sum()) if is_causal else _square(exact)
            for name, target in targets.items():
                with _replaced(model, target, quantised[name]):
                    output = _output(run(model, batch))
                if is_causal:
                    damage[name] += _nats(output, ids) - own
                else:
                    damage[name] += _square(output.float() - exact.float())
                steps += 1
                report(f"layer by layer: {name}", steps, total)
            seen += 1
    finally:
        for module in was_training:
            module.training = True
    if seen == 0:
        raise ValueError("sensitivity: calibration holds no batch, expected one or more")
    weight = max(weight, torch.finfo(torch.float32).tiny)
    result = {n: d / weight if is_causal else (d / weight) ** 0.5 for n, d in damage.items()}
    return sorted(result.items(), key=lambda item: -item[1])


@contextmanager
def _replaced(model: nn.Module, target: Target, module: nn.Module) -> Iterator[None]:
    """A model with another module in the place of a layer; a model that is the layer itself cannot
    be changed from inside, so that it hands the call over."""
    if target.name == "":
        forward = target.linear.forward
        target.linear.forward = module.forward
        try:
            yield
        finally:
            target.linear.forward = forward
        return
    install(model, target.names, module)
    try:
        yield
    finally:
        install(model, target.names, target.linear)


def install(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Registers a module under each of the names."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def _output(output: Any) -> Tensor:
    """The tensor of a model's output that damage is seen in."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"sensitivity: the model returned a {type(output).__name__}, expected a tensor")


def _next_tokens(batch: Any) -> Tensor:
    """What follows each token of a batch but the last; -100 where either of the two is padding."""
    if isinstance(batch, tuple):
        batch = batch[0]
    if isinstance(batch, Tensor):
        return batch[:, 1:]
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return ids[:, 1:]
    return ids[:, 1:].masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Negative log likelihood of the targets, summed; -100 counts for nothing."""
    logits = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="sum").item()


def _square(x: Tensor) -> float:
    return x.double().square().sum().item()
