"""`fastq tune`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_json, positive

_TUNED_BATCHES = "1,8,16,32,64,96,128,192,256,384,512,1024,2048,4096"


def _sizes(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _weights(text: str) -> list[tuple[int, int]]:
    weights = []
    for part in text.split(","):
        N, separator, K = part.partition("x")
        if not separator:
            raise argparse.ArgumentTypeError(f"expected N x K as 4096x4096, got {part}")
        weights.append((positive(N), positive(K)))
    return weights


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tune",
        help="time the CUDA configurations of int8_gemm on this GPU and keep the fastest",
        description="Times the configurations of the CUDA int8_gemm on a list of shapes, a "
        "second or two each, and writes a table of those that beat fastq's own choice. A program "
        "follows the table where FASTQ_TUNING_TABLE names it; results keep their bits. A table "
        "that is there already is added to.",
    )
    shapes = parser.add_mutually_exclusive_group(required=True)
    shapes.add_argument(
        "--nk",
        type=_weights,
        metavar="NxK,...",
        help="weights (out_features x in_features), such as 4096x4096,11008x4096",
    )
    shapes.add_argument(
        "--shapes",
        type=Path,
        metavar="FILE.json",
        help='a list of {"M": [1, 16], "N": 4096, "K": 4096}',
    )
    parser.add_argument(
        "--m",
        type=_sizes,
        metavar="M,...",
        default=_sizes(_TUNED_BATCHES),
        help=f"numbers of tokens for each of --nk (default: {_TUNED_BATCHES})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fastq_tuning.txt"),
        help="the table (default: fastq_tuning.txt)",
    )
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default: cuda)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .. import tuning

    if args.shapes is not None:
        shapes = tuning.read_shapes(args.shapes)
    else:
        shapes = [tuning.Shape(M, N, K) for N, K in args.nk for M in args.m]
    return tuning.main(shapes=shapes, output=args.output, device=args.device, as_json=args.json)
