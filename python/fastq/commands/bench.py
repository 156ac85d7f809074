"""`fastq bench`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from .arguments import add_device, add_json, add_kv_cache, add_model, positive

_SCHEMES = ("w8a8", "w8a8_tensor", "llm_int8")


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="time reading and generating, and tell the memory",
        description="Times prefill (reading a prompt, to the first new token) and decoding (the "
        "tokens after it) on random prompts, greedy; medians of several runs after one that does "
        "not count.",
    )
    add_model(parser, is_optional=True)
    parser.add_argument("--batch", type=positive, default=1, help="sequences at once (default: 1)")
    parser.add_argument(
        "--prompt-tokens", type=positive, default=128, help="of each prompt (default: 128)"
    )
    parser.add_argument(
        "--new-tokens", type=positive, default=64, help="after each prompt (default: 64)"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="timed runs (default: 3)")
    parser.add_argument(
        "--scheme", choices=_SCHEMES, help="quantise the model first (default: as it is)"
    )
    parser.add_argument(
        "--modules",
        action="store_true",
        help="run a quantised model's layers module by module, not by the fused ops, to compare",
    )
    add_kv_cache(parser)
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from ..evaluation.speed import measure_speed
    from ..progress import counter, progress_bar
    from .models import load

    with progress_bar() as report:
        model = load(args, scheme=args.scheme)
        model.use_fused = not args.modules
        speed = measure_speed(
            model,
            batch_size=args.batch,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            kv_cache=args.kv_cache,
            repeats=args.repeats,
            on_progress=counter(report, "timing", args.repeats + 1),
        )
        with torch.no_grad():
            is_fused = model.fused_decoder() is not None
    result = {
        "model": args.model,
        "scheme": args.scheme,
        "kv_cache": args.kv_cache,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "fused": is_fused,
        **asdict(speed),
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    return 0


def _print(result: dict[str, Any]) -> None:
    kinds = [result["dtype"], result["scheme"], result["kv_cache"] and "INT8 cache"]
    kinds.append("fused" if result["fused"] else None)
    print(f"{result['model']} on {result['device']}, {', '.join(filter(None, kinds))}")
    print(
        f"{result['batch_size']} x {result['prompt_tokens']} tokens of prompt, "
        f"{result['new_tokens']} new ones"
    )
    for label, key, scale, unit in (
        ("prefill", "prefill_tokens_per_second", 1, "tokens/s"),
        ("decoding", "decode_tokens_per_second", 1, "tokens/s"),
        ("time to first token", "prefill_seconds", 1e-3, "ms"),
        ("weights", "weight_bytes", 1e6, "MB"),
        ("keys and values", "cache_bytes", 1e6, "MB"),
        ("peak memory", "peak_bytes", 1e6, "MB"),
    ):
        print(f"  {label:<22}{result[key] / scale:>12,.1f} {unit}")
