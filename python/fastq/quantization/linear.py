"""Replaces a model's linear layers by INT8 ones."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..nn import Int8Linear, OutlierLinear
from ..nn.outlier_linear import check_threshold
from ..quantize_ops import check_rotation

# The output head is small beside the rest, often shares the embedding's weight, and is the layer
# that rounding hurts most.
DEFAULT_SKIP = ("lm_head",)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize(
    model: nn.Module,
    scheme: str = "w8a8",
    skip: Iterable[str] = DEFAULT_SKIP,
    *,
    rotation: int = 0,
    threshold: float | None = None,
) -> nn.Module:
    """Replaces every ``nn.Linear`` in a model, in place, by a quantised module.

    Args:
        model: any module, on any device; weights are quantised where they lie. Subclasses of
            ``nn.Linear`` stay as they are, because their owners may reach into them.
        scheme: "w8a8": :class:`fastq.nn.Int8Linear`, or "llm_int8":
            :class:`fastq.nn.OutlierLinear`, which keeps outliers in the activations apart.
        skip: names of modules to leave alone, with everything below them. A name counts from the
            root ("model.layers.0") or from any dot ("down_proj"), and may hold the wildcards of
            `fnmatch` ("layers.1?.mlp").
        rotation: 0, 2, 4, 8, 16 or 32: multiplies blocks of that many features by a Hadamard matrix
            before they are quantised, as :class:`fastq.nn.Int8Linear` says. It needs no
            calibration and costs time at each call; 32 is the most accurate where activations
            have outliers. Of "w8a8" only.
        threshold: from which magnitude on an activation is an outlier; 6 unless told otherwise. Of
            "llm_int8" only.

    Returns:
        The model, or its replacement when the model itself is an ``nn.Linear``.

    Raises:
        ValueError: an unknown scheme, a pattern in `skip` that matches no module, nothing to
            quantise, an unknown rotation, or a layer whose in_features it does not divide; an
            option of the other scheme.
        TypeError: not a module, or a weight that is not float32, float16 or bfloat16.
        NotImplementedError: an ``nn.TransformerEncoderLayer``, whose fused inference path reads
            the weights of its linear layers; skip it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model is a {type(model).__name__}, expected a torch.nn.Module")
    if scheme not in ("w8a8", "llm_int8"):
        raise ValueError(f"quantize: scheme is {scheme!r}, expected 'w8a8' or 'llm_int8'")
    if isinstance(skip, str):
        raise TypeError(f"quantize: skip is the string {skip!r}, expected a list of patterns")
    check_rotation("quantize", rotation)
    if scheme == "w8a8" and threshold is not None:
        raise ValueError("quantize: threshold is given, expected it with scheme='llm_int8'")
    if scheme == "llm_int8" and rotation != 0:
        raise ValueError(f"quantize: rotation is {rotation}, expected 0 with scheme='llm_int8'")
    threshold = check_threshold("quantize", 6.0 if threshold is None else threshold)
    names = _names_to_quantize(model, tuple(skip))
    if rotation != 0:
        _check_divisible(model, names, rotation)
    replacements: dict[nn.Module, nn.Module] = {}
    for name in names:
        linear = model.get_submodule(name)
        if linear not in replacements:  # one layer may be registered under two names
            if scheme == "w8a8":
                replacements[linear] = Int8Linear.from_float(linear, rotation=rotation)
            else:
                replacements[linear] = OutlierLinear.from_float(linear, threshold=threshold)
        if not name:
            return replacements[linear]
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacements[linear])
    return model


def _names_to_quantize(model: nn.Module, skip: tuple[str, ...]) -> list[str]:
    unmatched = set(skip) - set(DEFAULT_SKIP)
    skipped: set[str] = set()
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        matching = {pattern for pattern in skip if name and _matches(name, pattern)}
        unmatched -= matching
        if matching or name.rpartition(".")[0] in skipped:
            skipped.add(name)
        elif isinstance(module, nn.TransformerEncoderLayer):
            raise NotImplementedError(
                f"quantize: {name or 'model'} is a torch.nn.TransformerEncoderLayer, whose fused "
                "inference path reads the weights of its linear layers; expected it in skip"
            )
        elif type(module) is nn.Linear:
            if module.weight.dtype not in _FLOATS:  # before anything is replaced
                raise TypeError(
                    f"quantize: {name or 'model'} has a weight of dtype {module.weight.dtype}, "
                    "expected float32, float16 or bfloat16"
                )
            names.append(name)
    if unmatched:
        raise ValueError(f"quantize: skip holds {min(unmatched)!r}, which matches no module")
    if not names:
        raise ValueError(
            f"quantize: {type(model).__name__} has no torch.nn.Linear to quantise"
            + (" outside of skip" if skipped else "")
        )
    return names


def _check_divisible(model: nn.Module, names: list[str], rotation: int) -> None:
    for name in names:
        in_features = model.get_submodule(name).in_features
        if in_features % rotation != 0:
            raise ValueError(
                f"quantize: {name or 'model'} has in_features = {in_features}, expected a multiple "
                f"of rotation = {rotation}, or its name in skip"
            )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
