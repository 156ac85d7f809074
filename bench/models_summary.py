"""What the lines of ``bench.decode`` and ``bench.prefill`` say as a whole: tables, and the figures
that a run is judged by.

``python -m bench.models_summary FOLDER`` reads ``decode.jsonl``, ``prefill.jsonl`` and
``decode_ops.jsonl`` of a folder of results, the newest line of each case; of the ops of a step, the
newest run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import results
from .decode import FLOAT
from .decode_peers import BITSANDBYTES, COMPILED, EAGER

Line = dict[str, Any]
OURS, OURS_KV8, SPLIT = "w8a8", "w8a8+kv8", "llm_int8"
PASSES = 0.98  # a ratio of 1, less what two equal times may differ by
SMALL = "opt-1.3b"
# Of a decoding step at batch 1: how much faster than 16 bits, and what part of the limit.
SPEEDUP = {SMALL: 1.0, "opt-6.7b": 1.5, "llama-7b": 1.5, "opt-13b": 1.65, "llama-13b": 1.65}
SPEEDUP["opt-30b"] = 1.8
OF_LIMIT = {"opt-6.7b": 0.65, "llama-7b": 0.65, "opt-13b": 0.72, "llama-13b": 0.72, "opt-30b": 0.8}
MOST_BYTES = 60e9


class Bar(NamedTuple):
    """A figure and what it must be: at least `wanted`, or at most where `is_most`."""

    name: str
    value: float
    wanted: float
    is_most: bool = False

    @property
    def passes(self) -> bool:
        if self.is_most:
            return self.value <= self.wanted
        return self.value >= self.wanted * (PASSES if self.wanted == 1 else 1)

    @property
    def text(self) -> str:
        sign = "<=" if self.is_most else ">="
        mark = "ok  " if self.passes else "MISS"
        return f"{mark} {self.name:62} {self.value:8.3f} {sign} {self.wanted:g}"


def by_shape(lines: list[Line]) -> dict[tuple, dict[str, Line]]:
    """Implementation -> line of each shape, without those that were skipped."""
    shapes: dict[tuple, dict[str, Line]] = {}
    for line in lines:
        if "p50_us" in line:
            shapes.setdefault(tuple(line["shape"].values()), {})[line["implementation"]] = line
    return shapes


def times(peer: Line, ours: Line) -> float:
    """How many times faster ours is."""
    return peer["p50_us"] / ours["p50_us"]


def decode_bars(lines: list[Line]) -> Iterator[Bar]:
    for (model, batch, context), cases in by_shape(lines).items():
        where = f"{model}, batch {batch}, {context} tokens"

        def against(
            name: str, peer: str, wanted: float, cases: dict = cases, where: str = where
        ) -> Iterator[Bar]:
            if name in cases and peer in cases:
                value = times(cases[peer], cases[name])
                yield Bar(f"{where}: {name} against {peer}", value, wanted)

        if batch == 1:
            yield from against(OURS, FLOAT, SPEEDUP.get(model, 1.0))
            if OURS in cases and model in OF_LIMIT:
                part = cases[OURS]["of_limit"]
                yield Bar(f"{where}: {OURS}, part of the limit", part, OF_LIMIT[model])
            if model == "llama-7b":
                yield from against(OURS, EAGER, 15)
                yield from against(OURS, COMPILED, 1)
                yield from against(SPLIT, BITSANDBYTES, 20)
            if model in ("opt-13b", "llama-13b"):
                yield from against(SPLIT, FLOAT, 1.3)
        elif batch == 16:
            yield from against(OURS_KV8, FLOAT, 1.5)
        if OURS in cases and cases[OURS]["allocated_ratio"] is not None:
            most = 0.55 if model == SMALL else 0.53
            ratio = cases[OURS]["allocated_ratio"]
            yield Bar(f"{where}: {OURS}, memory of the weights", ratio, most, True)
        if (model, batch, context) == ("opt-30b", 16, 1024) and OURS in cases:
            peak = 1e-9 * (cases[OURS]["peak_bytes"] or 0)
            yield Bar(f"{where}: {OURS}, GB at the height", peak, 1e-9 * MOST_BYTES, True)


def prefill_bars(lines: list[Line]) -> Iterator[Bar]:
    for (model, batch, seqlen), cases in by_shape(lines).items():
        for suffix in ("", "[eager]"):
            ours, peer = cases.get(OURS + suffix), cases.get(FLOAT + suffix)
            if ours is not None and peer is not None:
                wanted = 1.56 if batch * seqlen >= 1024 else 1.0
                where = f"{model}, prefill of {batch} x {seqlen}: {OURS}{suffix}"
                yield Bar(f"{where} against {FLOAT}{suffix}", times(peer, ours), wanted)


def table(rows: list[dict[str, str]]) -> list[str]:
    """Markdown; columns that are empty throughout are left out."""
    if not rows:
        return []
    head = [name for name in rows[0] if any(row[name] for row in rows)]
    cells = [head, ["---"] + ["---:"] * (len(head) - 1), *[[row[n] for n in head] for row in rows]]
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def _cell(line: Line | None, text: Callable[[Line], str]) -> str:
    return "" if line is None else text(line)


def _ms(line: Line | None) -> str:
    return _cell(line, lambda x: f"{1e-3 * x['p50_us']:.2f}")


def _times(peer: Line | None, ours: Line | None) -> str:
    return "" if peer is None or ours is None else f"{times(peer, ours):.2f}"


def _ahead(cases: dict[str, Line]) -> dict[str, str]:
    """How far W8A8 is ahead of 16 bits."""
    peer, ours = cases.get(FLOAT), cases.get(OURS)
    return {"16-bit ms": _ms(peer), "W8A8 ms": _ms(ours), "× 16-bit": _times(peer, ours)}


def decode_table(lines: list[Line]) -> list[str]:
    """A step of every model: milliseconds of each system, and how far W8A8 is ahead."""
    rows = []
    for (model, batch, context), cases in by_shape(lines).items():
        get = cases.get
        rows.append(
            {
                "a step of decoding, batch, tokens before": f"{model}, {batch}, {context}",
                **_ahead(cases),
                "of the limit": _cell(get(OURS), lambda x: f"{x['of_limit']:.0%}"),
                "INT8 cache ms": _ms(get(OURS_KV8)),
                "× 16-bit ": _times(get(FLOAT), get(OURS_KV8)),
                "LLM.int8() ms": _ms(get(SPLIT)),
                "transformers ms": _ms(get(EAGER)),
                "compiled ms": _ms(get(COMPILED)),
                "bitsandbytes ms": _ms(get(BITSANDBYTES)),
            }
        )
    return table(rows)


def prefill_table(lines: list[Line]) -> list[str]:
    """Prompts of every model, as CUDA graphs and launch by launch."""
    rows = []
    for (model, batch, seqlen), cases in by_shape(lines).items():
        get = cases.get
        rows.append(
            {
                "prefill, batch × tokens": f"{model}, {batch} × {seqlen}",
                **_ahead(cases),
                "eager W8A8 ms": _ms(get(f"{OURS}[eager]")),
                "eager × 16-bit": _times(get(f"{FLOAT}[eager]"), get(f"{OURS}[eager]")),
            }
        )
    return table(rows)


def step_of(line: Line) -> tuple:
    """Which step an op is of: the model, the batch, the tokens before it and the system."""
    shape = line["shape"]
    return shape["model"], shape["batch"], shape["context"], line["implementation"]


def ops_table(lines: list[Line], *, at_least: float = 0.005) -> list[str]:
    """Where a step goes: the ops with that share of it, the slowest first, beside the limit of
    each. Of all lines those of each step's newest run, whose time they share."""
    newest: dict[tuple, str] = {}
    for line in lines:
        newest[step_of(line)] = max(line["time"], newest.get(step_of(line), ""))
    rows = []
    for line in sorted(lines, key=lambda line: (step_of(line), -line["share"])):
        if line["share"] < at_least or line["time"] != newest[step_of(line)]:
            continue
        shape = line["shape"]
        largest = max(json.loads(shape["inputs"]), key=math.prod, default=[])
        kernels = ", ".join(line["config"]["kernels"])
        size = " × ".join(map(str, largest))
        rows.append(
            {
                "op, its largest input": f"`{line['tag']}` {size} {kernels}",
                "of a step of": ", ".join(map(str, step_of(line))),
                "calls": f"{line['calls']:g}",
                "µs a call": f"{line['us_a_call']:.2f}",
                "limit µs": f"{line['limit_us_a_call']:.2f}",
                "share": f"{line['share']:.1%}",
            }
        )
    return table(rows)


def read(folder: Path, op: str) -> list[Line]:
    path = folder / f"{op}.jsonl"
    return list(results.newest(path).values()) if path.exists() else []


def read_ops(folder: Path) -> list[Line]:
    """All lines: two ops of a step may have the same inputs, and runs differ in their ops."""
    path = folder / "decode_ops.jsonl"
    return results.read(path) if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.models_summary")
    parser.add_argument("results", type=Path)
    folder = parser.parse_args().results
    decode, prefill = read(folder, "decode"), read(folder, "prefill")
    text = decode_table(decode) + prefill_table(prefill) + ops_table(read_ops(folder))
    bars = [*decode_bars(decode), *prefill_bars(prefill)]
    missed = sum(not bar.passes for bar in bars)
    print("\n".join([*text, *(bar.text for bar in bars), f"{missed} of {len(bars)} missed"]))


if __name__ == "__main__":
    main()
