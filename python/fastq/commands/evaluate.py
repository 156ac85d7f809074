"""`fastq eval`."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .arguments import add_command, add_device, add_json, add_kv_cache, add_model, positive

_LOGITS = 1 << 26  # of a batch of windows; 256 MiB in float32
_TABLE_FILE = "fastq_eval.json"
_EXAMPLES = """\
examples:
  fastq eval Llama-3.2-1B-w8a8 --text wiki.test.txt
  fastq eval demo --kv-cache int8
  fastq eval --table --plant-outliers
"""


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "eval",
        help="measure perplexity on a text, of one model or of every scheme",
        description="Perplexity by a sliding window: each token is scored once, with at least "
        "context - stride tokens before it. With --table, of a float model and of copies of it, "
        "quantised by every scheme.",
        epilog=_EXAMPLES,
    )
    add_model(parser, is_optional=True)
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="a text file, or - for standard input (default: the modules of Python's standard "
        "library that the demo's model has not seen)",
    )
    parser.add_argument(
        "--context",
        type=positive,
        help="tokens of a window (default: the model's positions, at most 2048)",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        help="tokens from one window to the next (default: half the context; with --table the "
        "whole of it)",
    )
    parser.add_argument("--batch", type=positive, help="windows at once (default: what fits)")
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="read the first N tokens of the text"
    )
    add_kv_cache(parser)
    table = parser.add_argument_group("the table of schemes")
    table.add_argument("--table", action="store_true", help="measure every scheme")
    table.add_argument(
        "--plant-outliers",
        action="store_true",
        help="with --table: on the same model with 6 channels of every norm 64 times as large, and "
        "the weights that read them divided, which leaves its function as it is",
    )
    table.add_argument(
        "--calibration",
        metavar="FILE",
        help="with --table: a text file, or stdlib (default: stdlib)",
    )
    table.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"with --table: where it is stored as JSON (default: {_TABLE_FILE})",
    )
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run, check=check)


def check(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments together."""
    if args.table and args.kv_cache is not None:
        return "argument --kv-cache: not allowed with --table, which has a line for it"
    for name in ("plant_outliers", "calibration", "output"):
        if getattr(args, name) and not args.table:
            return f"argument --{name.replace('_', '-')}: expected --table too"
    if args.context is not None and args.stride is not None and args.stride > args.context:
        return f"argument --stride: expected at most the context, {args.context}"
    return None


def run(args: argparse.Namespace) -> int:
    from ..provenance import provenance
    from ..quantization import progress_bar
    from .models import load, load_tokenizer

    begin = time.perf_counter()
    with progress_bar() as report:
        tokenizer = load_tokenizer(args)
        model = load(args)
        tokens = _tokens(args, model, tokenizer)
        sizes = _sizes(args, model, len(tokens))
        if args.table:
            figures = _measure_table(args, model, tokenizer, tokens, sizes, report)
        else:
            figures = _measure_one(args, model, tokens, sizes, report)
    # A table is kept, and then "device" is the device's name, as in the lines of bench/results.
    where = provenance(model.device) if args.table else {"device": str(model.device)}
    result = {
        **where,
        "model": args.model,
        "text": args.text or "held-out modules of the standard library",
        "tokens": len(tokens) - 1,
        **sizes,
        "dtype": str(model.dtype).removeprefix("torch."),
        **figures,
        "seconds": time.perf_counter() - begin,
    }
    if args.table:
        _store(result, args.output or Path(_TABLE_FILE))
    if args.json:
        print(json.dumps(result, indent=2))
    elif args.table:
        _print_table(result, args.output or Path(_TABLE_FILE))
    else:
        print(
            f"perplexity {result['perplexity']:.4f} on {result['tokens']} tokens (context "
            f"{sizes['context']}, stride {sizes['stride']}), {result['seconds']:.0f} s"
        )
    return 0


def _tokens(args: argparse.Namespace, model: Any, tokenizer: Any):
    import torch

    from ..demo.run import held_out_tokens
    from .models import read_text

    if args.text is None:
        tokens = held_out_tokens(tokenizer, model)
    else:
        ids = tokenizer.encode(read_text(args.text))
        tokens = torch.tensor(ids, dtype=torch.int64, device=model.device)
    if len(tokens) < 2:
        raise ValueError(f"{args.text} holds {len(tokens)} tokens, expected at least 2")
    return tokens if args.max_tokens is None else tokens[: args.max_tokens + 1]


def _sizes(args: argparse.Namespace, model: Any, count: int) -> dict[str, int]:
    limit = model.config.max_position_embeddings
    context = min(2048, limit) if args.context is None else args.context
    if context > limit:
        raise ValueError(f"the context is {context}, expected at most the model's {limit}")
    context = min(context, count - 1)
    stride = args.stride or (context if args.table else max(1, context // 2))
    most = max(1, min(16, _LOGITS // (context * model.config.vocab_size)))
    return {"context": context, "stride": min(stride, context), "batch": args.batch or most}


def _measure_one(args, model, tokens, sizes, report) -> dict[str, Any]:
    from ..evaluation import perplexity
    from ..evaluation.speed import weight_bytes

    done = 0

    def count(scored: int) -> None:
        nonlocal done
        done += scored
        report("perplexity", done, len(tokens) - 1)

    value = perplexity(model, tokens, kv_cache=args.kv_cache, on_progress=count, **sizes)
    return {
        "kv_cache": args.kv_cache,
        "perplexity": value,
        "weight_bytes": weight_bytes(model),
    }


def _measure_table(args, model, tokenizer, tokens, sizes, report) -> dict[str, Any]:
    from ..evaluation.table import measure_table
    from ..quantization import calibration_batches

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


def _store(result: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _print_table(result: dict[str, Any], path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    planted = ", outliers planted" if result["planted_outliers"] else ""
    table = Table(title=f"{result['model']}{planted}: {result['tokens']} tokens", title_style="")
    for column in ("scheme", "perplexity", "change", "weights (MB)"):
        table.add_column(column, justify="left" if column == "scheme" else "right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['perplexity']:.3f}",
            f"{100 * row['change']:+.2f} %" if row["scheme"] or row["kv_cache"] else "",
            f"{row['weight_bytes'] / 1e6:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(f"Stored in {path}; {result['seconds']:.0f} s in all.", highlight=False)
