"""Inputs for the tests of the ops: random operands, and one matrix in many memory layouts."""

from __future__ import annotations

from typing import NamedTuple

import torch

LAYOUTS = (
    "contiguous",
    "transposed",
    "padded",
    "padded_transposed",
    "stepped",
    "stepped_rows",
    "unaligned",
)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OUT_DTYPES = (*FLOAT_DTYPES, torch.int32)


class Gemm(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor
    sa: torch.Tensor | None
    sb: torch.Tensor | None


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_int8(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Every value from -128 to 127."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator(seed)).to(device)


def random_scales(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Positive float32 with full mantissas, so that each rounding of a product shows."""
    return (0.001 + torch.rand(shape, generator=generator(seed))).to(device)


def random_floats(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Normal, standard deviation 10."""
    return (10 * torch.randn(shape, generator=generator(seed))).to(dtype).to(device)


def random_zero_points(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """int32, the range of int8."""
    return random_int8(*shape, device=device, seed=seed).int()


def random_gemm(
    M: int,
    N: int,
    K: int,
    *,
    device: torch.device,
    out_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Gemm:
    """a (M, K), b = w.t() (K, N), sa (M, 1), sb (N,); no scales for the raw int32 sums."""
    a = random_int8(M, K, device=device, seed=seed)
    w = random_int8(N, K, device=device, seed=seed + 1)
    if out_dtype == torch.int32:
        return Gemm(a, w.t(), None, None)
    sa = random_scales(M, 1, device=device, seed=seed + 2)
    return Gemm(a, w.t(), sa, random_scales(N, device=device, seed=seed + 3))


def in_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of a matrix `x` in memory of another layout; what lies between them is 77."""
    rows, cols = x.shape

    def canvas(*shape: int) -> torch.Tensor:
        return torch.full(shape, 77, dtype=x.dtype, device=x.device)

    if layout == "contiguous":
        view = canvas(rows, cols)
    elif layout == "transposed":
        view = canvas(cols, rows).t()
    elif layout == "padded":
        view = canvas(rows, cols + 5)[:, :cols]
    elif layout == "padded_transposed":
        view = canvas(cols, rows + 3)[:, 1 : 1 + rows].t()
    elif layout == "stepped":
        view = canvas(2 * rows, 3 * cols)[::2, ::3]
    elif layout == "stepped_rows":
        view = canvas(3 * rows, cols)[::3]
    elif layout == "unaligned":
        view = canvas(rows * cols + 1)[1:].view(rows, cols)
    else:
        raise ValueError(layout)
    view.copy_(x)
    return view
