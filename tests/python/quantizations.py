"""Inputs for the tests of the quantising ops, and the ways to quantise that they go through."""

from __future__ import annotations

import torch

import fastq
from operands import generator

ISAS = fastq.describe()["cpu"]["available"]
# Of values of about 1, some of which the static scales clamp.
SCALES = {
    "symmetric": {},
    "asymmetric": {"asymmetric": True},
    "static": {"scale": 0.0171},
    "static asymmetric": {"scale": 0.0093, "zero_point": -37},
}


def random_rows(*shape, device, dtype=torch.float32, seed=0):
    """N(0.3, 1), rows of different sizes, with an outlier each."""
    x = torch.randn(shape, generator=generator(seed)) + 0.3
    x[..., seed % shape[-1]] *= 9
    if len(shape) > 1:
        x *= torch.logspace(-1, 1, shape[-2])[:, None]
    return x.to(dtype).to(device)


def random_vector(length, *, device, dtype=torch.float32, seed=0, at=0.0):
    """N(at, 1) along the columns."""
    return (at + torch.randn(length, generator=generator(seed))).to(device, dtype)


def random_smooth(length, *, device, dtype=torch.float32):
    """Positive, from 0.1 to 3.1."""
    return (0.1 + 3 * torch.rand(length, generator=generator(5))).to(device, dtype)
