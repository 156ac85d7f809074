"""What ``bench.int8_gemm`` times on one shape: ours, torch's products and the reference tiles.

All of them rotate over the same copies of their inputs, enough to spill the caches, and write the
same outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import torch

import fastq

from . import timing
from .int8_gemm_summary import PACKED, QUANTIZED, UNPROMISED
from .kernel_families import DEFAULT, in_family, kernel_family, label
from .reference_tiles import Reference, Tile

INT_MM = "torch._int_mm"
QLINEAR = "torch.ops.onednn.qlinear_pointwise"
BF16_MM = "torch.mm[bfloat16]"
FP8_MM = "torch._scaled_mm[float8 rowwise]"

# The small batches, where the quantisation weighs most.
MAX_M_QUANTIZED = 128
# Many times behind on a CPU, and slow enough to hold up the run.
MAX_FLOAT32_MACS = 2048**3
# One small tile a CTA: far behind for larger M, and slow enough to hold up the run.
MAX_M_WARPSPECIALIZED = 512

Tensors = tuple[torch.Tensor, ...]
Wanted = Callable[[str], bool]


class Case(NamedTuple):
    calls: timing.Calls
    bytes: int  # that a call reads and writes at least
    dtype: str
    config: str | None = None


class Problem:
    """A shape's operands, drawn from N(0, 1) and quantised by absmax, and their copies."""

    def __init__(self, M: int, N: int, K: int, device: torch.device):
        self.M, self.N, self.K, self.device = M, N, K, device
        generator = torch.Generator(device=device).manual_seed(0)
        self.x = torch.randn(M, K, generator=generator, device=device)
        self.w = torch.randn(N, K, generator=generator, device=device)
        self.qx, self.sx = fastq.quantize_per_token(self.x)
        self.qw, self.sw = fastq.quantize_per_channel(self.w)
        self._outs: dict[torch.dtype, list[torch.Tensor]] = {}

    def copies(self, *tensors: torch.Tensor, like: int | None = None) -> list[Tensors]:
        """Copies to rotate over: as many as spill the caches, or `like`."""
        size = sum(t.nbytes for t in tensors)
        count = timing.copies(size, self.device) if like is None else like
        # clone() keeps the strides of a dense tensor: a transposed weight stays one.
        return [tuple(t.clone() for t in tensors) for _ in range(count)]

    @cached_property
    def int8(self) -> list[Tensors]:
        """What fastq.int8_gemm takes, its weight an nn.Linear's."""
        return self.copies(self.qx, self.qw.t(), self.sx, self.sw)

    @cached_property
    def bf16(self) -> list[Tensors]:
        return self.copies(self.x.bfloat16(), self.w.bfloat16().t())

    @cached_property
    def fp8(self) -> list[Tensors]:
        dtype = torch.float8_e4m3fn
        sx, sw = (t.abs().amax(1, keepdim=True) / torch.finfo(dtype).max for t in (self.x, self.w))
        x, w = (self.x / sx).to(dtype), (self.w / sw).to(dtype)
        return self.copies(x, w.t(), sx, sw.t())

    def out(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        outs = self._outs.setdefault(dtype, [])
        while len(outs) <= index:
            outs.append(torch.empty(self.M, self.N, dtype=dtype, device=self.device))
        return outs[index]

    def rotate(
        self,
        product: Callable[..., object],
        inputs: list[Tensors],
        dtype: str,
        config: str | None = None,
        *,
        out: torch.dtype | None = torch.bfloat16,
    ) -> Case:
        """`product` on each of the copies; without `out` it allocates its bfloat16 output."""
        calls = []
        for i, tensors in enumerate(inputs):
            kwargs = {} if out is None else {"out": self.out(i, out)}
            calls.append(partial(product, *tensors, **kwargs))
        written = self.M * self.N * (out or torch.bfloat16).itemsize
        return Case(calls, sum(t.nbytes for t in inputs[0]) + written, dtype, config)

    def check(self) -> None:
        """A benchmark of a wrong product is worth nothing."""
        sums = fastq.int8_gemm(self.qx[:64], self.qw[:256].t(), None, None, out_dtype=torch.int32)
        expected = self.qx[:64].double() @ self.qw[:256].double().t()
        assert torch.equal(sums.double(), expected)


# As Int8Linear calls it.
constant_weight_product = partial(fastq.int8_gemm, b_is_constant=True)


def packed_product(a, sa, sb, data, *, shape, out):
    fastq.int8_gemm(a, fastq.PackedWeight(data, *shape), sa, sb, out=out)


def quantized_product(x, b, sb, *, out):
    a, sa = fastq.quantize_per_token(x)
    constant_weight_product(a, b, sa, sb, out=out)


INT8 = "int8 -> bfloat16"


def ours(p: Problem, families: list[str], wanted: Wanted) -> dict[str, Case]:
    cases = {}
    for family in families if p.device.type == "cuda" else [DEFAULT]:
        name = label(family)
        if wanted(name):
            with kernel_family(family):
                config = fastq.describe_int8_gemm(p.qx, p.qw.t(), b_is_constant=True)
            product = in_family(family, constant_weight_product)
            cases[name] = p.rotate(product, p.int8, INT8, config)
    if p.device.type == "cuda" and p.M <= MAX_M_QUANTIZED and wanted(UNPROMISED):
        config = fastq.describe_int8_gemm(p.qx, p.qw.t())
        cases[UNPROMISED] = p.rotate(fastq.int8_gemm, p.int8, INT8, config)
    if p.device.type == "cpu" and wanted(PACKED):
        packed = fastq.pack_weight(p.qw.t())
        inputs = p.copies(p.qx, p.sx, p.sw, packed.data)
        config = fastq.describe_int8_gemm(p.qx, packed)
        product = partial(packed_product, shape=packed.shape)
        cases[PACKED] = p.rotate(product, inputs, INT8, config)
    if p.device.type == "cuda" and p.M <= MAX_M_QUANTIZED and wanted(QUANTIZED):
        activations = p.copies(p.x.bfloat16(), like=len(p.int8))
        inputs = [(x, b, sb) for (x,), (_, b, _, sb) in zip(activations, p.int8, strict=True)]
        cases[QUANTIZED] = p.rotate(quantized_product, inputs, "bfloat16, int8 -> bfloat16")
    return cases


def qlinear_product(a, packed, sb, zero_points, *, scale, zero_point):
    out_scale, out_zero_point = 1.0, 0  # of a quantised output
    return torch.ops.onednn.qlinear_pointwise(
        a, scale, zero_point, packed, sb, zero_points, None, out_scale, out_zero_point,
        torch.bfloat16, "none", [], "",
    )  # fmt: skip


def qlinear_dtypes(device: torch.device) -> list[torch.dtype]:
    """The activations that oneDNN has a fast kernel for: int8 ones with AMX alone, elsewhere they
    take its reference loop."""
    if device.type != "cpu":
        return []
    return [torch.int8, torch.uint8] if fastq.describe()["cpu"]["isa"] == "amx" else [torch.uint8]


def qlinear(p: Problem, dtype: torch.dtype) -> Case:
    """oneDNN's prepacked linear. It has one scale and one zero point for all tokens, and allocates
    its output."""
    scale = p.x.abs().max().item() / 127
    zero_point = 128 if dtype == torch.uint8 else 0
    a = ((p.x / scale).round() + zero_point).to(dtype)
    sb, weight_zero_points = p.sw.flatten(), torch.zeros(p.N, dtype=torch.int64)
    # The form of a packed weight may depend on the activation's shape. Its bytes cannot be cloned.
    copies = [torch.ops.onednn.qlinear_prepack(p.qw, [p.M, p.K]) for _ in p.int8]
    product = partial(qlinear_product, scale=scale, zero_point=zero_point)
    inputs = [(a.clone(), packed, sb.clone(), weight_zero_points) for packed in copies]
    expected = (
        (a[:64].double() - zero_point) * scale @ (p.qw.double() * p.sw.double().view(-1, 1)).t()
    )
    error = (product(*inputs[0])[:64] - expected).abs().max() / expected.abs().max()
    assert error < 2**-8, error
    size = a.nbytes + p.qw.nbytes + sb.nbytes + p.M * p.N * torch.bfloat16.itemsize
    name = str(dtype).removeprefix("torch.")
    return Case([partial(product, *tensors) for tensors in inputs], size, f"{name} -> bfloat16")


def takes(name: str, product: Callable[..., object], tensors: Tensors) -> bool:
    try:
        product(*tensors)
    except RuntimeError as error:
        print(f"  {name}: does not take this shape ({str(error).splitlines()[0]})")
        return False
    return True


def peers(p: Problem, wanted: Wanted) -> dict[str, Case]:
    """Every product of torch that takes the shape."""
    sums = {"dtype": "int8 -> int32", "out": torch.int32}
    candidates: dict[str, tuple] = {
        f"{INT_MM}[w.t()]": (torch._int_mm, lambda: [(a, b) for a, b, _, _ in p.int8], sums),
        BF16_MM: (torch.mm, lambda: p.bf16, {"dtype": "bfloat16"}),
    }
    if p.device.type == "cpu":
        # On a GPU this layout is several times slower than the other.
        candidates[f"{INT_MM}[(K, N)]"] = (
            torch._int_mm,
            lambda: p.copies(p.qx, p.qw.t().contiguous()),
            sums,
        )
        if p.M * p.N * p.K <= MAX_FLOAT32_MACS:
            candidates["torch.mm[float32]"] = (
                torch.mm,
                lambda: p.copies(p.x, p.w.t()),
                {"dtype": "float32", "out": torch.float32},
            )
    else:
        candidates[FP8_MM] = (
            partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True),
            lambda: p.fp8,
            {"dtype": "float8 -> bfloat16", "out": None},
        )
    cases = {}
    for name, (product, inputs, options) in candidates.items():
        if not wanted(name):
            continue
        tensors = inputs()
        if takes(name, product, tensors[0]):
            cases[name] = p.rotate(product, tensors, **options)
    for dtype in qlinear_dtypes(p.device):
        name = f"{QLINEAR}[{str(dtype).removeprefix('torch.')}]"
        if wanted(name):
            cases[name] = qlinear(p, dtype)
    return cases


def is_worth_timing(tile: Tile, M: int) -> bool:
    return "warpspecialized" not in tile.name or M <= MAX_M_WARPSPECIALIZED


def references(p: Problem, library: Reference, wanted: Wanted) -> dict[str, Case]:
    """The reference tiles that give what ours gives, bit for bit."""
    expected = fastq.int8_gemm(*p.int8[0])
    out = torch.empty_like(expected)
    cases = {}
    for tile in library.tiles:
        name = tile.implementation
        if not is_worth_timing(tile, p.M) or not wanted(name):
            continue
        workspace = library.workspace(tile, p.M, p.N, p.K, p.device)
        product = partial(library.int8_gemm, tile, workspace=workspace)
        out.fill_(float("nan"))
        if not takes(name, partial(product, out=out), p.int8[0]):
            continue
        if not torch.equal(out, expected):
            print(f"  {name}: left out, its result is not ours")
            continue
        cases[name] = p.rotate(product, p.int8, INT8, tile.name)
    return cases
