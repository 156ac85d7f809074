"""Writes the README's tables from the newest committed results.

``python -m bench.readme_table`` rewrites what stands between ``<!-- bench:begin -->`` and
``<!-- bench:end -->``, speed, and between the same marks of ``quality``; with ``--check`` it only
says whether that is up to date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import int8_gemm_summary, models_summary
from .flash_decode import COPY, INT8
from .int8_gemm_cases import BF16_MM, INT_MM, QLINEAR
from .int8_gemm_summary import PACKED, QUANTIZED
from .int8_linear_backward import DEQUANTISED
from .int8_linear_backward import FLOAT as MM
from .int8_linear_backward import OURS as BACKWARD
from .llm_int8 import BITSANDBYTES, FLOAT, KEPT, OURS, SPLIT
from .markdown import table
from .quality_table import section as quality_section
from .quantize import OPS as QUANTIZE_OPS
from .results import REPOSITORY, RESULTS, newest

Line = dict[str, Any]


def by_shape(lines: list[Line]) -> dict[tuple, dict[str, Line]]:
    """The implementations of each shape."""
    shapes: dict[tuple, dict[str, Line]] = {}
    for line in lines:
        shapes.setdefault(tuple(line["shape"].values()), {})[line["implementation"]] = line
    return shapes


def microseconds(line: Line | None) -> str:
    return "" if line is None else f"{line['p50_us']:,.1f}"


def speedup(ours: Line | None, peer: Line | None) -> str:
    return "" if ours is None or peer is None else f"{peer['p50_us'] / ours['p50_us']:.2f}"


def gemm_table(lines: list[Line]) -> list[str]:
    """Our fastest form of each shape beside the fastest forms of torch's products; the packed one
    beside oneDNN's, which is prepacked too. Columns that nothing was timed for are left out."""
    rows = []
    for shape, cases in by_shape(lines).items():

        def fastest(prefix: str, cases: dict[str, Line] = cases) -> Line | None:
            found = [line for name, line in cases.items() if name.startswith(prefix)]
            return min(found, key=lambda line: line["p50_us"], default=None)

        packed, qlinear = cases.get(PACKED), fastest(QLINEAR)
        int_mm, bf16 = fastest(INT_MM), cases.get(BF16_MM)
        ours = [
            line for name, line in cases.items() if name.startswith("fastq") and name != QUANTIZED
        ]
        best = min(ours, key=lambda line: line["p50_us"])
        rows.append(
            {
                "M × N × K": " × ".join(str(size) for size in shape),
                "fastq µs": microseconds(best),
                "TOP/s": f"{best['rate']:,.1f}" if best["rate"] >= 10 else f"{best['rate']:.2f}",
                "packed µs": microseconds(packed),
                "`qlinear` µs": microseconds(qlinear),
                "`_int_mm` µs": microseconds(int_mm),
                "bf16 `mm` µs": microseconds(bf16),
                "packed × `qlinear`": speedup(packed, qlinear),
                "× `_int_mm`": speedup(best, int_mm),
                "× bf16": speedup(best, bf16),
            }
        )
    head = [name for name in rows[0] if any(row[name] for row in rows)]
    return table(head, [[row[name] for name in head] for row in rows])


def reference_table(lines: list[Line]) -> list[str]:
    """Ours on every shape: microseconds and, in brackets, how far ahead of the best reference."""
    cells = {}
    for line in lines:
        shape = line["shape"]
        cell = f"{microseconds(line)} ({line['ratios']['reference']:.2f})"
        cells[shape["M"], (shape["N"], shape["K"])] = cell
    weights = sorted({weight for _, weight in cells}, key=lambda nk: (nk[0] * nk[1], nk[0]))
    head = ["M \\ N × K", *(f"{n} × {k}" for n, k in weights)]
    rows = [
        [str(m), *(cells.get((m, weight), "") for weight in weights)]
        for m in sorted({m for m, _ in cells})
    ]
    return table(head, rows)


def gemm_tables(lines: list[Line]) -> list[str]:
    """One table of all, or the larger run's: ours beside the reference tiles, its summary, and the
    shapes that bars are set on beside torch."""
    ours = [line for line in lines if line["implementation"] == "fastq"]
    compared = [line for line in ours if "reference" in line.get("ratios", {})]
    if not compared:
        return gemm_table(lines)
    bars = [line["shape"] for line in ours if line["tag"] == "bar"]
    text = gemm_table([line for line in lines if line["shape"] in bars])
    text += ["`int8_gemm`, µs (and × the best of CUTLASS's tiles in `bench/reference`):", ""]
    text += reference_table(compared)
    figures = int8_gemm_summary.figures(lines)
    rows = [[figure.name, figure.text, figure.where] for figure in figures]
    return text + table(["`int8_gemm` as a whole", "", "where"], rows)


