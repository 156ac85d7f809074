"""Plants outliers into a model's activations without changing what it computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .smoothing import decoder_groups


@torch.no_grad()
def plant_outliers(
    model: nn.Module,
    channels: int | Sequence[int] = 6,
    factor: float = 64.0,
    *,
    seed: int = 0,
) -> list[int]:
    """Makes some channels of every norm's output `factor` times as large, in place.

    The gain (and bias) of each norm in a runtime decoder's layers is multiplied there, and the
    weights of the linear layers that read it are divided. With a power of two both are exact in
    every float dtype, so that the model computes what it did; quantised, it has the outliers of a
    large language model, in the same few channels of every layer.

    Args:
        model: a runtime decoder, in float.
        channels: how many, drawn by the seed, or which.
        factor: a power of two.

    Returns:
        The channels, ascending.

    Raises:
        ValueError: a factor or channels that are not among the above.

    Source: the outliers are those that LLM.int8() (Dettmers et al., 2022) describes: few features,
    the same in all layers, tens of times larger than the rest.
    """
    size = model.config.hidden_size
    if not factor > 0 or math.frexp(factor)[0] != 0.5:
        raise ValueError(f"plant_outliers: factor is {factor}, expected a power of two")
    if isinstance(channels, int):
        generator = torch.Generator().manual_seed(seed)
        channels = torch.randperm(size, generator=generator)[:channels].tolist()
    chosen = sorted(channels)
    if len(set(chosen)) != len(chosen) or not all(0 <= c < size for c in chosen):
        raise ValueError(
            f"plant_outliers: channels is {chosen}, expected distinct ones from 0 to {size - 1}"
        )
    for norm_name, names in decoder_groups(model):
        norm = model.get_submodule(norm_name)
        for tensor in (norm.weight, getattr(norm, "bias", None)):
            if tensor is not None:
                tensor[chosen] *= factor
        for name in names:
            model.get_submodule(name).weight[:, chosen] /= factor
    return chosen
