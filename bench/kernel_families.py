"""The families of CUDA kernels, and how to time one that dispatch would not choose."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

DEFAULT = "default"


def add_families(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--families",
        type=lambda text: text.split(","),
        default=[DEFAULT],
        help="CUDA kernel families, such as default,sm80; default: default",
    )


def label(family: str) -> str:
    """What results call fastq with that family."""
    return "fastq" if family == DEFAULT else f"fastq[{family}]"


@contextmanager
def kernel_family(family: str) -> Iterator[None]:
    """FASTQ_KERNELS for a while. A captured graph keeps the kernels of its capture."""
    before = os.environ.pop("FASTQ_KERNELS", None)
    if family != DEFAULT:
        os.environ["FASTQ_KERNELS"] = family
    try:
        yield
    finally:
        os.environ.pop("FASTQ_KERNELS", None)
        if before is not None:
            os.environ["FASTQ_KERNELS"] = before


def in_family(family: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called with that family; itself where that is dispatch's choice."""
    return function if family == DEFAULT else partial(_call_in_family, family, function)


def _call_in_family(family: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with kernel_family(family):
        return function(*args, **kwargs)
