"""The README's tables of quality, from what `fastq eval --table` stored.

In bench/results/<device>/: `quality.json` (the demo's model), `quality_planted_outliers.json` (the
same with --plant-outliers) and `quality_minilm.json` (MiniLM's encoder).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .markdown import table

Result = dict[str, Any]
PLAIN, PLANTED, MINILM = "quality", "quality_planted_outliers", "quality_minilm"


def read(folder: Path, name: str) -> Result | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def change(row: dict[str, Any]) -> str:
    if row["scheme"] is None and row["kv_cache"] is None:
        return ""
    return f"{100 * row['change']:+.2f} %"


def perplexity_rows(plain: Result, planted: Result) -> list[list[str]]:
    outliers = {row["name"]: row for row in planted["rows"]}
    return [
        [
            row["name"],
            f"{row['perplexity']:.3f}",
            change(row),
            f"{outliers[row['name']]['perplexity']:.3f}",
            change(outliers[row["name"]]),
            f"{row['weight_bytes'] / 1e6:.1f}",
        ]
        for row in plain["rows"]
    ]


def embedding_rows(result: Result) -> list[list[str]]:
    return [
        [
            row["name"],
            f"{row['cosine']:.4f}",
            f"{row['min_cosine']:.4f}",
            f"{100 * row['same_neighbour']:.1f} %",
            f"{row['weight_bytes'] / 1e6:.1f}",
        ]
        for row in result["rows"]
    ]


def where(result: Result) -> str:
    dirty = ", changed" if result["dirty"] else ""
    return (
        f"{result['dtype']} on {result['device']}, torch {result['torch']}, {result['time'][:10]}, "
        f"commit {result['commit'][:7]}{dirty}"
    )


def section(folder: Path) -> list[str]:
    """The tables of one device."""
    plain, planted, minilm = (read(folder, name) for name in (PLAIN, PLANTED, MINILM))
    text = []
    if plain and planted:
        text += [f"The demo's model, perplexity on {plain['tokens']:,} tokens ({where(plain)}):"]
        head = ["scheme", "perplexity", "change", "with outliers", "change", "weights (MB)"]
        text += ["", *table(head, perplexity_rows(plain, planted))]
    if minilm:
        text += [
            f"MiniLM's encoder, embeddings of {minilm['sentences']} sentences ({where(minilm)}):"
        ]
        head = ["scheme", "mean cosine", "least", "same nearest", "weights (MB)"]
        text += ["", *table(head, embedding_rows(minilm))]
    return text