def quantize_rows(lines: list[Line]) -> list[list[str]]:
    rows = []
    for op in QUANTIZE_OPS:
        for shape, cases in by_shape([line for line in lines if line["op"] == op]).items():
            ours, theirs = cases["fastq"], cases["torch"]
            rows.append(
                [
                    f"`{op}` {' × '.join(str(size) for size in shape)}",
                    microseconds(ours),
                    f"{ours['rate']:,.0f}",
                    microseconds(theirs),
                    f"{theirs['p50_us'] / ours['p50_us']:.2f}",
                ]
            )
    return rows


def attention_table(lines: list[Line]) -> list[str]:
    """Ours on every shape: the rate and, in brackets, how far ahead of torch's fastest backend."""
    ours = [line for line in lines if line["implementation"] == "fastq"]
    unit, scale = ("TFLOP/s", 1e-3) if max(line["rate"] for line in ours) > 1e4 else ("GFLOP/s", 1)
    cells: dict[str, dict[int, str]] = {}
    for line in ours:
        shape = line["shape"]
        heads = f"{shape['heads']}"
        if shape["heads_k"] != shape["heads"]:
            heads += f" ({shape['heads_k']} of keys)"
        mask = "causal" if shape["causal"] else "full"
        row = f"{line['dtype']}, {heads} × {shape['head_dim']}, {mask}"
        cell = f"{line['rate'] * scale:,.0f} ({line['ratio']:.2f})"
        cells.setdefault(row, {})[shape["seqlen"]] = cell
    seqlens = sorted({seqlen for row in cells.values() for seqlen in row})
    batches = {line["shape"]["batch"] for line in ours}
    totals = {line["shape"]["batch"] * line["shape"]["seqlen"] for line in ours}
    batch = "batch 1" if batches == {1} else f"batch × seqlen = {', '.join(map(str, totals))}"
    head = ["heads × head_dim \\ seqlen", *(str(seqlen) for seqlen in seqlens)]
    rows = [[name, *(row.get(seqlen, "") for seqlen in seqlens)] for name, row in cells.items()]
    text = f"`flash_attention`, {batch}: {unit} (and × the fastest backend of torch's SDPA)"
    return [text, "", *table(head, rows)]


def decode_tables(lines: list[Line]) -> list[str]:
    """Ours with a 16-bit and with an int8 cache: microseconds, the share of the copy's bandwidth,
    how far ahead of torch's fastest backend; and of int8 how far ahead of 16 bits."""
    copies = {}
    for line in lines:
        if line["implementation"] == COPY:
            copies[line["dtype"], str(line["shape"])] = line["rate"]
    rows = {}
    for line in lines:
        if not line["implementation"].startswith("fastq"):
            continue
        shape = line["shape"]
        heads = f"{shape['heads']} ({shape['heads_k']} of keys) × {shape['head_dim']}"
        key = (line["dtype"], shape["batch"], shape["seqlen"], heads)
        share = line["rate"] / copies[line["dtype"], str(shape)]
        cells = [microseconds(line), f"{line['rate']:,.0f}"]
        if line["implementation"] == INT8:
            cells += [f"{line['ratios']['fastq']:.2f}"]
        else:
            cells += [f"{share:.2f}", f"{line['ratio']:.2f}"]
        rows.setdefault(key, []).extend(cells)
    head = ["dtype", "batch × tokens", "heads × head_dim"]
    head += ["µs", "GB/s", "× copy", "× SDPA", "int8 µs", "int8 GB/s", "× 16 bits"]
    texts = [
        [dtype, f"{batch} × {seqlen}", heads, *cells]
        for (dtype, batch, seqlen, heads), cells in rows.items()
    ]
    text = "`flash_decode`, one new token; beside a copy's bandwidth and torch's fastest backend:"
    return [text, "", *table(head, texts)]


def append_table(lines: list[Line]) -> list[str]:
    """Microseconds of ours, into a 16- or 32-bit and an int8 cache, and of eager torch."""
    cells: dict[tuple, dict[str, Line]] = {}
    for line in lines:
        shape = line["shape"]
        heads = f"{shape['heads']} ({shape['heads_k']} of keys) × {shape['head_dim']}"
        key = (line["dtype"], f"{shape['batch']} × {shape['seqlen']}", heads)
        cells.setdefault(key, {})[line["implementation"]] = line
    head = ["dtype", "batch × tokens", "heads × head_dim", "µs", "GB/s", "int8 µs", "torch µs"]
    rows = [
        [
            *key,
            microseconds(cases["fastq"]),
            f"{cases['fastq']['rate']:,.0f}",
            microseconds(cases[INT8]),
            microseconds(cases["torch"]),
            f"{cases['fastq']['ratio']:.2f}",
        ]
        for key, cases in cells.items()
    ]
    return ["`kv_append`, with rotation of q and k:", "", *table([*head, "× torch"], rows)]


