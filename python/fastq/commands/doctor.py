"""`fastq doctor`."""

from __future__ import annotations

import argparse

from .arguments import add_json


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check the installation: versions, devices, kernels, and what is missing",
        description="Prints versions, devices, instruction sets and the kernel that each op takes "
        "on each device, after running every op once. The exit code is 1 when something is "
        "missing or wrong; the command that mends it is printed.",
    )
    add_json(parser, "the findings")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..doctor import main

    return main(as_json=args.json)
