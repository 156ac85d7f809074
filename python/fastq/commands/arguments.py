"""Kinds of arguments, and arguments that several commands take."""

from __future__ import annotations

import argparse
import textwrap

DEMO = "demo"
DTYPES = ("float32", "float16", "bfloat16")


def add_command(
    commands: argparse._SubParsersAction, name: str, *, help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """A parser whose epilog keeps its lines."""
    return commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, 80),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected at least 0, got {value}")
    return value


def add_model(parser: argparse.ArgumentParser, *, is_optional: bool = False) -> None:
    text = "a folder in Hugging Face's form, or `demo`, the small model that fastq ships"
    if is_optional:
        text += " (the default)"
        parser.add_argument("model", metavar="MODEL", nargs="?", default=DEMO, help=text)
    else:
        parser.add_argument("model", metavar="MODEL", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of what is not INT8 (default: the checkpoint's; float32 on a CPU without bfloat16)",
    )


def add_kv_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-cache",
        choices=("int8",),
        help="keep keys and values in 8 bits, with a scale for each token and head",
    )


def add_json(parser: argparse.ArgumentParser, what: str = "the figures") -> None:
    parser.add_argument(
        "--json", action="store_true", help=f"print {what} as one JSON object, and nothing else"
    )
