"""Replaces a model's linear layers by quantised ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..progress import OnProgress
from .calibration import resolve
from .plan import quantize_linear, scaled_linear
from .planning import Options, Plans, check_options, make_plans
from .selection import DEFAULT_SKIP, Target, select
from .sensitivity import install, measure_damage
from .smoothing import Groups


def quantize(
    model: nn.Module,
    scheme: str = "w8a8",
    skip: Iterable[str] = DEFAULT_SKIP,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    overrides: Mapping[str, str | None] | None = None,
    alpha: float | str = 0.5,
    groups: Groups | None = None,
    percentile: float | None = None,
    rotation: int = 0,
    threshold: float | None = None,
    keep_outlier_weights: bool = False,
    per_tensor_weight: bool = False,
    keep_worst: int = 0,
    on_progress: OnProgress | None = None,
) -> nn.Module:
    """Replaces every ``nn.Linear`` in a model, in place, by a quantised module.

    Schemes, all with INT8 weights, one scale an output channel:

    - "w8a8": one dynamic activation scale a token (ZeroQuant);
    - "w8a8_tensor": one dynamic scale for a layer's whole input;
    - "w8a8_static": one static scale a layer, from calibration;
    - "smoothquant_o1", "smoothquant_o2", "smoothquant_o3": those three with SmoothQuant's
      smoothing, from calibration: see `alpha` and `groups`;
    - "llm_int8": :class:`fastq.nn.OutlierLinear`, which keeps outliers in the activations apart.

    Without calibration each layer is replaced as soon as it is quantised, which takes the memory of
    one more layer. With calibration the model stays as it is until every layer is ready, so that
    an interruption leaves it unchanged.

    Args:
        model: any module, on any device; weights are quantised where they lie. Subclasses of
            ``nn.Linear`` stay as they are, because their owners may reach into them.
        scheme: one of the above.
        skip: names of modules to leave alone, with everything below them. A name counts from the
            root ("model.layers.0") or from any dot ("down_proj"), and may hold the wildcards of
            `fnmatch` ("layers.1?.mlp").
        calibration: batches in an iterable, each what the model takes: a tensor such as token ids
            ``(batch, seqlen)``, a tuple of arguments, or a dict of named ones. Or, with a
            tokenizer, the path of a text file, or "stdlib": the standard library's source. Schemes
            that need none ignore it. A runtime decoder is calibrated layer by layer, with its
            hidden states on the host in between; any other module runs whole.
        tokenizer: see :func:`fastq.quantization.calibration_batches`, which makes batches of text
            with other sizes, too.
        overrides: other schemes for some layers, by patterns like those of `skip`; None leaves a
            layer in float. The last pattern that matches a layer or a module around it counts, and
            any counts more than skip does.
        alpha: SmoothQuant's migration strength, from 0 (nothing moves into the weights) to 1, or
            "search": for each group the one of 0.1, 0.2, ..., 0.9 that brings the quantised
            outputs closest to the float ones on up to 512 rows of calibration data.
        groups: (name of a norm, names of the linear layers that read its output) pairs: what is
            smoothed together. Nothing else may read that norm. Smoothing divides its gain and bias
            and multiplies the weights, of layers left in float, too: the float function stays as it
            is. With None for a norm, the quantised layers divide their input (``smooth`` of
            :class:`fastq.nn.Int8Linear`). Known of a runtime decoder; in any other module each
            layer is smoothed by itself, unless groups are given.
        percentile: static scales follow this percentile of the inputs' magnitudes, such as 99.99,
            on up to 512 rows of calibration data, instead of the largest; what lies above is
            clipped. It helps where a few elements lie far from all others, as in the inputs that
            no norm writes, which smoothing leaves as they are.
        rotation: 0, 2, 4, 8, 16 or 32: multiplies blocks of that many features by a Hadamard matrix
            before they are quantised, as :class:`fastq.nn.Int8Linear` says. It needs no
            calibration and costs time at each call; 32 is the most accurate where activations
            have outliers. Of schemes with a scale a token only.
        threshold: from which magnitude on an activation is an outlier; 6 unless told otherwise. Of
            "llm_int8" only.
        keep_outlier_weights: of "llm_int8": keeps the weight's columns that met an outlier in
            calibration in the model's dtype, besides.
        per_tensor_weight: one scale for each whole weight, the papers' baseline; less exact.
        keep_worst: how many layers stay in float: those that do the most damage alone, as
            :func:`fastq.quantization.sensitivity` measures it on the calibration data.
        on_progress: is called with what is being done, how many steps of it are done, and of how
            many (0: unknown). :func:`fastq.quantization.progress_bar` gives one.

    Returns:
        The model, or its replacement when the model itself is an ``nn.Linear``.

    Raises:
        ValueError: an unknown scheme; a pattern that matches no module; nothing to quantise; an
            unknown rotation, or a layer whose in_features it does not divide; an option of another
            scheme, or out of range; calibration that is missing, empty, or makes a NaN or an Inf;
            groups that do not fit the model.
        TypeError: not a module, or a weight that is not float32, float16 or bfloat16.
        NotImplementedError: an ``nn.TransformerEncoderLayer``, whose fused inference path reads
            the weights of its linear layers; skip it.

    Source: ZeroQuant (Yao et al., 2022); SmoothQuant (Xiao et al., 2022); LLM.int8() (Dettmers et
    al., 2022).
    """
    targets = select(model, scheme, skip, overrides)
    options = Options(
        rotation, threshold, keep_outlier_weights, per_tensor_weight, alpha, groups, percentile
    )
    check_options(scheme, targets, options, is_calibrated=calibration is not None)
    if keep_worst and calibration is None:
        raise ValueError("quantize: calibration is None, expected data with keep_worst")
    if not 0 <= keep_worst < len(targets):
        raise ValueError(
            f"quantize: keep_worst is {keep_worst}, expected 0 to {len(targets) - 1} of "
            f"{len(targets)} layers"
        )
    batches = resolve(calibration, tokenizer, model)
    plans = make_plans(model, targets, options, batches, on_progress)
    if keep_worst:
        damage = measure_damage(model, targets, plans, batches, on_progress)
        for name, _ in damage[:keep_worst]:
            del targets[name]
    report = on_progress or (lambda label, done, total: None)
    if calibration is None:
        for done, name in enumerate(names := list(targets), 1):
            target = targets.pop(name)  # the last that holds the layer, once it is replaced
            module = quantize_linear(target.linear, plans.linears[name])
            if name == "":
                return module
            install(model, target.names, module)
            report("quantising", done, len(names))
        return model
    return _install_at_once(model, targets, plans, report)


@torch.no_grad()
def _install_at_once(
    model: nn.Module, targets: dict[str, Target], plans: Plans, report: OnProgress
) -> nn.Module:
    """Makes everything new first; then the model changes, without anything that can fail."""
    modules: dict[str, nn.Module] = {}
    for done, (name, target) in enumerate(targets.items(), 1):
        modules[name] = quantize_linear(target.linear, plans.linears[name])
        report("quantising", done, len(targets))
    quantised = {target.linear for target in targets.values()}
    parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
    for folding in plans.foldings:
        if quantised.isdisjoint(folding.linears.values()):
            continue  # all of them were kept
        norm = model.get_submodule(folding.norm)
        parameters += [(norm, name, value) for name, value in folding.parameters.items()]
        for linear in folding.linears.values():
            if linear not in quantised:
                weight = scaled_linear(linear, folding.factor, linear.weight.dtype).weight
                weight.requires_grad_(linear.weight.requires_grad)
                parameters.append((linear, "weight", weight))
    if "" in modules:
        return modules[""]
    for owner, name, value in parameters:
        setattr(owner, name, value)
    for name, module in modules.items():
        install(model, targets[name].names, module)
    return model
