"""From a model, a scheme and calibration data to a plan for each layer; nothing is changed yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.outlier_linear import check_threshold
from ..progress import OnProgress
from ..quantize_ops import check_rotation
from .plan import LinearPlan
from .selection import DEFAULT_SKIP, LINEAR_SCHEMES, Target, select
from .smoothing import (
    Group,
    Groups,
    find_groups,
    folded_norm,
    search_alpha,
    smoothing_factor,
    static_scale,
    weight_absmax,
)
from .statistics import SAMPLE_ROWS, InputStatistics, input_statistics

_THRESHOLD = 6.0


@dataclass(frozen=True)
class Options:
    """The options of :func:`fastq.quantize` that say how, checked by :func:`check_options`."""

    rotation: int = 0
    threshold: float | None = None
    keep_outlier_weights: bool = False
    per_tensor_weight: bool = False
    alpha: float | str = 0.5
    groups: Groups | None = None
    percentile: float | None = None


@dataclass
class Folding:
    """A smoothed norm: its new parameters, and what its linears' weights are multiplied by."""

    norm: str
    parameters: dict[str, nn.Parameter]
    factor: Tensor
    linears: dict[str, nn.Linear]


@dataclass
class Plans:
    """A plan for each target by its name, and what happens to norms."""

    linears: dict[str, LinearPlan]
    foldings: list[Folding] = field(default_factory=list)


def uncalibrated_plans(
    model: nn.Module,
    scheme: str = "w8a8",
    skip: Iterable[str] = DEFAULT_SKIP,
    *,
    overrides: Mapping[str, str | None] | None = None,
    rotation: int = 0,
    threshold: float | None = None,
    per_tensor_weight: bool = False,
) -> dict[str, LinearPlan]:
    """What :func:`fastq.quantize` would do with each linear layer, by every name of it.

    For a loader that quantises layers by :func:`quantize_linear` as it reads them. The model may be
    on the meta device.

    Raises:
        ValueError, TypeError: as :func:`fastq.quantize`; a scheme that needs calibration.
    """
    targets = select(model, scheme, skip, overrides)
    options = Options(rotation, threshold, per_tensor_weight=per_tensor_weight)
    check_options(scheme, targets, options, is_calibrated=False)
    plans = first_plans(targets, options)
    return {name: plans[target.name] for target in targets.values() for name in target.names}


def check_options(
    scheme: str, targets: dict[str, Target], options: Options, *, is_calibrated: bool
) -> None:
    """Raises unless the options fit each other and the layers."""
    kinds = {target.linear_scheme for target in targets.values()}
    rotation = options.rotation
    check_rotation("quantize", rotation)
    if rotation != 0 and LINEAR_SCHEMES[scheme] != "w8a8":
        raise ValueError(f"quantize: rotation is {rotation}, expected 0 with scheme={scheme!r}")
    if rotation != 0 and options.per_tensor_weight:
        raise ValueError(
            f"quantize: rotation is {rotation}, expected 0 with per_tensor_weight=True"
        )
    if rotation != 0:
        _check_divisible(targets, rotation)
    for name in ("threshold", "keep_outlier_weights"):
        if getattr(options, name) not in (None, False) and "llm_int8" not in kinds:
            raise ValueError(f"quantize: {name} is given, expected it with scheme='llm_int8'")
    if options.threshold is not None:
        check_threshold("quantize", options.threshold)
    if options.per_tensor_weight and kinds == {"llm_int8"}:
        raise ValueError("quantize: per_tensor_weight is given, expected none with 'llm_int8'")
    alpha, percentile = options.alpha, options.percentile
    is_number = isinstance(alpha, (int, float)) and 0 <= alpha <= 1
    if alpha != "search" and not is_number:
        raise ValueError(f"quantize: alpha is {alpha!r}, expected 'search' or a number from 0 to 1")
    if percentile is not None and not 0 < percentile <= 100:
        raise ValueError(f"quantize: percentile is {percentile}, expected above 0, up to 100")
    is_smoothed = any(target.is_smoothed for target in targets.values())
    if options.groups is not None and not is_smoothed:
        raise ValueError("quantize: groups is given, expected it with a smoothquant scheme")
    if not is_calibrated and (is_smoothed or "w8a8_static" in kinds):
        wanting = next(
            t.scheme for t in targets.values() if t.is_smoothed or t.linear_scheme == "w8a8_static"
        )
        raise ValueError(f"quantize: calibration is None, expected data with scheme={wanting!r}")
    if not is_calibrated and options.keep_outlier_weights:
        raise ValueError("quantize: calibration is None, expected data to keep_outlier_weights")


