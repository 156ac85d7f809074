"""The tables of `fastq eval --table`: measured, stored and printed."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..evaluation import embeddings
from ..evaluation.table import measure_table
from ..progress import OnProgress
from ..quantization import calibration_batches
from ..runtime import CausalLM, Encoder, Tokenizer
from .models import read_text


def measure_schemes(
    args: argparse.Namespace,
    model: CausalLM,
    tokenizer: Tokenizer,
    tokens: Tensor,
    sizes: dict[str, int],
    report: OnProgress,
) -> dict[str, Any]:
    """Perplexity by every scheme."""
    length = min(512, model.config.max_position_embeddings)
    calibration = calibration_batches(args.calibration or "stdlib", tokenizer, length=length)
    lines = measure_table(
        model,
        tokens,
        calibration=calibration,
        plant=args.plant_outliers,
        on_progress=report,
        **sizes,
    )
    return {
        "calibration": args.calibration or "stdlib",
        "planted_outliers": args.plant_outliers,
        "rows": [asdict(line) for line in lines],
    }


def measure_embeddings(
    args: argparse.Namespace, encoder: Encoder, tokenizer: Tokenizer, report: OnProgress
) -> dict[str, Any]:
    """The cosine of an encoder's embeddings to those in float, by every scheme."""
    sentences = [line for line in read_text(args.text).splitlines() if line.strip()]
    length = min(128, encoder.config.max_position_embeddings)
    special = tokenizer.encode("")  # [CLS] and [SEP], which every sentence stands between
    pieces = calibration_batches(
        args.calibration or "stdlib", tokenizer, length=length - len(special)
    )
    calibration = [
        torch.tensor([special[:1] + ids + special[1:] for ids in batch.tolist()])
        for batch in pieces
    ]
    lines = embeddings.measure_embeddings(
        encoder, tokenizer, sentences, calibration=calibration, on_progress=report
    )
    return {
        "sentences": len(sentences),
        "calibration": args.calibration or "stdlib",
        "rows": [asdict(line) for line in lines],
    }


def store(result: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def print_table(result: dict[str, Any], path: Path) -> None:
    if "sentences" in result:
        table = _embedding_table(result)
    else:
        table = _perplexity_table(result)
    console = Console()
    console.print(table)
    console.print(f"Stored in {path}; {result['seconds']:.0f} s in all.", highlight=False)


def _perplexity_table(result: dict[str, Any]) -> Table:
    planted = ", outliers planted" if result["planted_outliers"] else ""
    title = f"{result['model']}{planted}: {result['tokens']} tokens"
    table = _table(title, "perplexity", "change", "weights (MB)")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['perplexity']:.3f}",
            f"{100 * row['change']:+.2f} %" if row["scheme"] or row["kv_cache"] else "",
            f"{row['weight_bytes'] / 1e6:.2f}",
        )
    return table


def _embedding_table(result: dict[str, Any]) -> Table:
    title = f"{result['model']}: {result['sentences']} embeddings, beside those in float"
    table = _table(title, "cosine", "least", "neighbours", "MB")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['cosine']:.5f}",
            f"{row['min_cosine']:.5f}",
            f"{100 * row['same_neighbour']:.1f} %",
            f"{row['weight_bytes'] / 1e6:.2f}",
        )
    return table


def _table(title: str, *figures: str) -> Table:
    table = Table(title=title, title_style="")
    table.add_column("scheme", no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table
