"""What the lines of ``bench.int8_gemm`` say as a whole.

``python -m bench.int8_gemm_summary FILE`` reads a results file, the newest line of each case.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import results

Line = dict[str, Any]
OURS, PACKED = "fastq", "fastq[packed]"
QUANTIZED = "fastq[quantize+gemm]"  # from a bfloat16 activation
UNPROMISED = "fastq[b_is_constant=False]"  # the others promise it, as Int8Linear does
PASSES = 0.98  # a ratio of 1, less what two equal times may differ by

NAMES = {
    "reference": "the best reference tile",
    "dispatcher": "the dispatcher's tile",
    "beyond": "stream-K",
    "qlinear": "oneDNN's prepacked linear",
    "int_mm": "`_int_mm`",
    "bf16": "bf16 `mm`",
    "fp8": "fp8 `_scaled_mm`",
}


class Figure(NamedTuple):
    name: str
    value: float
    unit: str  # "x" for a ratio of times, above 1 where ours is faster
    where: str  # a shape, or of how many shapes it is the mean

    @property
    def text(self) -> str:
        return f"{self.value:.3f}×" if self.unit == "x" else f"{self.value:,.0f} {self.unit}"


def ratios(
    lines: list[Line],
    kind: str,
    which: Callable[[int], bool],
    implementation: str | None = None,
) -> dict[str, float]:
    """Shape -> ratio of an implementation's lines that have one and whose M is asked for. A
    prepacked peer's is that of our packed weight."""
    implementation = implementation or (PACKED if kind == "qlinear" else OURS)
    return {
        results.shape_text(line["shape"]): line["ratios"][kind]
        for line in lines
        if line["op"] == "int8_gemm"
        and line["implementation"] == implementation
        and kind in line.get("ratios", {})
        and which(line["shape"]["M"])
    }


def mean(name: str, values: dict[str, float]) -> list[Figure]:
    if not values:
        return []
    value = math.exp(sum(map(math.log, values.values())) / len(values))
    return [Figure(f"{name}, geometric mean", value, "x", f"{len(values)} shapes")]


def worst(name: str, values: dict[str, float]) -> list[Figure]:
    if not values:
        return []
    where = min(values, key=values.__getitem__)
    return [Figure(f"{name}, worst", values[where], "x", where)]


def weight_bandwidth(lines: list[Line], max_m: int) -> list[Figure]:
    """Bytes of the weight over the time, where reading it is all there is to do."""
    rates = {
        results.shape_text(line["shape"]): 1e-3 * line["shape"]["N"] * line["shape"]["K"]
        / line["p50_us"]
        for line in lines
        if line["op"] == "int8_gemm"
        and line["implementation"] == OURS
        and line["shape"]["M"] <= max_m
    }  # fmt: skip
    if not rates:
        return []
    name = f"weight bandwidth, M ≤ {max_m}"
    low, high = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    return [
        Figure(f"{name}, lowest", rates[low], "GB/s", low),
        Figure(f"{name}, highest", rates[high], "GB/s", high),
    ]


def figures(lines: list[Line]) -> list[Figure]:
    """The figures that a run is judged by; those that nothing was timed for are left out."""

    def small(M: int) -> bool:
        return M <= 64

    def large(M: int) -> bool:
        return M >= 512

    def every(M: int) -> bool:
        return True

    reference, dispatcher = NAMES["reference"], NAMES["dispatcher"]
    found = [
        *mean(f"M ≤ 64, against {reference}", ratios(lines, "reference", small)),
        *worst(f"M ≤ 64, against {reference}", ratios(lines, "reference", small)),
        *mean(
            f"M ≤ 64, b_is_constant=False, against {reference}",
            ratios(lines, "reference", small, UNPROMISED),
        ),
        *mean(f"M ≥ 512, against {reference}", ratios(lines, "reference", large)),
        *worst(f"M ≥ 512, against {reference}", ratios(lines, "reference", large)),
        *mean(f"M ≥ 512, against {dispatcher}", ratios(lines, "dispatcher", large)),
    ]
    for kind in NAMES:
        values = ratios(lines, kind, every)
        found += mean(f"every M, against {NAMES[kind]}", values)
        found += worst(f"every M, against {NAMES[kind]}", values)
    quantized = ratios(lines, "bf16", every, QUANTIZED)
    found += mean("quantisation included, against bf16 `mm`", quantized)
    found += worst("quantisation included, against bf16 `mm`", quantized)
    return found + weight_bandwidth(lines, 16)


def slower(lines: list[Line], kind: str) -> dict[str, float]:
    """The shapes on which a peer is faster, the worst first."""
    values = ratios(lines, kind, lambda M: True)
    below = [shape for shape, ratio in values.items() if ratio < PASSES]
    return {shape: values[shape] for shape in sorted(below, key=values.__getitem__)}


def report(lines: list[Line]) -> list[str]:
    """The figures, and where peers are faster, as lines of text."""
    text = [f"{f.name:62} {f.text:>12}  {f.where}" for f in figures(lines)]
    for kind, name in NAMES.items():
        timed = len(ratios(lines, kind, lambda M: True))
        below = slower(lines, kind)
        if below:
            shapes = ", ".join(f"{shape} {ratio:.3f}" for shape, ratio in below.items())
            text.append(f"below {PASSES} of {name} on {len(below)} of {timed} shapes: {shapes}")
        elif timed:
            text.append(f"at least {PASSES} of {name} on all {timed} shapes")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.int8_gemm_summary")
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    print("\n".join(report(list(results.newest(options.results).values()))))


if __name__ == "__main__":
    main()
