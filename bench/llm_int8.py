"""LLM.int8(): the product with outliers apart, beside W8A8 without them, the same product in 16
bits, and bitsandbytes where it is installed.

``python -m bench.llm_int8 --device cuda`` appends to ``bench/results/<device>/llm_int8.jsonl``.
Activations and weights are drawn from N(0, 1); 0.1 % of x's columns, one at least, lie beyond the
threshold of 6. The shapes tagged "paper" are the two linear layers of a feed-forward block, hidden
size four times the width, at 2048 tokens; those tagged "split" set the outliers' cost beside
``quantize_per_token`` and ``int8_gemm`` alone. Weights are cold. On a GPU an implementation is
timed in a CUDA graph and, under the name ``<implementation>[eager]``, without one; bitsandbytes
(``Linear8bitLt`` at threshold 6, INT8 weights) waits for the GPU in each call and is timed without.
``ratio`` is the time of the 16-bit product, timed the same way, over this implementation's;
``ratios`` has the other peers', too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastq
from fastq.nn.outlier_linear import padded_rows

from . import results, timing

OURS, KEPT = "llm_int8_matmul", "llm_int8_matmul[kept]"
SPLIT, FLOAT = "quantize_per_token + int8_gemm", "torch linear"
BITSANDBYTES = "bitsandbytes"
THRESHOLD = 6.0
DTYPES = {"cpu": torch.bfloat16, "cuda": torch.float16}


def w8a8(x: Tensor, w: Tensor, sw: Tensor) -> Tensor:
    q, s = fastq.quantize_per_token(x)
    return fastq.int8_gemm(q, w.t(), s, sw, b_is_constant=True, out_dtype=x.dtype)


def activations(m: int, k: int, columns: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1), and in the given columns 6 to some 40, with either sign."""
    x = torch.randn(m, k, generator=generator, device=generator.device)
    outliers = x[:, columns]
    x[:, columns] = torch.copysign(THRESHOLD + 0.1 + 10 * outliers.abs(), outliers)
    return x


def bitsandbytes_layers(weights: list[Tensor]) -> list[Any] | None:
    """Their layers of these 16-bit weights, quantised; None where they are not installed."""
    try:
        import bitsandbytes
    except ImportError:
        return None
    layers = []
    for w in weights:
        n, k = w.shape
        options = {"bias": False, "has_fp16_weights": False, "threshold": THRESHOLD}
        layer = bitsandbytes.nn.Linear8bitLt(k, n, **options, device="meta")
        # Theirs is quantised when it leaves the CPU.
        held = bitsandbytes.nn.Int8Params(w.cpu(), requires_grad=False, has_fp16_weights=False)
        layer.weight = held.to(w.device)
        layers.append(layer.eval())
    return layers


def candidates(x: Tensor, floats: list[Tensor], columns: Tensor) -> dict[str, timing.Calls]:
    weights = [fastq.quantize_per_channel(w) for w in floats]
    ours = partial(fastq.llm_int8_matmul, x, threshold=THRESHOLD, w_is_constant=True)
    padded = [(padded_rows(w), sw) for w, sw in weights]
    kept = [w[:, columns].contiguous() for w in floats]
    of = {
        OURS: [partial(ours, *weight) for weight in padded],
        KEPT: [
            partial(ours, *weight, outlier_columns=columns.int(), outlier_weight=held)
            for weight, held in zip(padded, kept, strict=True)
        ],
        SPLIT: [partial(w8a8, x, *weight) for weight in weights],
        FLOAT: [partial(functional.linear, x, w) for w in floats],
    }
    if x.device.type == "cuda":
        of |= {f"{name}[eager]": calls for name, calls in of.items()}
        layers = bitsandbytes_layers(floats)
        if layers is not None:
            of[f"{BITSANDBYTES}[eager]"] = [partial(layer, x) for layer in layers]
    return of


def run(writer: results.Writer, sizes: dict, tag: str, rounds: int) -> None:
    device = writer.device
    m, n, k = sizes["M"], sizes["N"], sizes["K"]
    dtype = DTYPES[device.type]
    generator = torch.Generator(device=device).manual_seed(0)
    chosen = torch.randperm(k, generator=generator, device=device)[: max(round(1e-3 * k), 1)]
    columns = chosen.sort().values
    x = activations(m, k, columns, generator).to(dtype)
    copies = timing.copies(n * k, device)
    floats = [
        torch.randn(n, k, generator=generator, device=device, dtype=dtype) for _ in range(copies)
    ]
    of = candidates(x, floats, columns)
    eager = [name for name in of if name.endswith("[eager]")]
    clocks = results.read_clocks(device)
    with torch.no_grad():
        timings = timing.measure(of, device, rounds, eager)
    measured = clocks()
    print(
        f"{results.shape_text(sizes)}, {len(columns)} outlier columns ({tag}), ratio against 16 bit"
    )
    for name, t in timings.items():
        suffix = "[eager]" if name in eager else ""
        rate = 2e-6 * m * n * k / t.p50_us
        ratios = {
            peer: round(timings[peer + suffix].p50_us / t.p50_us, 4)
            for peer in (FLOAT, SPLIT, BITSANDBYTES)
            if peer + suffix in timings
        }
        others = " ".join(f"{ratio:7.3f}" for ratio in ratios.values())
        print(f"  {name:38} {t.p50_us:11.2f} us {rate:8.1f} TOP/s {others}")
        writer.write(
            op="llm_int8",
            tag=tag,
            shape=sizes,
            dtype=str(dtype).removeprefix("torch."),
            implementation=name,
            config={"threshold": THRESHOLD, "outlier_columns": len(columns)},
            **t._asdict(),
            copies=copies,
            rate=round(rate, 3),
            unit="TOP/s",
            peer=FLOAT + suffix,
            ratio=ratios[FLOAT],
            ratios=ratios,
            clocks=measured,
        )


def main() -> None:
    parser = results.arguments("llm_int8")
    results.add_shapes(parser, "llm_int8")
    options = parser.parse_args()
    writer = results.writer(options, "llm_int8")
    for sizes, tag in results.shapes(options):
        run(writer, sizes, tag, options.rounds)
    print(f"appended to {writer.path}")


if __name__ == "__main__":
    main()
