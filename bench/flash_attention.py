"""Attention, beside torch's scaled_dot_product_attention.

``python -m bench.flash_attention --device cpu`` appends to
``bench/results/<device>/flash_attention.jsonl``. Inputs are drawn from N(0, 1); there are as many
queries as keys. The rate counts 4 * batch * heads * seqlen^2 * head_dim operations, half of them
with a causal mask. ``ratio`` is the time of torch's over this implementation's.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

import fastq

from . import results, timing

DTYPES = (torch.float32, torch.bfloat16)


def run(writer: results.Writer, sizes: dict, tag: str, rounds: int, dtype: torch.dtype) -> None:
    device = writer.device
    generator = torch.Generator(device=device).manual_seed(0)
    batch, seqlen, heads, heads_k, head_dim = (
        sizes[name] for name in ("batch", "seqlen", "heads", "heads_k", "head_dim")
    )
    causal = bool(sizes["causal"])

    def operands() -> list[torch.Tensor]:
        return [
            torch.randn(batch, seqlen, h, head_dim, generator=generator, device=device).to(dtype)
            for h in (heads, heads_k, heads_k)
        ]

    bytes_each = sum(t.nbytes for t in operands())
    inputs = [operands() for _ in range(timing.copies(bytes_each, device))]
    # torch's wants (batch, heads, seqlen, head_dim); these are views.
    transposed = [[t.transpose(1, 2) for t in qkv] for qkv in inputs]
    sdpa = partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=heads != heads_k)
    candidates = {
        "fastq": [partial(fastq.flash_attention, *qkv, causal=causal) for qkv in inputs],
        "torch SDPA": [partial(sdpa, *qkv) for qkv in transposed],
    }
    timings = timing.measure(candidates, device, rounds)
    clocks = results.clocks(device)
    operations = 4 * batch * heads * seqlen**2 * head_dim / (2 if causal else 1)
    name = str(dtype).removeprefix("torch.")
    print(f"{results.shape_text(sizes)} {name} ({tag})")
    for implementation, t in timings.items():
        rate = 1e-3 * operations / t.p50_us
        ratio = timings["torch SDPA"].p50_us / t.p50_us
        print(f"  {implementation:12} {t.p50_us:11.2f} us {rate:9.1f} GFLOP/s {ratio:7.3f}")
        writer.write(
            op="flash_attention",
            tag=tag,
            shape=sizes,
            dtype=name,
            implementation=implementation,
            config=None,
            p10_us=t.p10_us,
            p50_us=t.p50_us,
            p90_us=t.p90_us,
            timer=t.timer,
            copies=len(inputs),
            rate=round(rate, 3),
            unit="GFLOP/s",
            peer="torch SDPA",
            ratio=round(ratio, 4),
            clocks=clocks,
        )


def main() -> None:
    parser = results.arguments("flash_attention")
    results.add_shapes(parser, "flash_attention")
    options = parser.parse_args()
    writer = results.writer(options, "flash_attention")
    for sizes, tag in results.shapes(options):
        for dtype in DTYPES:
            run(writer, sizes, tag, options.rounds, dtype)
    print(f"appended to {writer.path}")


if __name__ == "__main__":
    main()
