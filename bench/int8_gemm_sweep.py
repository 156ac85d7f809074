"""Whether our time grows smoothly with M: no drop where M grows, no cliff between M and M + 1.

``python -m bench.int8_gemm_sweep --device cuda`` times ``fastq.int8_gemm`` for M up to 512 around
the edges of tiles, all of an (N, K) in turns, and appends to
``bench/results/<device>/int8_gemm_sweep.jsonl``. ``--report FILE`` reads such lines again.
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import fastq

from . import results, timing
from .int8_gemm import pairs
from .int8_gemm_cases import Problem, constant_weight_product

Line = dict[str, Any]
OP = "int8_gemm_sweep"
MAX_M = 512
NK = "4096x4096,11008x4096"


def sizes(max_m: int) -> list[int]:
    """1 to 16, and the neighbours of each multiple of 8 up to 64 and of 16 beyond."""
    edges = [*range(8, 65, 8), *range(80, max_m + 1, 16)]
    near = {edge + d for edge in edges for d in (-1, 0, 1)}
    return sorted(m for m in near | set(range(1, 17)) if m <= max_m)


def run(writer: results.Writer, N: int, K: int, max_m: int, rounds: int) -> None:
    device = writer.device
    problem = Problem(max_m, N, K, device)
    problem.check()
    outs = [torch.empty(max_m, N, dtype=torch.bfloat16, device=device) for _ in problem.int8]
    calls, configs = {}, {}
    for m in sizes(max_m):
        calls[str(m)] = [
            partial(constant_weight_product, a[:m], b, sa[:m], sb, out=out[:m])
            for (a, b, sa, sb), out in zip(problem.int8, outs, strict=True)
        ]
        configs[str(m)] = fastq.describe_int8_gemm(
            problem.qx[:m], problem.qw.t(), b_is_constant=True
        )
    clocks = results.read_clocks(device)
    timings = timing.measure(calls, device, rounds)
    shared = {"op": OP, "tag": "sweep", "implementation": "fastq", "clocks": clocks()}
    for m, t in timings.items():
        before = timings.get(str(int(m) - 1))
        writer.write(
            **shared,
            shape={"M": int(m), "N": N, "K": K},
            dtype="int8 -> bfloat16",
            config=configs[m],
            **t._asdict(),
            copies=len(calls[m]),
            rate=round(2e-6 * int(m) * N * K / t.p50_us, 3),
            unit="TOP/s",
            peer="fastq at M - 1" if before else None,
            ratio=round(before.p50_us / t.p50_us, 4) if before else None,
        )


def change(kind: str, before: Line, after: Line) -> str:
    part = 100 * (after["p50_us"] / before["p50_us"] - 1)
    sides = " -> ".join(
        f"M={line['shape']['M']} {line['p50_us']:.2f} us "
        f"({line['p10_us']:.2f}..{line['p90_us']:.2f}, {line['config']})"
        for line in (before, after)
    )
    return f"  {kind} {part:+.1f} %: {sides}"


def largest_drop(lines: list[Line]) -> tuple[Line, Line] | None:
    """The pair M < M' whose time falls most, of lines in the order of M."""
    slowest, found, least = lines[0], None, 1.0
    for line in lines[1:]:
        part = line["p50_us"] / slowest["p50_us"]
        if part < least:
            found, least = (slowest, line), part
        if line["p50_us"] > slowest["p50_us"]:
            slowest = line
    return found


def report(lines: list[Line]) -> list[str]:
    text = []
    groups: dict[tuple[int, int], list[Line]] = {}
    for line in lines:
        if line["op"] == OP:
            groups.setdefault((line["shape"]["N"], line["shape"]["K"]), []).append(line)
    for (N, K), group in groups.items():
        group.sort(key=lambda line: line["shape"]["M"])
        spreads = sorted((line["p90_us"] - line["p10_us"]) / line["p50_us"] for line in group)
        first, last = group[0]["shape"]["M"], group[-1]["shape"]["M"]
        text.append(
            f"N={N} K={K}, {len(group)} sizes from M={first} to {last}, p10 to p90 "
            f"{100 * spreads[len(spreads) // 2]:.1f} % of the time (median), "
            f"{100 * spreads[-1]:.1f} % at most"
        )
        drop = largest_drop(group)
        text.append(change("largest drop", *drop) if drop else "  no drop")
        steps = [
            (before, after)
            for before, after in pairwise(group)
            if after["shape"]["M"] == before["shape"]["M"] + 1
        ]
        steps.sort(key=lambda pair: pair[0]["p50_us"] / pair[1]["p50_us"])
        text += [change("step of one row", *pair) for pair in steps[:3]]
    return text


def main() -> None:
    parser = results.arguments(OP)
    parser.add_argument("--NK", type=pairs, default=pairs(NK), help=f"default: {NK}")
    parser.add_argument("--max-m", type=int, default=MAX_M)
    parser.add_argument("--report", type=Path, help="measure nothing, read these lines")
    options = parser.parse_args()
    if options.report is not None:
        print("\n".join(report(list(results.newest(options.report).values()))))
        sys.exit()
    writer = results.writer(options, OP)
    for N, K in options.NK:
        run(writer, N, K, options.max_m, options.rounds)
    print("\n".join(report(writer.lines)))
    print(f"appended to {writer.path}")


if __name__ == "__main__":
    main()
