"""SmoothQuant: outliers of the activations are moved into the weights, where they hurt less.

    y = (x / s) (W * s)^T,    s = max|x|^alpha / max|W|^(1 - alpha)    per input channel

where the maxima are over the calibration rows and over the output channels of all linears that
read x. Where x comes out of a norm, its gain and bias are divided by s beforehand, at no cost;
elsewhere the quantised layer divides.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .plan import LinearPlan, quantize_linear
from .selection import Target
from .statistics import InputStatistics, is_decoder

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# (the norm's name or None, the names of the linears that read its output)
Groups = Sequence[tuple[str | None, Sequence[str]]]


@dataclass
class Group:
    """Linears that read one input, and the norm that writes it, if that is smoothed."""

    norm: str | None
    linears: dict[str, nn.Linear]
    is_smoothed: bool = True


def decoder_groups(model: nn.Module) -> list[tuple[str | None, list[str]]]:
    """The groups of a runtime decoder: what reads each norm of its layers."""
    groups = []
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        attention = [f"{prefix}self_attn.{x}_proj" for x in "qkv"]
        mlp = [f"{prefix}mlp.{x}_proj" for x in ("gate", "up")]
        mlp = [name for name in mlp if getattr(layer.mlp, name.rpartition(".")[2]) is not None]
        if layer.post_attention_layernorm is None:  # parallel, with one norm
            groups.append((f"{prefix}input_layernorm", attention + mlp))
        else:
            groups.append((f"{prefix}input_layernorm", attention))
            groups.append((f"{prefix}post_attention_layernorm", mlp))
    return groups


def find_groups(model: nn.Module, groups: Groups | None, targets: dict[str, Target]) -> list[Group]:
    """The groups with something to smooth, checked.

    Those given; else those of a runtime decoder; else each target by itself, without a norm.
    """
    if groups is None:
        alone = [(None, [name]) for name, target in targets.items() if target.is_smoothed]
        groups = decoder_groups(model) if is_decoder(model) else alone
    found, seen = [], {}
    for norm, names in groups:
        if isinstance(names, str):
            raise TypeError(
                f"quantize: groups holds the string {names!r}, expected a list of names"
            )
        linears = {name: _submodule(model, name) for name in names}
        for name, linear in linears.items():
            if linear in seen:
                raise ValueError(f"quantize: groups holds {name} twice, expected it once")
            seen[linear] = name
            if not isinstance(linear, nn.Linear):
                kind = type(linear).__name__
                raise TypeError(f"quantize: groups names {name}, a {kind}, expected an nn.Linear")
        if not any(t.is_smoothed for t in targets.values() if t.linear in linears.values()):
            continue
        _check_sizes(model, norm, linears, seen)
        found.append(Group(norm, linears))
    return found


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"quantize: groups names {name!r}, expected a module") from None


def _check_sizes(
    model: nn.Module, norm: str | None, linears: dict[str, nn.Linear], seen: dict[nn.Module, str]
) -> None:
    sizes = {linear.in_features for linear in linears.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"quantize: groups joins {', '.join(linears)} of in_features {sorted(sizes)}, expected "
            "linears that read one input"
        )
    if norm is None:
        return
    module = _submodule(model, norm)
    if module in seen:
        raise ValueError(f"quantize: groups holds {norm} twice, expected it once")
    seen[module] = norm
    gain = getattr(module, "weight", None)
    if not isinstance(gain, Tensor) or gain.shape != (*sizes,):
        came = "no weight" if gain is None else f"a weight of shape {tuple(gain.shape)}"
        raise ValueError(f"quantize: {norm} has {came}, expected a gain of shape {(*sizes,)}")


def weight_absmax(linears: Sequence[nn.Linear]) -> Tensor:
    """max|W| per input channel over linears that read one input: float32 ``(K,)``."""
    largest = [linear.weight.detach().abs().amax(0).float() for linear in linears]
    return torch.stack([x.to(largest[0].device) for x in largest]).amax(0)


def smoothing_factor(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """s of the formula above, float32 ``(K,)``; 1 for a channel that is zero on either side."""
    w_absmax = w_absmax.to(x_absmax.device)
    s = x_absmax.double() ** alpha / w_absmax.double() ** (1 - alpha)
    usable = (x_absmax > 0) & (w_absmax > 0)
    # Far from the ends of float16, where a norm's gain may have to live.
    return torch.where(usable, s.clamp(1e-4, 1e4), 1.0).float()


def static_scale(
    statistics: InputStatistics, smooth: Tensor | None, percentile: float | None
) -> float:
    """The scale of "w8a8_static" for an input, divided by `smooth` first if there is one.

    absmax / 127; with a percentile, of the magnitudes in the sample of rows instead of the largest.
    """
    if percentile is None:
        columns = statistics.absmax
        largest = (columns if smooth is None else columns / smooth.to(columns.device)).amax()
    else:
        rows = statistics.sample().float()
        rows = (rows if smooth is None else rows / smooth.to(rows.device)).abs().flatten()
        rank = max(1, round(percentile / 100 * rows.numel()))
        largest = rows.kthvalue(rank).values
    scale = float(largest) / 127
    return max(scale, torch.finfo(torch.float32).tiny) if scale > 0 else 1.0


def search_alpha(
    group: Group,
    plans: dict[str, LinearPlan],
    statistics: InputStatistics,
    percentile: float | None,
) -> float:
    """The alpha of ALPHAS whose quantised linears come closest to the float ones.

    Closest on the sample of calibration rows: the squared error over the squared output, summed
    over the linears that `plans` names.
    """
    w_absmax = weight_absmax(list(group.linears.values()))
    rows = statistics.sample()
    damage = {}
    for alpha in ALPHAS:
        smooth = smoothing_factor(statistics.absmax, w_absmax, alpha)
        damage[alpha] = 0.0
        for name, plan in plans.items():
            plan = replace(plan, smooth=smooth, is_folded=False)
            if plan.scheme == "w8a8_static":
                plan = replace(plan, input_scale=static_scale(statistics, smooth, percentile))
            linear = group.linears[name]
            damage[alpha] += output_error(linear, quantize_linear(linear, plan), rows)
    return min(damage, key=damage.__getitem__)


@torch.no_grad()
def output_error(linear: nn.Module, quantised: nn.Module, rows: Tensor) -> float:
    """Squared error over the squared output."""
    exact = linear(rows).float()
    error = (quantised(rows).float() - exact).square().sum()
    return float(error / exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny))


@torch.no_grad()
def folded_norm(norm: nn.Module, smooth: Tensor) -> tuple[dict[str, nn.Parameter], Tensor]:
    """A norm's gain and bias divided by smooth, and the factor that this came to.

    The gain is rounded to its dtype; what the linears are multiplied by makes up for that, so that
    the product stays as it was to float32's precision (a bias is rounded once more).
    """
    gain = norm.weight.detach()
    smooth = smooth.to(gain.device)
    folded = (gain.float() / smooth).to(gain.dtype)
    ratio = gain.float() / folded.float()
    factor = torch.where(ratio.isfinite() & (ratio > 0), ratio, smooth)
    new = {"weight": folded}
    if getattr(norm, "bias", None) is not None:
        bias = norm.bias.detach()
        new["bias"] = (bias.float() / factor).to(bias.dtype)
    return {
        name: nn.Parameter(tensor, requires_grad=getattr(norm, name).requires_grad)
        for name, tensor in new.items()
    }, factor
