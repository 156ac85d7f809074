"""The README's tables of whole models, from the lines of bench.decode and bench.prefill."""

from __future__ import annotations

from typing import Any

from .markdown import table

Line = dict[str, Any]
FLOAT = "16 bit"  # this runtime, what the others' ratios are to
NAMES = {
    FLOAT: FLOAT,
    "w8a8": "W8A8",
    "w8a8+kv8": "W8A8, INT8 cache",
    "w8a8_static": "W8A8 static",
    "w8a8_static+kv8": "W8A8 static, INT8 cache",
    "llm_int8": "LLM.int8()",
    "transformers": "transformers",
    "transformers compiled": "transformers, compiled",
    "bitsandbytes": "bitsandbytes",
}


def timed(lines: list[Line]) -> list[Line]:
    """Without what was skipped."""
    return [line for line in lines if "p50_us" in line]


def decode_tables(lines: list[Line]) -> list[str]:
    """Of each model, batch and context the systems side by side; and what their weights take."""
    steps: dict[tuple, dict[str, str]] = {}
    memory: dict[str, dict[str, str]] = {}
    for line in timed(lines):
        shape, system = line["shape"], line["implementation"]
        cell = f"{1e-3 * line['p50_us']:.2f}"
        ratio = "" if system == FLOAT or line["ratio"] is None else f"{line['ratio']:.2f} ×, "
        cell += f" ({ratio}{100 * line['of_limit']:.0f} %)"
        key = (shape["model"], f"{shape['batch']} × {shape['context']}")
        steps.setdefault(key, {})[system] = cell
        gigabytes = f"{line['weight_bytes'] / 1e9:.1f}"
        memory.setdefault(shape["model"], {})[system.removesuffix("+kv8")] = gigabytes
    head = "A step of decoding, ms (and × 16 bit of this runtime, % of the bandwidth limit):"
    text = [head, "", *_columns(["model", "batch × tokens"], steps)]
    by_model = {(model,): cells for model, cells in memory.items()}
    return [*text, "Weights that a step reads, GB:", "", *_columns(["model"], by_model)]


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
