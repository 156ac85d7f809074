"""The README's tables of whole models, from the lines of bench.decode and bench.prefill.

Of the steps that `bench.decode --explain` took apart, one is shown: W8A8, batch 1, of LLaMA-7B
where that was measured.
"""

from __future__ import annotations

from typing import Any

from .markdown import table

Line = dict[str, Any]
FLOAT = "16bit"  # this runtime, what the others' ratios are to
NAMES = {
    FLOAT: "16 bit",
    "w8a8": "W8A8",
    "w8a8+kv8": "W8A8, INT8 cache",
    "w8a8_static": "W8A8 static",
    "w8a8_static+kv8": "W8A8 static, INT8 cache",
    "llm_int8": "LLM.int8()",
    "transformers": "transformers",
    "transformers-compiled": "transformers, compiled",
    "bitsandbytes": "bitsandbytes",
}

SHOWN = 0.005  # the least part of a step that an op is listed for


def timed(lines: list[Line]) -> list[Line]:
    """Without what was skipped."""
    return [line for line in lines if "p50_us" in line]


def decode_tables(lines: list[Line]) -> list[str]:
    """Of each model, batch and context the systems side by side; and what the models take."""
    steps: dict[tuple, dict[str, str]] = {}
    memory: dict[str, dict[str, str]] = {}
    for line in timed(lines):
        shape, system = line["shape"], line["implementation"]
        cell = f"{1e-3 * line['p50_us']:.2f}"
        ratio = "" if system == FLOAT or line["ratio"] is None else f"{line['ratio']:.2f} ×, "
        cell += f" ({ratio}{100 * line['of_limit']:.0f} %)"
        key = (shape["model"], f"{shape['batch']} × {shape['context']}")
        steps.setdefault(key, {})[system] = cell
        gigabytes = f"{line['allocated_bytes'] / 1e9:.2f}"
        if system != FLOAT and line["allocated_ratio"] is not None:
            gigabytes += f" ({line['allocated_ratio']:.3f} ×)"
        memory.setdefault(shape["model"], {})[system.removesuffix("+kv8")] = gigabytes
    head = "A step of decoding, ms (and × 16 bit of this runtime, % of the bandwidth limit):"
    text = [head, "", *_columns(["model", "batch × tokens"], steps)]
    by_model = {(model,): cells for model, cells in memory.items()}
    return [
        *text,
        "Memory that the models take, GB (and × 16 bit):",
        "",
        *_columns(["model"], by_model),
    ]


def ops_table(lines: list[Line]) -> list[str]:
    """Where the time of one step goes, by op, beside the time that its bytes take to be read."""
    steps = [line for line in lines if line["implementation"] == "w8a8"]
    steps = [line for line in steps if line["shape"]["batch"] == 1] or lines
    steps = [line for line in steps if line["shape"]["model"] == "llama-7b"] or steps
    last = max(steps, key=lambda line: line["time"])
    # What another run found may have other ops.
    found = [line for line in steps if line["step_us"] == last["step_us"]]
    shown = sorted(found, key=lambda line: -line["us_a_step"])
    rows = [
        [
            f"`{line['tag']}`",
            ", ".join(f"`{kernel}`" for kernel in line["config"]["kernels"]),
            f"{line['calls']:g}",
            f"{line['us_a_call']:.2f}",
            f"{line['limit_us_a_call']:.2f}",
            f"{line['us_a_step']:,.1f}",
            f"{100 * line['share']:.1f} %",
        ]
        for line in shown
        if line["share"] >= SHOWN
    ]
    shape = last["shape"]
    system = NAMES.get(last["implementation"], last["implementation"])
    text = (
        f"Where a step of {shape['model']} in {system} goes, batch {shape['batch']}, "
        f"{shape['context']} tokens ({last['kernels_a_step']:.0f} kernels, "
        f"{last['kernels_a_layer']} a layer; {last['step_us']:,.0f} µs a step as a graph):"
    )
    head = ["op", "kernels", "calls", "µs a call", "limit µs", "µs a step", "share"]
    return [text, "", *table(head, rows)]


def _columns(first: list[str], rows: dict[tuple, dict[str, str]]) -> list[str]:
    """A column for each system that a row has."""
    systems = [name for name in NAMES if any(name in cells for cells in rows.values())]
    texts = [[*key, *(cells.get(name, "") for name in systems)] for key, cells in rows.items()]
    return table([*first, *(NAMES[name] for name in systems)], texts)


def prefill_table(lines: list[Line]) -> list[str]:
    """Of each model and system, how far ahead of 16 bits at each number of tokens."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for line in timed(lines):
        system, shape = line["implementation"], line["shape"]
        if system not in NAMES or system == FLOAT or line["ratio"] is None:
            continue
        tokens = shape["batch"] * shape["seqlen"]
        cell = f"{1e-3 * line['p50_us']:.1f} ({line['ratio']:.2f} ×)"
        cells.setdefault((shape["model"], NAMES[system]), {})[tokens] = cell
    sizes = sorted({tokens for row in cells.values() for tokens in row})
    head = ["model", "scheme", *(f"{tokens:,}" for tokens in sizes)]
    rows = [[*key, *(row.get(tokens, "") for tokens in sizes)] for key, row in cells.items()]
    text = "Reading prompts, batch × tokens in all, ms (and × 16 bit of this runtime):"
    return [text, "", *table(head, rows)]
