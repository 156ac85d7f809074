"""The command `fastq`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import __version__

_TUNED_BATCHES = "1,8,16,32,64,96,128,192,256,384,512,1024,2048,4096"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _sizes(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _weights(text: str) -> list[tuple[int, int]]:
    weights = []
    for part in text.split(","):
        N, separator, K = part.partition("x")
        if not separator:
            raise argparse.ArgumentTypeError(f"expected N x K as 4096x4096, got {part}")
        weights.append((_positive(N), _positive(K)))
    return weights


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastq",
        description="INT8 transformer kernels for CPUs and GPUs.",
        epilog="`fastq demo` is the place to start; `fastq doctor` says what this machine offers.",
    )
    parser.add_argument("--version", action="version", version=f"fastq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="run the shipped language model in its own precision and in INT8",
        description="Loads a small language model that fastq ships, quantises it to W8A8 and shows "
        "perplexity on held-out text, memory, speed and a sample of both. Needs no network and "
        "less than a minute on two CPU cores.",
    )
    demo.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    demo.add_argument(
        "--max-tokens", type=_positive, default=64, help="tokens to generate (default: 64)"
    )
    demo.add_argument("--json", action="store_true", help="print the figures as JSON")

    doctor = commands.add_parser(
        "doctor",
        help="check the installation: versions, devices, kernels, and what is missing",
        description="Prints versions, devices, instruction sets and the kernel that each op takes "
        "on each device, after running every op once. The exit code is 1 when something is "
        "missing or wrong; the command that mends it is printed.",
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")

    _add_tune(commands)
    return parser


def _add_tune(commands: argparse._SubParsersAction) -> None:
    tune = commands.add_parser(
        "tune",
        help="time the CUDA configurations of int8_gemm on this GPU and keep the fastest",
        description="Times the configurations of the CUDA int8_gemm on a list of shapes, a "
        "second or two each, and writes a table of those that beat fastq's own choice. A program "
        "follows the table where FASTQ_TUNING_TABLE names it; results keep their bits. A table "
        "that is there already is added to.",
    )
    shapes = tune.add_mutually_exclusive_group(required=True)
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
    tune.add_argument(
        "--m",
        type=_sizes,
        metavar="M,...",
        default=_sizes(_TUNED_BATCHES),
        help=f"numbers of tokens for each of --nk (default: {_TUNED_BATCHES})",
    )
    tune.add_argument(
        "--output",
        type=Path,
        default=Path("fastq_tuning.txt"),
        help="the table (default: fastq_tuning.txt)",
    )
    tune.add_argument("--device", default="cuda", help="cuda or cuda:N (default: cuda)")
    tune.add_argument("--json", action="store_true", help="print the figures as JSON")


def _tune(args: argparse.Namespace) -> int:
    from . import tuning

    if args.shapes is not None:
        shapes = tuning.read_shapes(args.shapes)
    else:
        shapes = [tuning.Shape(M, N, K) for N, K in args.nk for M in args.m]
    return tuning.main(shapes=shapes, output=args.output, device=args.device, as_json=args.json)


def _demo(args: argparse.Namespace) -> int:
    from .demo.report import main as demo

    return demo(device=args.device, max_tokens=args.max_tokens, as_json=args.json)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    # Imported late, so that `fastq --help` answers at once.
    if args.command == "doctor":
        from .doctor import main as doctor

        return doctor(as_json=args.json)
    command = _tune if args.command == "tune" else _demo
    try:
        return command(args)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"fastq {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
