"""The command `fastq`. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import sys

from . import __version__
from .commands import bench, demo, doctor, evaluate, generate, quantize, tune

_COMMANDS = (quantize, generate, evaluate, bench, demo, doctor, tune)
_FAILED, _INTERRUPTED = 1, 130
_FAILURES = (OSError, RuntimeError, TypeError, ValueError)  # NotImplementedError is a RuntimeError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastq",
        description="INT8 transformers on CPUs and GPUs: quantise a model, run it, measure it.",
        epilog="`fastq demo` is the place to start; `fastq doctor` says what this machine offers. "
        "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"fastq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    wrong = args.check(args) if "check" in args else None
    if wrong is not None:
        parser.error(wrong)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Who read the output has gone, as in `fastq generate ... | head`. What is left to write
        # would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except _FAILURES as error:
        print(f"fastq {args.command}: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print(f"fastq {args.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
