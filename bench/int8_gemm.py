"""INT8 GEMM with per-token and per-channel scales, beside torch's bare integer and float products.

``python -m bench.int8_gemm --device cuda`` appends a line for each shape and implementation to
``bench/results/<device>/int8_gemm.jsonl``. Inputs are drawn from N(0, 1) and quantised by absmax.
``ratio`` is the peer's time over this implementation's: above 1 this one is faster.

Ours compute the scales and write bfloat16; ``torch._int_mm`` gives the raw int32 sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

import fastq

from . import results, timing

# The first of them that takes the shape is what `ratio` compares with.
INT_MM = "torch._int_mm"
BF16_MM = "torch.mm[bfloat16]"


class Operands(NamedTuple):
    """Activations x and weight w, and what quantisation makes of them."""

    x: torch.Tensor  # (M, K) float32
    w: torch.Tensor  # (N, K) float32
    qx: torch.Tensor
    sx: torch.Tensor
    qw: torch.Tensor
    sw: torch.Tensor


def draw(M: int, N: int, K: int, device: torch.device) -> Operands:
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(M, K, generator=generator, device=device)
    w = torch.randn(N, K, generator=generator, device=device)
    return Operands(x, w, *fastq.quantize_per_token(x), *fastq.quantize_per_channel(w))


class Case(NamedTuple):
    calls: timing.Calls
    bytes: int  # that a call reads and writes at least
    dtype: str
    config: str | None = None


def rotate(
    product: Callable[..., object],
    inputs: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    dtype: str,
    config: str | None = None,
    *,
    allocates: bool = False,
) -> Case:
    """`product` on copies of its inputs, enough of them to spill the caches. `allocates`: it takes
    no out, and `out` only says what it gives."""
    size = sum(t.nbytes for t in inputs)
    calls = []
    for _ in range(timing.copies(size, out.device)):
        # clone() keeps the strides of a dense tensor: a transposed weight stays one.
        copied = [t.clone() for t in inputs]
        kwargs = {} if allocates else {"out": torch.empty_like(out)}
        calls.append(partial(product, *copied, **kwargs))
    return Case(calls, size + out.nbytes, dtype, config)


@contextmanager
def kernel_family(name: str) -> Iterator[None]:
    """FASTQ_KERNELS for a while. A captured graph keeps the kernels of its capture."""
    before = os.environ.pop("FASTQ_KERNELS", None)
    if name != "default":
        os.environ["FASTQ_KERNELS"] = name
    try:
        yield
    finally:
        os.environ.pop("FASTQ_KERNELS", None)
        if before is not None:
            os.environ["FASTQ_KERNELS"] = before


def in_family(family: str, a: torch.Tensor, b: torch.Tensor, *args, **kwargs) -> None:
    with kernel_family(family):
        fastq.int8_gemm(a, b, *args, **kwargs)


def packed_product(a, sa, sb, data, *, shape, out):
    fastq.int8_gemm(a, fastq.PackedWeight(data, *shape), sa, sb, out=out)


def ours(o: Operands, families: list[str]) -> dict[str, Case]:
    device = o.x.device
    out = torch.empty(len(o.qx), len(o.qw), dtype=torch.bfloat16, device=device)
    dtype = "int8 -> bfloat16"
    inputs = (o.qx, o.qw.t(), o.sx, o.sw)
    cases = {}
    if device.type == "cuda":
        for family in families:
            with kernel_family(family):
                config = fastq.describe_int8_gemm(o.qx, o.qw.t())
            name = "fastq" if family == "default" else f"fastq[{family}]"
            product = fastq.int8_gemm if family == "default" else partial(in_family, family)
            cases[name] = rotate(product, inputs, out, dtype, config)
        return cases
    config = fastq.describe_int8_gemm(o.qx, o.qw.t())
    cases["fastq"] = rotate(fastq.int8_gemm, inputs, out, dtype, config)
    packed = fastq.pack_weight(o.qw.t())
    product = partial(packed_product, shape=packed.shape)
    config = fastq.describe_int8_gemm(o.qx, packed)
    inputs = (o.qx, o.sx, o.sw, packed.data)
    cases["fastq[packed]"] = rotate(product, inputs, out, dtype, config)
    return cases


def peers(o: Operands) -> dict[str, Case]:
    """Every product of torch that takes the shape."""
    device = o.x.device
    sums = torch.empty(len(o.qx), len(o.qw), dtype=torch.int32, device=device)
    wanted: dict[str, tuple] = {
        f"{INT_MM}[w.t()]": (torch._int_mm, (o.qx, o.qw.t()), sums, "int8 -> int32"),
        f"{INT_MM}[(K, N)]": (torch._int_mm, (o.qx, o.qw.t().contiguous()), sums, "int8 -> int32"),
    }
    x, w, bf16 = o.x.bfloat16(), o.w.bfloat16(), sums.to(torch.bfloat16)
    wanted[BF16_MM] = (torch.mm, (x, w.t()), bf16, "bfloat16")
    fp8_name = "torch._scaled_mm[float8 rowwise]"
    if device.type == "cpu":
        wanted["torch.mm[float32]"] = (torch.mm, (o.x, o.w.t()), sums.float(), "float32")
    else:
        x8, w8 = o.x.to(torch.float8_e4m3fn), o.w.to(torch.float8_e4m3fn)
        product = partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
        wanted[fp8_name] = (product, (x8, w8.t(), o.sx, o.sw[None]), bf16, "float8 -> bfloat16")
    cases = {}
    for name, (product, inputs, out, dtype) in wanted.items():
        try:
            product(*inputs)
        except RuntimeError as error:
            print(f"  {name}: does not take this shape ({str(error).splitlines()[0]})")
            continue
        cases[name] = rotate(product, inputs, out, dtype, allocates=name == fp8_name)
    return cases


def check_sums(o: Operands) -> None:
    """A benchmark of a wrong product is worth nothing."""
    sums = fastq.int8_gemm(o.qx[:64], o.qw[:256].t(), None, None, out_dtype=torch.int32)
    expected = o.qx[:64].double() @ o.qw[:256].double().t()
    assert torch.equal(sums.double(), expected)


def run(writer: results.Writer, sizes: dict, tag: str, families: list[str], rounds: int) -> None:
    device = writer.device
    M, N, K = sizes["M"], sizes["N"], sizes["K"]
    operands = draw(M, N, K, device)
    check_sums(operands)
    cases = ours(operands, families) | peers(operands)
    timings = timing.measure({name: case.calls for name, case in cases.items()}, device, rounds)
    layouts = [name for name in timings if name.startswith(INT_MM)]
    peer = min(layouts, key=lambda name: timings[name].p50_us, default=BF16_MM)
    clocks = results.clocks(device)
    print(f"{M}x{N}x{K} ({tag}), ratio against {peer}")
    for name, case in cases.items():
        t = timings[name]
        rate = 2e-6 * M * N * K / t.p50_us
        gb_per_s = 1e-3 * case.bytes / t.p50_us
        ratio = timings[peer].p50_us / t.p50_us
        print(
            f"  {name:34} {t.p50_us:11.2f} us {rate:9.3f} TOP/s {gb_per_s:8.1f} GB/s "
            f"{ratio:7.3f}  {case.config or ''}"
        )
        writer.write(
            op="int8_gemm",
            tag=tag,
            shape=sizes,
            dtype=case.dtype,
            implementation=name,
            config=case.config,
            p10_us=t.p10_us,
            p50_us=t.p50_us,
            p90_us=t.p90_us,
            timer=t.timer,
            copies=len(case.calls),
            rate=round(rate, 3),
            unit="TOP/s",
            gb_per_s=round(gb_per_s, 2),
            peer=peer,
            ratio=round(ratio, 4),
            clocks=clocks,
        )


def main() -> None:
    parser = results.arguments("int8_gemm")
    results.add_shapes(parser, "int8_gemm")
    parser.add_argument(
        "--families", default="default,sm80", help="CUDA kernel families: default, sm80, sm90"
    )
    options = parser.parse_args()
    writer = results.writer(options, "int8_gemm")
    for sizes, tag in results.shapes(options):
        run(writer, sizes, tag, options.families.split(","), options.rounds)
    print(f"appended to {writer.path}")


if __name__ == "__main__":
    main()
