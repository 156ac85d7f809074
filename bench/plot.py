"""Draws the README's figure of speed from the newest stored results of a device.

``python -m bench.plot`` writes ``bench/results/nvidia-h200/speed.svg``: what W8A8 gains over 16
bits, in the product alone, in reading prompts and in decoding, each where there are results. It
needs matplotlib (``pip install '.[bench]'``).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .results import RESULTS, newest

Line = dict[str, Any]
DEVICE = "nvidia-h200"
# Systems of bench.decode that are drawn; 1 is this runtime in 16 bits.
SYSTEMS = {
    "w8a8": "W8A8",
    "w8a8+kv8": "W8A8, INT8 cache",
    "llm_int8": "LLM.int8()",
    "transformers": "transformers, 16 bits",
}
# Okabe and Ito's, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastq",  # the same results, the same file
}


class Curve(NamedTuple):
    """A ratio at each x; with the lowest and the highest that went into it, a band."""

    name: str
    points: dict[int, list[float]]


class Bars(NamedTuple):
    """Group -> series -> ratio, and what to write on its bar."""

    groups: dict[str, dict[str, tuple[float, str]]]


class Panel(NamedTuple):
    title: str
    x_label: str
    content: list[Curve] | Bars


# ---- what is drawn ------------------------------------------------------------------------------


def read(folder: Path, op: str) -> list[Line]:
    """The newest lines of an op that were timed."""
    path = folder / f"{op}.jsonl"
    lines = newest(path).values() if path.exists() else ()
    return [line for line in lines if "p50_us" in line]  # the others were skipped


def gemm_panel(lines: list[Line]) -> Panel | None:
    """Over all weights: the geometric mean at each M, the worst and the best."""
    points: dict[int, list[float]] = {}
    weights = set()
    for line in lines:
        shape, ratio = line["shape"], line.get("ratios", {}).get("bf16")
        if line["implementation"] == "fastq" and ratio is not None:
            points.setdefault(shape["M"], []).append(ratio)
            weights.add((shape["N"], shape["K"]))
    if not points:
        return None
    name = f"beside cuBLAS in bf16: mean, worst and best of {len(weights)} weights"
    return Panel("INT8 product, LLaMA's weights", "tokens (M)", [Curve(name, points)])


def prefill_panel(lines: list[Line]) -> Panel | None:
    """A curve for each model: W8A8 over 16 bits of this runtime, in the same kind of timing."""
    points: dict[str, dict[int, list[float]]] = {}
    for line in lines:
        shape = line["shape"]
        if line["implementation"] == "w8a8" and line["ratio"] is not None:
            at = points.setdefault(shape["model"], {})
            at.setdefault(shape["batch"] * shape["seqlen"], []).append(line["ratio"])
    curves = [Curve(model, at) for model, at in points.items()]
    return Panel("Reading prompts, W8A8", "batch × tokens", curves) if curves else None


def decode_panels(lines: list[Line]) -> list[Panel]:
    """A panel for each batch, at the shortest context; on a bar its tokens a second."""
    panels = []
    for batch in sorted({line["shape"]["batch"] for line in lines}):
        here = [line for line in lines if line["shape"]["batch"] == batch]
        context = min(line["shape"]["context"] for line in here)
        groups: dict[str, dict[str, tuple[float, str]]] = {}
        for line in here:
            if line["shape"]["context"] == context and line["ratio"] is not None:
                cell = (line["ratio"], f"{line['rate']:,.0f}")
                groups.setdefault(line["shape"]["model"], {})[line["implementation"]] = cell
        if groups:
            title = f"Decoding, batch {batch}, {context} tokens"
            panels.append(Panel(title, "on the bars: tokens a second", Bars(groups)))
    return panels


def panels_of(folder: Path) -> list[Panel]:
    found = [
        gemm_panel(read(folder, "int8_gemm")),
        prefill_panel(read(folder, "prefill")),
        *decode_panels(read(folder, "decode")),
    ]
    return [panel for panel in found if panel is not None]


# ---- how ----------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def draw_curves(axes: Axes, curves: list[Curve]) -> None:
    for colour, (name, points) in zip(COLOURS, curves, strict=False):
        x = sorted(points)
        axes.plot(x, [mean(points[m]) for m in x], "o-", color=colour, markersize=3, label=name)
        if any(len(values) > 1 for values in points.values()):
            low, high = ([f(points[m]) for m in x] for f in (min, max))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def draw_bars(axes: Axes, bars: Bars) -> None:
    found = {name for cells in bars.groups.values() for name in cells}
    series = [name for name in SYSTEMS if name in found]
    width = 0.8 / max(1, len(series))
    for index, (name, colour) in enumerate(zip(series, COLOURS, strict=False)):
        offset = (index - (len(series) - 1) / 2) * width
        cells = {at: cells[name] for at, cells in enumerate(bars.groups.values()) if name in cells}
        ratios, texts = zip(*cells.values(), strict=True)
        x = [at + offset for at in cells]
        drawn = axes.bar(x, ratios, 0.9 * width, color=colour, label=SYSTEMS[name])
        axes.bar_label(drawn, texts, padding=2, rotation=90, fontsize=6)
    axes.set_xticks(range(len(bars.groups)), list(bars.groups), fontsize=8)


def draw(panels: list[Panel], title: str) -> Figure:
    """The panels in rows of two, all with ratios on the y axis."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.8 * columns + (2.4 if columns == 1 else 0), 3.2 * rows + 0.3))
    figure.set_layout_engine("constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        if isinstance(panel.content, Bars):
            draw_bars(axes, panel.content)
        else:
            draw_curves(axes, panel.content)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylim(0, 1.45 * axes.dataLim.ymax)  # room for the legend
        axes.set_title(panel.title)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel("times as fast as 16 bits")
        axes.legend(loc="upper left", ncols=2)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot")
    parser.add_argument("--results", type=Path, default=RESULTS / DEVICE, help="of one device")
    parser.add_argument("--output", type=Path, help="default: speed.svg beside the results")
    options = parser.parse_args()
    panels = panels_of(options.results)
    if not panels:
        parser.error(f"{options.results} holds no results of int8_gemm, prefill or decode")
    output = options.output or options.results / "speed.svg"
    lines = [
        line for op in ("int8_gemm", "prefill", "decode") for line in read(options.results, op)
    ]
    devices = sorted({line["device"] for line in lines})
    with matplotlib.rc_context(STYLE):
        save(draw(panels, f"{', '.join(devices)}: speed of 8 bits beside 16 bits"), output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
