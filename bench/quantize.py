"""Quantisation, alone and fused with a norm or an activation before it, and dequantisation, beside
torch's own operations.

``python -m bench.quantize --device cuda`` appends to ``bench/results/<device>/quantize.jsonl``.
Inputs are drawn from N(0, 1). ``ratio`` is the time of the same computation in eager torch over
this implementation's (without the rotation, where ours has one). A rate counts the bytes that a
kernel must move, each operand once; ``of_copy`` sets it beside that of a plain copy of x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import fastq

from . import results, timing

ROTATED, COPY = "fastq[rotation=32]", "torch.clone"
RESIDUAL = "rms_norm_quant[residual]"
OPS = (
    "quantize_per_token",
    "rms_norm_quant",
    RESIDUAL,
    "layer_norm_quant",
    "silu_mul_quant",
    "gelu_quant",
    "relu_quant",
    "dequantize",
)


def torch_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """quantize_per_token as one would write it in torch."""
    s = x.abs().amax(-1, keepdim=True).float() / 127
    s = torch.where(s == 0, 1.0, s)
    return (x / s).round_().clamp_(-127, 127).to(torch.int8), s


def torch_rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch_quantize(functional.rms_norm(x, weight.shape, weight, 1e-6))


def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    h = x + residual
    return *torch_rms_norm(h, weight), h


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch_quantize(functional.layer_norm(x, weight.shape, weight, bias))


def torch_silu_mul(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch_quantize(functional.silu(gate) * up)


def torch_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch_quantize(functional.gelu(x))


def torch_relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch_quantize(torch.relu(x))


def torch_dequantize(q: Tensor, s: Tensor) -> Tensor:
    return (q * s).to(torch.bfloat16)


class Case(NamedTuple):
    """One op: what it must move, and its implementations on each copy of the inputs."""

    moved: int  # bytes
    dtype: str
    candidates: dict[str, list[Callable[[], object]]]


def case(op: str, xs: list[Tensor]) -> Case:
    """An op on inputs like `xs`."""
    rows, cols = xs[0].shape
    kind, scales, vector = "bfloat16 -> int8", 4 * rows, 2 * cols
    weight, bias = (xs[0].new_ones(cols), xs[0].new_zeros(cols))

    def both(ours: Callable, theirs: Callable, inputs: list[tuple]) -> dict[str, list]:
        return {
            name: [partial(function, *tensors) for tensors in inputs]
            for name, function in (("fastq", ours), ("torch", theirs))
        }

    alone = [(x,) for x in xs]
    if op == "quantize_per_token":
        candidates = both(fastq.quantize_per_token, torch_quantize, alone)
        candidates[ROTATED] = [partial(fastq.quantize_per_token, x, rotation=32) for x in xs]
        candidates[COPY] = [x.clone for x in xs]
        return Case(3 * rows * cols + scales, kind, candidates)
    if op == "dequantize":
        inputs = [fastq.quantize_per_token(x) for x in xs]
        candidates = both(fastq.dequantize, torch_dequantize, inputs)
        return Case(3 * rows * cols + scales, "int8 -> bfloat16", candidates)
    if op == "rms_norm_quant":
        candidates = both(fastq.rms_norm_quant, torch_rms_norm, [(x, weight) for x in xs])
        return Case(3 * rows * cols + scales + vector, kind, candidates)
    if op == RESIDUAL:

        def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return fastq.rms_norm_quant(x, weight, residual=residual)

        inputs = [(x, x.flip(0), weight) for x in xs]
        candidates = both(add_rms_norm, torch_add_rms_norm, inputs)
        return Case(7 * rows * cols + scales + vector, kind, candidates)
    if op == "layer_norm_quant":
        inputs = [(x, weight, bias) for x in xs]
        candidates = both(fastq.layer_norm_quant, torch_layer_norm, inputs)
        return Case(3 * rows * cols + scales + 2 * vector, kind, candidates)
    if op == "silu_mul_quant":
        inputs = [torch.cat([x, x.flip(0)], -1).chunk(2, -1) for x in xs]
        candidates = both(fastq.silu_mul_quant, torch_silu_mul, inputs)
        return Case(5 * rows * cols + scales, kind, candidates)
    ours, theirs = {
        "gelu_quant": (fastq.gelu_quant, torch_gelu),
        "relu_quant": (fastq.relu_quant, torch_relu),
    }[op]
    return Case(3 * rows * cols + scales, kind, both(ours, theirs, alone))


def run(writer: results.Writer, sizes: dict, tag: str, rounds: int) -> None:
    device = writer.device
    rows, cols = sizes["rows"], sizes["cols"]
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(rows, cols, generator=generator, device=device).bfloat16()
    xs = [x.clone() for _ in range(timing.copies(x.nbytes, device))]
    copy_rate = None
    for op in OPS:
        moved, dtype, candidates = case(op, xs)
        timings = timing.measure(candidates, device, rounds)
        clocks = results.clocks(device)
        if COPY in timings:
            copy_rate = 2e-3 * x.nbytes / timings[COPY].p50_us
        print(f"{op} {rows}x{cols} ({tag}), ratio against torch, share of a copy's rate")
        for name, t in timings.items():
            gb_per_s = copy_rate if name == COPY else 1e-3 * moved / t.p50_us
            ratio, of_copy = timings["torch"].p50_us / t.p50_us, gb_per_s / copy_rate
            print(
                f"  {name:18} {t.p50_us:11.2f} us {gb_per_s:9.1f} GB/s {ratio:7.3f} {of_copy:6.3f}"
            )
            writer.write(
                op=op,
                tag=tag,
                shape=sizes,
                dtype="bfloat16" if name == COPY else dtype,
                implementation=name,
                config=None,
                **t._asdict(),
                copies=len(xs),
                rate=round(gb_per_s, 3),
                unit="GB/s",
                peer="torch",
                ratio=round(ratio, 4),
                of_copy=round(of_copy, 4),
                clocks=clocks,
            )


def main() -> None:
    parser = results.arguments("quantize")
    results.add_shapes(parser, "quantize")
    options = parser.parse_args()
    writer = results.writer(options, "quantize")
    for sizes, tag in results.shapes(options):
        run(writer, sizes, tag, options.rounds)
    print(f"appended to {writer.path}")


if __name__ == "__main__":
    main()
