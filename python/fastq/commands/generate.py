"""`fastq generate`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import chain

from .arguments import (
    add_command,
    add_device,
    add_json,
    add_kv_cache,
    add_model,
    not_negative,
    positive,
)

_EXAMPLES = """\
examples:
  fastq generate demo --prompt 'def main('
  fastq generate Llama-3.2-1B-w8a8 --prompt-file question.txt --temperature 0.7 --top-p 0.9
  fastq generate demo --prompt 'class A' --prompt 'import ' --json
"""


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "generate",
        help="continue a text",
        description="Prints the text that a model puts after a prompt, as it comes. Greedy unless "
        "a temperature is given.",
        epilog=_EXAMPLES,
    )
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given more than once: the prompts then run as one batch, and their texts are "
        "printed when all are done",
    )
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file, or - for standard input")
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=128,
        help="new tokens at most, less where the model has no more positions (default: 128)",
    )
    parser.add_argument(
        "--min-tokens", type=not_negative, default=0, help="new tokens at least (default: 0)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)"
    )
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="then from the fewest that reach p together")
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="divides what speaks for a token that was there already (default: 1)",
    )
    parser.add_argument(
        "--seed", type=int, help="the same seed, the same text (default: another each time)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text"
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on where the model ends the text"
    )
    add_kv_cache(parser)
    add_device(parser)
    parser.add_argument(
        "--logprobs", action="store_true", help="with --json: the tokens' log-probabilities"
    )
    add_json(parser, "texts, token ids and why each ended")
    parser.set_defaults(run=run, check=check)


def check(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments together."""
    if args.logprobs and not args.json:
        return "argument --logprobs: expected --json too"
    return None


def run(args: argparse.Namespace) -> int:
    from ..runtime import stream_text
    from .models import load, load_tokenizer, read_text

    prompts = args.prompt if args.prompt is not None else [read_text(args.prompt_file)]
    tokenizer = load_tokenizer(args)
    model = load(args)
    # As the tokenizer has it, but that an empty text begins as the model's texts do.
    begin = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    ids = [tokenizer.encode(text) or begin for text in prompts]
    options = _options(args, model, max(map(len, ids)))
    if args.json or len(ids) > 1:
        return _print_all(args, model, tokenizer, prompts, ids, options)
    pieces = stream_text(model, tokenizer, ids[0], **options)
    first = next(pieces, "")  # raises before anything is written
    for piece in chain((prompts[0] + first,), pieces):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _options(args: argparse.Namespace, model, longest: int) -> dict:
    """The keyword arguments of `fastq.runtime.generate`."""
    room = model.config.max_position_embeddings - longest
    return {
        # A prompt that leaves no room is refused by `generate`, which says so.
        "max_new_tokens": max(1, min(args.max_tokens, room)),
        "min_new_tokens": min(args.min_tokens, max(1, room)),
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "stop": args.stop,
        "stop_token_ids": () if args.ignore_eos else None,
        "kv_cache": args.kv_cache,
    }


def _print_all(args: argparse.Namespace, model, tokenizer, prompts, ids, options) -> int:
    from ..runtime import generate

    begin = time.perf_counter()
    results = generate(model, ids, tokenizer=tokenizer, logprobs=args.logprobs, **options)
    seconds = time.perf_counter() - begin
    if not args.json:
        for prompt, result in zip(prompts, results, strict=True):
            print(f"{prompt}{result.text}\n")
        return 0
    found = [
        {
            "prompt": prompt,
            "prompt_tokens": len(row),
            "text": result.text,
            "ids": result.ids,
            "finish_reason": result.finish_reason,
            **({"logprobs": result.logprobs} if args.logprobs else {}),
        }
        for prompt, row, result in zip(prompts, ids, results, strict=True)
    ]
    print(json.dumps({"model": args.model, "seconds": seconds, "results": found}, indent=2))
    return 0
