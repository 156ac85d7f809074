"""Where a result goes and what stands in it: one JSON line a case, and the machine it is from."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastq
from fastq.provenance import device_name, provenance

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPES = REPOSITORY / "bench" / "shapes"
RESULTS = REPOSITORY / "bench" / "results"


def device_folder(device: torch.device) -> str:
    """`nvidia-h200`, `cpu-intel-xeon-platinum-8481c`."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", device_name(device).lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return name if device.type == "cuda" else f"cpu-{name}"


Clocks = dict[str, str] | None


def read_clocks(device: torch.device) -> Callable[[], Clocks]:
    """Asks for the clocks and the power of a GPU at this moment, and returns a function that waits
    for the answer: so they can be those of a measurement under way."""
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return lambda: None
    query = (f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id={device.index or 0}")
    process = subprocess.Popen(
        ("nvidia-smi", *query), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

    def answer() -> Clocks:
        text, _ = process.communicate()
        if process.returncode != 0:
            return None
        return dict(zip(names, text.strip().split(", "), strict=True))

    return answer


def clocks(device: torch.device) -> Clocks:
    """The clocks and the power of a GPU at this moment, or None."""
    return read_clocks(device)()


class Writer:
    """Appends one JSON line a case."""

    def __init__(self, path: Path, device: torch.device):
        self.path = path
        self.device = device
        self.lines: list[dict[str, Any]] = []  # what this run wrote
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **fields: Any) -> dict[str, Any]:
        line = {**provenance(self.device, REPOSITORY), **fields}
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line


def read(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def key(line: dict[str, Any]) -> tuple:
    """What makes two lines the same case: the newest one of a file counts."""
    shape = tuple(sorted(line["shape"].items()))
    return (line["op"], shape, line["dtype"], line["implementation"])


def newest(path: Path) -> dict[tuple, dict[str, Any]]:
    """The last line of each case in a file, in the order in which the cases first appear."""
    return {key(line): line for line in read(path)}


def arguments(op: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{op}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/<op>.jsonl")
    parser.add_argument(
        "--rounds", type=int, help="samples of each implementation; default: 25, 11 of CUDA graphs"
    )
    parser.add_argument("--threads", type=int, help="of the CPU, for fastq and torch alike")
    return parser


def add_shapes(parser: argparse.ArgumentParser, op: str) -> None:
    parser.add_argument("--shapes", type=Path, default=SHAPES / f"{op}.json")
    parser.add_argument("--filter", default="", help="a regular expression on '<shape> <tag>'")


def writer(options: argparse.Namespace, op: str) -> Writer:
    """Where the lines go; sets the number of threads and of samples."""
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    if options.threads is not None:
        fastq.set_num_threads(options.threads)
        torch.set_num_threads(options.threads)
    if options.rounds is None:
        options.rounds = 25 if device.type == "cpu" else 11
    path = options.out or RESULTS / device_folder(device) / f"{op}.jsonl"
    return Writer(path, device)


def expand(case: dict[str, Any]) -> Iterator[dict[str, int]]:
    """The sizes that an entry of a shapes file stands for. A list is one size after the other, and
    a name of two letters holds pairs: ``{"M": [1, 16], "NK": [[4096, 4096]]}``."""
    values = [value if isinstance(value, list) else [value] for value in case.values()]
    for chosen in itertools.product(*values):
        sizes: dict[str, int] = {}
        for name, size in zip(case, chosen, strict=True):
            sizes |= zip(name, size, strict=True) if isinstance(size, list) else {name: size}
        yield sizes


def shapes(options: argparse.Namespace) -> Iterator[tuple[dict[str, int], str]]:
    """(sizes, tag) of the cases in the shapes file that the device and the filter leave. A shape
    that stands in the file twice has its first tag."""
    seen = set()
    for case in json.loads(options.shapes.read_text()):
        devices, tag = case.pop("devices"), case.pop("tag")
        for sizes in expand(case) if options.device in devices else ():
            text = shape_text(sizes)
            if text not in seen and re.search(options.filter, f"{text} {tag}"):
                seen.add(text)
                yield sizes, tag


def shape_text(sizes: dict[str, int]) -> str:
    return "x".join(str(size) for size in sizes.values())
