"""`fastq eval`."""

from __future__ import annotations

import argparse
import json
import time
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
  fastq eval all-MiniLM-L6-v2 --table --text sentences.txt
"""


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "eval",
        help="measure perplexity on a text, of one model or of every scheme",
        description="Perplexity by a sliding window: each token is scored once, with at least "
        "context - stride tokens before it. With --table, of a float model and of copies of it, "
        "quantised by every scheme; of an encoder (BERT), how far each scheme turns the embeddings "
        "of sentences, as the cosine to those in float.",
        epilog=_EXAMPLES,
    )
    add_model(parser, is_optional=True)
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="a text file, or - for standard input (default: the modules of Python's standard "
        "library that the demo's model has not seen); for an encoder one sentence a line",
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
    from ..progress import progress_bar
    from ..provenance import provenance
    from ..runtime import load_encoder
    from .evaluate_table import measure_embeddings, print_table, store
    from .models import is_encoder, load, load_tokenizer

    begin = time.perf_counter()
    of_encoder = is_encoder(args)
    if of_encoder:
        _check_encoder(args)
    with progress_bar() as report:
        tokenizer = load_tokenizer(args)
        model = load(args, loader=load_encoder) if of_encoder else load(args)
        if of_encoder:
            figures = measure_embeddings(args, model, tokenizer, report)
        else:
            figures = _measure_perplexity(args, model, tokenizer, report)
    # A table is kept, and then "device" is the device's name, as in the lines of bench/results.
    where = provenance(model.device) if args.table else {"device": str(model.device)}
    result = {
        **where,
        "model": args.model,
        "text": args.text or "held-out modules of the standard library",
        "dtype": str(model.dtype).removeprefix("torch."),
        **figures,
        "seconds": time.perf_counter() - begin,
    }
    if args.table:
        store(result, args.output or Path(_TABLE_FILE))
    if args.json:
        print(json.dumps(result, indent=2))
    elif args.table:
        print_table(result, args.output or Path(_TABLE_FILE))
    else:
        print(
            f"perplexity {result['perplexity']:.4f} on {result['tokens']} tokens (context "
            f"{result['context']}, stride {result['stride']}), {result['seconds']:.0f} s"
        )
    return 0


def _check_encoder(args: argparse.Namespace) -> None:
    wrong = "--table" if not args.table else "--text" if args.text is None else None
    if wrong is not None:
        raise ValueError(f"{args.model} is an encoder: expected {wrong}, too")
    for name in ("plant_outliers", "context", "stride", "batch", "max_tokens"):
        if getattr(args, name):
            raise ValueError(f"{args.model} is an encoder: --{name.replace('_', '-')} has no use")


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


def _measure_perplexity(args, model, tokenizer, report) -> dict[str, Any]:
    from ..evaluation import perplexity
    from ..evaluation.speed import weight_bytes
    from ..progress import counter
    from .evaluate_table import measure_schemes

    tokens = _tokens(args, model, tokenizer)
    sizes = _sizes(args, model, len(tokens))
    figures = {"tokens": len(tokens) - 1, **sizes}
    if args.table:
        return figures | measure_schemes(args, model, tokenizer, tokens, sizes, report)
    count = counter(report, "perplexity", len(tokens) - 1)
    value = perplexity(model, tokens, kv_cache=args.kv_cache, on_progress=count, **sizes)
    return figures | {
        "kv_cache": args.kv_cache,
        "perplexity": value,
        "weight_bytes": weight_bytes(model),
    }