def _check_divisible(targets: dict[str, Target], rotation: int) -> None:
    for name, target in targets.items():
        in_features = target.linear.in_features
        if target.linear_scheme == "w8a8" and in_features % rotation != 0:
            raise ValueError(
                f"quantize: {name or 'model'} has in_features = {in_features}, expected a multiple "
                f"of rotation = {rotation}, or its name in skip"
            )


def first_plans(targets: dict[str, Target], options: Options) -> dict[str, LinearPlan]:
    """What is known of each target before calibration."""
    threshold = _THRESHOLD if options.threshold is None else float(options.threshold)
    return {
        name: LinearPlan(
            scheme=target.linear_scheme,
            rotation=options.rotation if target.linear_scheme == "w8a8" else 0,
            per_tensor_weight=options.per_tensor_weight and target.linear_scheme != "llm_int8",
            threshold=threshold,
        )
        for name, target in targets.items()
    }


def make_plans(
    model: nn.Module,
    targets: dict[str, Target],
    options: Options,
    batches: Iterable[Any] | None,
    on_progress: OnProgress | None = None,
) -> Plans:
    """A plan for each target; goes once through the batches where something needs them."""
    plans = Plans(first_plans(targets, options))
    by_linear = {target.linear: target for target in targets.values()}
    leaders: dict[str, Group] = {}  # by the one layer whose input is looked at for all of them
    in_groups = set()
    for group in find_groups(model, options.groups, targets):
        leader = next(n for n, linear in group.linears.items() if linear in by_linear)
        leaders[leader] = group
        in_groups |= set(group.linears.values())
    for name, target in targets.items():
        wants_columns = target.linear_scheme == "llm_int8" and options.keep_outlier_weights
        if target.linear not in in_groups and (
            target.linear_scheme == "w8a8_static" or wants_columns
        ):
            leaders[name] = Group(None, {name: target.linear}, is_smoothed=False)
    if not leaders:
        return plans
    parts = input_statistics(
        model,
        {name: group.linears[name] for name, group in leaders.items()},
        batches,
        sample_rows=SAMPLE_ROWS if options.alpha == "search" or options.percentile else 0,
        on_progress=on_progress,
    )
    for part in parts:
        for name, statistics in part.items():
            statistics.check()
            _plan_group(model, leaders[name], by_linear, statistics, options, plans)
    return plans


def _plan_group(
    model: nn.Module,
    group: Group,
    by_linear: dict[nn.Module, Target],
    statistics: InputStatistics,
    options: Options,
    plans: Plans,
) -> None:
    """Completes the plans of linears that read one input."""
    targets = {n: by_linear[linear] for n, linear in group.linears.items() if linear in by_linear}
    smoothed = {n: t for n, t in targets.items() if group.is_smoothed and t.is_smoothed}
    smooth = None
    if smoothed:
        alpha = options.alpha
        if alpha == "search":
            own = {name: plans.linears[target.name] for name, target in smoothed.items()}
            alpha = search_alpha(group, own, statistics, options.percentile)
        w_absmax = weight_absmax(list(group.linears.values()))
        smooth = smoothing_factor(statistics.absmax, w_absmax, alpha)
    if smooth is not None and group.norm is not None:
        parameters, smooth = folded_norm(model.get_submodule(group.norm), smooth)
        plans.foldings.append(Folding(group.norm, parameters, smooth, group.linears))
    for name, target in targets.items():
        plan = plans.linears[target.name]
        if group.norm is not None or name in smoothed:
            plan = replace(plan, smooth=smooth, is_folded=group.norm is not None)
        if plan.scheme == "w8a8_static":
            scale = static_scale(statistics, plan.smooth, options.percentile)
            plan = replace(plan, input_scale=scale)
        if plan.scheme == "llm_int8" and options.keep_outlier_weights:
            plan = replace(plan, outlier_columns=_outlier_columns(statistics, plan))
        plans.linears[target.name] = plan


def _outlier_columns(statistics: InputStatistics, plan: LinearPlan) -> Tensor:
    absmax = statistics.absmax
    if plan.smooth is not None:
        absmax = absmax / plan.smooth.to(absmax.device)
    if plan.threshold == 0:  # nothing is an outlier
        return torch.zeros(0, dtype=torch.int32, device=absmax.device)
    return (absmax >= plan.threshold).nonzero().flatten().to(torch.int32)
