"""Shows the demo's figures, with a progress bar while they come."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..progress import progress_bar
from .run import run_demo


def main(*, device: str | None, max_tokens: int, as_json: bool) -> int:
    """Runs the demo and prints its figures; the progress bar goes to stderr."""
    with progress_bar() as report:
        result = run_demo(device=device, max_tokens=max_tokens, on_progress=report)
    if as_json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        Console().print(render(result))
    return 0


def render(result: dict[str, Any]) -> Group:
    """The figures as a heading, a table and two samples."""
    card = result["card"]
    modules = ", ".join(card["held_out"])
    heading = Text.assemble(
        (f"fastq {result['fastq']}", "bold"),
        f" on {result['device']} ({result['device_name']}), torch {result['torch']}"
        f"{_threads(result)}\n",
        f"Model: {card['parameters'] / 1e6:.2f} M parameters, trained on the standard library of "
        f"Python {card['python_version']}\n",
        f"Held-out text: {result['held_out_tokens']} tokens of Python {result['python']}: "
        f"{modules}",
    )
    parts: list[Any] = [heading, _table(result), _conclusion(result)]
    for figures in result["results"]:
        sample = Text.assemble((result["prompt"], "dim"), figures["sample"])
        title = f"A sample in {figures['precision']}"
        parts.append(Panel(sample, title=title, title_align="left"))
    if result["note"]:
        parts.append(Text(result["note"], "yellow"))
    return Group(*parts)


def _threads(result: dict[str, Any]) -> str:
    if result["device"] != "cpu":
        return ""
    return f"; threads: {result['threads']}, torch's own {result['torch_threads']}"


def _table(result: dict[str, Any]) -> Table:
    own, int8 = result["results"]
    table = Table()
    table.add_column("")
    table.add_column(own["precision"], justify="right")
    table.add_column("int8 (W8A8)", justify="right")
    table.add_column("int8 / " + own["precision"], justify="right")
    for label, key, scale, style in (
        ("perplexity, held-out text", "perplexity", 1, ".3f"),
        ("weights, whole model (MB)", "weight_bytes", 1e6, ".2f"),
        ("weights, linear layers (MB)", "linear_weight_bytes", 1e6, ".2f"),
        ("tokens/s, reading", "scored_tokens_per_second", 1, ",.0f"),
        ("tokens/s, generating one by one", "generated_tokens_per_second", 1, ",.0f"),
    ):
        ratio = int8[key] / own[key]
        table.add_row(
            label, f"{own[key] / scale:{style}}", f"{int8[key] / scale:{style}}", f"{ratio:.3f}"
        )
    return table


def _conclusion(result: dict[str, Any]) -> Text:
    card = result["card"]
    return Text(
        f"INT8 changes the perplexity by {100 * result['int8_perplexity_change']:+.2f} %. "
        f"A unigram model gets {card['unigram_perplexity']:.0f} "
        f"(measured on Python {card['python_version']}). {result['seconds']:.0f} s in all."
    )