def llm_int8_tables(lines: list[Line]) -> list[str]:
    """Of both sets of shapes: ours, its peers in the same kind of timing, and how far ahead."""
    text = []
    names = {OURS: "µs", KEPT: "kept µs", SPLIT: "W8A8 µs", FLOAT: "16-bit µs"}
    for tag in dict.fromkeys(line["tag"] for line in lines):
        rows = []
        for (m, n, k), cases in by_shape([x for x in lines if x["tag"] == tag]).items():
            ours, theirs = cases[OURS], cases.get(f"{BITSANDBYTES}[eager]")
            rows.append(
                {
                    "M × N × K": f"{m} × {n} × {k}",
                    **{head: microseconds(cases.get(name)) for name, head in names.items()},
                    "× W8A8": speedup(ours, cases.get(SPLIT)),
                    "× 16-bit": speedup(ours, cases.get(FLOAT)),
                    "eager µs": microseconds(cases.get(f"{OURS}[eager]")),
                    "bitsandbytes µs": microseconds(theirs),
                    "eager × bitsandbytes": speedup(cases.get(f"{OURS}[eager]"), theirs),
                }
            )
        head = [name for name in rows[0] if any(row[name] for row in rows)]
        text += [f"`llm_int8_matmul`, 0.1 % of the columns outliers ({tag}):", ""]
        text += table(head, [[row[name] for name in head] for row in rows])
    return text


def backward_table(lines: list[Line]) -> list[str]:
    """Microseconds, and the memory that a call holds beside its output."""
    rows = []
    for shape, cases in by_shape(lines).items():
        ours, whole, plain = (cases[name] for name in (BACKWARD, DEQUANTISED, MM))
        memory = [
            "" if line["temporary_bytes"] is None else f"{line['temporary_bytes'] / 2**20:,.1f}"
            for line in (ours, whole)
        ]
        rows.append(
            [
                " × ".join(str(size) for size in shape),
                *(microseconds(line) for line in (ours, whole, plain)),
                speedup(ours, whole),
                *memory,
            ]
        )
    head = ["M × N × K", "µs", "dequantised first µs", "16-bit `mm` µs", "× dequantised first"]
    head += ["MiB held", "dequantised first"]
    return ["The input's gradient through a frozen INT8 weight:", "", *table(head, rows)]


def read(folder: Path, op: str) -> list[Line]:
    path = folder / f"{op}.jsonl"
    return list(newest(path).values()) if path.exists() else []


def section(folder: Path) -> list[str]:
    """The tables of one device."""
    ops = ("int8_gemm", "flash_attention", "flash_decode", "kv_append", "quantize", "call_overhead")
    gemm, attention, decode, append, quantize, overhead = (read(folder, op) for op in ops)
    llm_int8, backward = (read(folder, op) for op in ("llm_int8", "int8_linear_backward"))
    steps, prompts = (read(folder, op) for op in ("decode", "prefill"))
    lines = gemm + llm_int8 + backward + attention + decode + append + quantize + overhead
    lines += steps + prompts
    if not lines:
        return []
    last = max(lines, key=lambda line: line["time"])
    threads = f", {last['threads']} threads" if "threads" in last else ""
    text = [f"**{last['device']}**{threads}, torch {last['torch']}, {last['time'][:10]}", ""]
    text += models_summary.decode_table(steps)
    text += models_summary.ops_table(models_summary.read_ops(folder))
    text += models_summary.prefill_table(prompts)
    if gemm:
        text += gemm_tables(gemm)
    if llm_int8:
        text += llm_int8_tables(llm_int8)
    if backward:
        text += backward_table(backward)
    if attention:
        text += attention_table(attention)
    if decode:
        text += decode_tables(decode)
    if append:
        text += append_table(append)
    if quantize:
        head = ["bfloat16 rows × columns", "fastq µs", "GB/s", "eager torch µs", "× torch"]
        text += table(head, quantize_rows(quantize))
    if overhead:
        head = ["host time of a call", "µs"]
        rows = [[f"`{line['implementation']}`", f"{line['p50_us']:.1f}"] for line in overhead]
        text += table(head, rows)
    return text


def replace(readme: str, mark: str, text: list[str]) -> str:
    """The README with these lines between the two comments of a mark."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return "\n".join([before + begin, *text, end + after])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.readme_table")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when outdated")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "README.md")
    options = parser.parse_args()
    readme = options.readme.read_text(encoding="utf-8")
    folders = sorted(path for path in options.results.iterdir() if path.is_dir())
    updated = readme
    for mark, tables in (("quality", quality_section), ("bench", section)):
        updated = replace(updated, mark, [line for folder in folders for line in tables(folder)])
    if updated == readme:
        print("the README is up to date")
    elif options.check:
        sys.exit("the README's tables are older than the results: python -m bench.readme_table")
    else:
        options.readme.write_text(updated, encoding="utf-8")
        print(f"wrote {options.readme}")


if __name__ == "__main__":
    main()
