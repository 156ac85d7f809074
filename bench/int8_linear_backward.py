"""The gradient of a linear layer's input through its frozen INT8 weight, beside two products of 16
bits: one that dequantises the whole weight first, and one of a weight that is there in 16 bits.

``python -m bench.int8_linear_backward --device cuda`` appends to
``bench/results/<device>/int8_linear_backward.jsonl``. Gradients are drawn from N(0, 1), a weight
too, and quantised by absmax. ``ratio`` is the time of dequantising first over this
implementation's; ``ratios`` has the 16-bit product's, too. ``temporary_bytes`` is the most memory
that a call holds at a time beside its output (CUDA only), ``weight_bytes`` the weight in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastq
from fastq.nn.input_gradient import linear_input_gradient

from . import results, timing

OURS, DEQUANTISED, FLOAT = "fastq", "dequantize + torch.mm", "torch.mm"
DTYPE = torch.bfloat16


def dequantise_first(dy: Tensor, w: Tensor, sw: Tensor) -> Tensor:
    return torch.mm(dy, fastq.dequantize(w, sw, out_dtype=dy.dtype))


def temporary_bytes(call: Callable[[], Tensor], device: torch.device) -> int | None:
    """The most that a call holds at a time beside what it returns."""
    if device.type != "cuda":
        return None
    call()  # the first one may allocate what stays, such as cuBLAS's workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - result.nbytes


def run(writer: results.Writer, sizes: dict, tag: str, rounds: int) -> None:
    device = writer.device
    m, n, k = sizes["M"], sizes["N"], sizes["K"]
    generator = torch.Generator(device=device).manual_seed(0)
    dy = torch.randn(m, n, generator=generator, device=device).to(DTYPE)
    copies = timing.copies(n * k, device)
    floats = [
        torch.randn(n, k, generator=generator, device=device).to(DTYPE) for _ in range(copies)
    ]
    weights = [fastq.quantize_per_channel(w) for w in floats]
    candidates = {
        OURS: [partial(linear_input_gradient, dy, *weight) for weight in weights],
        DEQUANTISED: [partial(dequantise_first, dy, *weight) for weight in weights],
        FLOAT: [partial(torch.mm, dy, w) for w in floats],
    }
    held = {name: temporary_bytes(calls[0], device) for name, calls in candidates.items()}
    clocks = results.read_clocks(device)
    timings = timing.measure(candidates, device, rounds)
    measured = clocks()
    print(f"{results.shape_text(sizes)} ({tag}), ratio against dequantising first, then against mm")
    for name, t in timings.items():
        rate = 2e-6 * m * n * k / t.p50_us
        ratios = {peer: round(timings[peer].p50_us / t.p50_us, 4) for peer in (DEQUANTISED, FLOAT)}
        memory = "" if held[name] is None else f"{held[name] / 2**20:9.1f} MiB"
        print(
            f"  {name:22} {t.p50_us:11.2f} us {rate:8.1f} TFLOP/s "
            f"{ratios[DEQUANTISED]:7.3f} {ratios[FLOAT]:7.3f} {memory}"
        )
        writer.write(
            op="int8_linear_backward",
            tag=tag,
            shape=sizes,
            dtype=str(DTYPE).removeprefix("torch."),
            implementation=name,
            config=None,
            **t._asdict(),
            copies=copies,
            rate=round(rate, 3),
            unit="TFLOP/s",
            peer=DEQUANTISED,
            ratio=ratios[DEQUANTISED],
            ratios=ratios,
            temporary_bytes=held[name],
            weight_bytes=n * k * DTYPE.itemsize,
            clocks=measured,
        )


def main() -> None:
    parser = results.arguments("int8_linear_backward")
    results.add_shapes(parser, "int8_linear_backward")
    options = parser.parse_args()
    writer = results.writer(options, "int8_linear_backward")
    for sizes, tag in results.shapes(options):
        run(writer, sizes, tag, options.rounds)
    print(f"appended to {writer.path}")


if __name__ == "__main__":
    main()
