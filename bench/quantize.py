"""Quantisation and dequantisation, beside torch's own operations.

``python -m bench.quantize --device cuda`` appends to ``bench/results/<device>/quantize.jsonl``.
Inputs are drawn from N(0, 1). ``ratio`` is the time of the same computation in eager torch over
this implementation's (without the rotation, where ours has one); a plain copy of x shows what the
memory allows.
"""

from __future__ import annotations

from functools import partial

import torch

import fastq

from . import results, timing

ROTATED = "fastq[rotation=32]"


def torch_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_per_token as one would write it in torch."""
    s = x.abs().amax(-1, keepdim=True).float() / 127
    s = torch.where(s == 0, 1.0, s)
    return (x / s).round_().clamp_(-127, 127).to(torch.int8), s


def torch_dequantize(q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return (q * s).to(torch.bfloat16)


def run(writer: results.Writer, sizes: dict, tag: str, rounds: int) -> None:
    device = writer.device
    rows, cols = sizes["rows"], sizes["cols"]
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(rows, cols, generator=generator, device=device).bfloat16()
    xs = [x.clone() for _ in range(timing.copies(x.nbytes, device))]
    quantized = [fastq.quantize_per_token(x) for x in xs]
    ops = {
        "quantize_per_token": (
            3 * rows * cols + 4 * rows,
            "bfloat16 -> int8",
            {
                "fastq": [partial(fastq.quantize_per_token, x) for x in xs],
                ROTATED: [partial(fastq.quantize_per_token, x, rotation=32) for x in xs],
                "torch": [partial(torch_quantize, x) for x in xs],
                "torch.clone": [x.clone for x in xs],
            },
        ),
        "dequantize": (
            3 * rows * cols + 4 * rows,
            "int8 -> bfloat16",
            {
                "fastq": [partial(fastq.dequantize, q, s) for q, s in quantized],
                "torch": [partial(torch_dequantize, q, s) for q, s in quantized],
            },
        ),
    }
    for op, (size, dtype, candidates) in ops.items():
        timings = timing.measure(candidates, device, rounds)
        clocks = results.clocks(device)
        print(f"{op} {rows}x{cols} ({tag}), ratio against torch")
        for name, t in timings.items():
            moved = 2 * x.nbytes if name == "torch.clone" else size
            gb_per_s = 1e-3 * moved / t.p50_us
            ratio = timings["torch"].p50_us / t.p50_us
            print(f"  {name:18} {t.p50_us:11.2f} us {gb_per_s:9.1f} GB/s {ratio:7.3f}")
            writer.write(
                op=op,
                tag=tag,
                shape=sizes,
                dtype="bfloat16" if name == "torch.clone" else dtype,
                implementation=name,
                config=None,
                **t._asdict(),
                copies=len(xs),
                rate=round(gb_per_s, 3),
                unit="GB/s",
                peer="torch",
                ratio=round(ratio, 4),
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
