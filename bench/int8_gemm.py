"""INT8 GEMM with per-token and per-channel scales, beside what else there is for the same product.

``python -m bench.int8_gemm --device cuda`` appends a line for each shape and implementation to
``bench/results/<device>/int8_gemm.jsonl`` and ends with a summary. Inputs are drawn from N(0, 1)
and quantised by absmax.

A line's ``ratios`` are the times of its peers over its own: above 1 this one is faster. The peers:

- ``reference``: the fastest of CUTLASS's tiles in ``bench/reference`` (GPUs of compute capability
  9.0); ``dispatcher``: the one that vLLM's dispatcher picks; ``beyond``: what it has not;
- ``qlinear``: oneDNN's prepacked linear (CPUs), which has one scale for all tokens; the peer of
  ``fastq[packed]``;
- ``int_mm``: ``torch._int_mm``, which gives the raw int32 sums, without scales;
- ``bf16``: ``torch.mm``; ``fp8``: ``torch._scaled_mm`` with row-wise scales.

``fastq[quantize+gemm]`` starts from a bfloat16 activation, as ``bf16`` does.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator
from typing import Any

from . import int8_gemm_summary, reference_tiles, results, timing
from .int8_gemm_cases import (
    BF16_MM,
    FP8_MM,
    INT_MM,
    QLINEAR,
    Problem,
    Wanted,
    ours,
    peers,
    references,
)
from .kernel_families import add_families

Timings = dict[str, timing.Timing]
SHOWN = {int8_gemm_summary.OURS, int8_gemm_summary.PACKED}  # unless --verbose


def fastest_peers(timings: Timings, M: int, N: int) -> dict[str, str]:
    """The fastest implementation of each kind, for the kinds that were timed."""
    kinds = {
        "reference": "reference[",
        "dispatcher": f"reference[{reference_tiles.dispatched_tile(M, N)}]",
        "beyond": "beyond[",
        "qlinear": QLINEAR,
        "int_mm": INT_MM,
        "bf16": BF16_MM,
        "fp8": FP8_MM,
    }
    fastest = {}
    for kind, prefix in kinds.items():
        names = [name for name in timings if name.startswith(prefix)]
        if names:
            fastest[kind] = min(names, key=lambda name: timings[name].p50_us)
    return fastest


class Bench:
    """One run of the benchmark."""

    def __init__(self, options: argparse.Namespace, writer: results.Writer):
        self.writer, self.rounds, self.verbose = writer, options.rounds, options.verbose
        self.families = options.families
        self.wanted: Wanted = lambda name: re.search(options.only, name) is not None
        self.library = reference_tiles.find() if writer.device.type == "cuda" else None

    def run(self, sizes: dict[str, int], tag: str) -> None:
        M, N, device = sizes["M"], sizes["N"], self.writer.device
        problem = Problem(M, N, sizes["K"], device)
        problem.check()
        cases = ours(problem, self.families, self.wanted) | peers(problem, self.wanted)
        if self.library is not None:
            cases |= references(problem, self.library, self.wanted)
        clocks = results.read_clocks(device)
        timings = timing.measure(
            {name: case.calls for name, case in cases.items()}, device, self.rounds
        )
        fastest = fastest_peers(timings, M, N)
        peer = next(iter(fastest.values()), None)
        shared = {"op": "int8_gemm", "tag": tag, "shape": sizes, "clocks": clocks()}
        lines = []
        for name, case in cases.items():
            t = timings[name]
            ratios = {
                kind: round(timings[other].p50_us / t.p50_us, 4) for kind, other in fastest.items()
            }
            line = self.writer.write(
                **shared,
                dtype=case.dtype,
                implementation=name,
                config=case.config,
                **t._asdict(),
                copies=len(case.calls),
                rate=round(2e-6 * M * N * sizes["K"] / t.p50_us, 3),
                unit="TOP/s",
                gb_per_s=round(1e-3 * case.bytes / t.p50_us, 2),
                peer=peer,
                ratio=next(iter(ratios.values()), None),
                ratios=ratios,
            )
            lines.append(line)
        shown = {line["implementation"] for line in lines} if self.verbose else SHOWN
        self.show([line for line in lines if line["implementation"] in shown])

    def show(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            against = " ".join(f"{kind} {ratio:.3f}" for kind, ratio in line["ratios"].items())
            config = f" | {line['config']}" if self.verbose and line["config"] else ""
            width = 44 if self.verbose else 13
            if line["timer"] == timing.NOT_CAPTURED:
                config += f" | {line['timer']}"
            print(
                f"{results.shape_text(line['shape']):16} {line['implementation']:{width}} "
                f"{line['p50_us']:9.2f} us {line['rate']:8.2f} TOP/s "
                f"{line['gb_per_s']:6.0f} GB/s | {against}{config}",
                flush=True,
            )


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def pairs(text: str) -> list[tuple[int, int]]:
    return [(int(n), int(k)) for n, k in (pair.split("x") for pair in text.split(","))]


def chosen_shapes(options: argparse.Namespace) -> Iterator[tuple[dict[str, int], str]]:
    """The shapes file's, less what --M and --NK leave out; with both of them, all their pairs."""
    if options.M and options.NK:
        tags = {results.shape_text(sizes): tag for sizes, tag in results.shapes(options)}
        for (N, K), M in itertools.product(options.NK, options.M):
            sizes = {"M": M, "N": N, "K": K}
            yield sizes, tags.get(results.shape_text(sizes), "asked")
        return
    for sizes, tag in results.shapes(options):
        asked_m = not options.M or sizes["M"] in options.M
        if asked_m and (not options.NK or (sizes["N"], sizes["K"]) in options.NK):
            yield sizes, tag


def main() -> None:
    parser = results.arguments("int8_gemm")
    results.add_shapes(parser, "int8_gemm")
    parser.add_argument("--M", type=numbers, help="1,16,64: these of the shapes file")
    parser.add_argument("--NK", type=pairs, help="4096x4096,11008x4096; with --M: any shape")
    parser.add_argument("--only", default="", help="a regular expression on the implementation")
    add_families(parser)
    parser.add_argument("--verbose", action="store_true", help="every implementation of a shape")
    options = parser.parse_args()
    writer = results.writer(options, "int8_gemm")
    if options.device == "cpu":
        timing.keep_freed_memory()
    bench = Bench(options, writer)
    for sizes, tag in chosen_shapes(options):
        bench.run(sizes, tag)
    print("\n".join(int8_gemm_summary.report(writer.lines)))
    print(f"appended to {writer.path}")


if __name__ == "__main__":
    main()
