"""`fastq demo`."""

from __future__ import annotations

import argparse

from .arguments import add_json, positive


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="run the shipped language model in its own precision and in INT8",
        description="Loads a small language model that fastq ships, quantises it to W8A8 and shows "
        "perplexity on held-out text, memory, speed and a sample of both. Needs no network and "
        "less than a minute on two CPU cores.",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument(
        "--max-tokens", type=positive, default=64, help="tokens to generate (default: 64)"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..demo.report import main

    return main(device=args.device, max_tokens=args.max_tokens, as_json=args.json)
