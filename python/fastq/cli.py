"""The command `fastq`."""

from __future__ import annotations

import argparse
import sys

from . import __version__


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


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
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    # Imported late, so that `fastq --help` answers at once.
    if args.command == "doctor":
        from .doctor import main as doctor

        return doctor(as_json=args.json)
    from .demo.report import main as demo

    try:
        return demo(device=args.device, max_tokens=args.max_tokens, as_json=args.json)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"fastq demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
