"""`fastq tune`: times the CUDA configurations of ``int8_gemm`` on the GPU at hand and writes the
table of the fastest that dispatch reads (``FASTQ_TUNING_TABLE``)."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from . import __version__, _core, ops
from .graph_timer import NOT_CAPTURED, GraphTimer, sample_in_turns
from .progress import progress_bar
from .quantize_ops import quantize_per_channel, quantize_per_token

# Every candidate is timed coarsely, the best of them and the heuristic's choice finely.
COARSE_ROUNDS, FINE_ROUNDS, FINALISTS = 3, 25, 4
# What is not faster by more than that may be noise, and the heuristic stays.
LEAST_GAIN = 1.02
_MAX_COPIES = 256
_HEURISTIC = "heuristic"


class Shape(NamedTuple):
    M: int
    N: int
    K: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Result(NamedTuple):
    """What was measured on a shape. Configurations by name, times in microseconds."""

    shape: Shape
    heuristic: str
    heuristic_us: float
    fastest: str
    fastest_us: float

    @property
    def gain(self) -> float:
        return self.heuristic_us / self.fastest_us

    @property
    def choice(self) -> str:
        """What the table says."""
        return self.fastest if self.gain > LEAST_GAIN else _HEURISTIC


class Device(NamedTuple):
    device: torch.device
    name: str
    compute_capability: str
    sm_count: int
    l2_bytes: int


# ---- shapes -------------------------------------------------------------------------------------


def read_shapes(path: Path) -> list[Shape]:
    """The shapes of a JSON file, a list of objects such as ``{"M": [1, 16], "NK": [[4096, 4096]]}``
    or ``{"M": 16, "N": 4096, "K": 4096}``: a list stands for one size after the other. An object
    whose ``devices`` do not name ``cuda`` is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file.
    """
    shapes: dict[Shape, None] = {}
    cases = json.loads(path.read_text(encoding="utf-8"))
    for case in cases if isinstance(cases, list) else [cases]:
        try:
            weights = case["NK"] if "NK" in case else [(case["N"], case["K"])]
            batches = case["M"] if isinstance(case["M"], list) else [case["M"]]
            found = [Shape(M, N, K) for (N, K), M in itertools.product(weights, batches)]
        except (KeyError, TypeError, ValueError):
            found = []
        if not found or not all(type(size) is int and size > 0 for s in found for size in s):
            raise ValueError(f"{path}: {json.dumps(case)} has no sizes M, N and K of at least 1")
        if "cuda" in case.get("devices", ["cuda"]):
            shapes |= dict.fromkeys(found)
    if not shapes:
        raise ValueError(f"{path} has no shapes for a CUDA device")
    return list(shapes)


# ---- measuring ----------------------------------------------------------------------------------


def find_device(name: str) -> Device:
    """The GPU to tune on.

    Raises:
        ValueError: it is no CUDA device.
        RuntimeError: torch or fastq cannot use it.
    """
    device = torch.device(name)
    if device.type != "cuda":
        raise ValueError(f"device is {name}, expected a CUDA device: only its kernels are tuned")
    cuda = ops.describe()["cuda"]
    if cuda is None or not cuda["devices"] or not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here that fastq can use: see `fastq doctor`")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= len(cuda["devices"]):
        raise RuntimeError(f"device is {name}, but the last one is cuda:{len(cuda['devices']) - 1}")
    gpu = cuda["devices"][index]
    return Device(
        torch.device("cuda", index),
        gpu["name"],
        gpu["compute_capability"],
        gpu["sm_count"],
        gpu["l2_bytes"],
    )


def tune(shapes: Iterable[Shape], device: Device) -> Iterator[Result]:
    """Measures one shape after the other.

    Raises:
        RuntimeError: the device failed, or two configurations differ in their bits.
    """
    for shape in shapes:
        with torch.cuda.device(device.device), torch.no_grad():
            result = _measure(_Problem(shape, device))
        yield result


class _Problem:
    """A product with bfloat16 output: operands drawn from N(0, 1), quantised by absmax, in as many
    copies as spill the L2."""

    def __init__(self, shape: Shape, device: Device):
        self.shape = shape
        M, N, K = shape
        generator = torch.Generator(device=device.device).manual_seed(0)
        x, w = (torch.randn(rows, K, generator=generator, device=device.device) for rows in (M, N))
        (a, sa), (b, sb) = quantize_per_token(x), quantize_per_channel(w)
        del x, w
        out = torch.empty(M, N, dtype=torch.bfloat16, device=device.device)
        bytes_each = sum(t.nbytes for t in (a, b, out))
        count = min(max(2, math.ceil(4 * device.l2_bytes / bytes_each)), _MAX_COPIES)
        product = partial(ops.int8_gemm, b_is_constant=True)  # as Int8Linear calls it
        self.calls = [
            # clone() keeps the strides of a dense tensor: a transposed weight stays one.
            partial(product, a.clone(), b.t().clone(), sa, sb, out=out.clone())
            for _ in range(count)
        ]

    def candidates(self) -> list[str]:
        """The configurations to try, the heuristic's choice first."""
        call = self.calls[0]
        return _core.int8_gemm_candidates(*call.args, call.keywords["out"], True).splitlines()

    def timer(self, config: str, pool: tuple[int, int]) -> GraphTimer:
        with _forced(config):
            timer = GraphTimer(self.calls, pool)
        if timer.timer == NOT_CAPTURED:
            raise RuntimeError(f"{config} could not be captured in a CUDA graph on {self.shape}")
        return timer

    def bits(self, config: str) -> torch.Tensor:
        call = self.calls[0]
        out = torch.full_like(call.keywords["out"], torch.nan)
        with _forced(config):
            ops.int8_gemm(*call.args, out=out)
        return out.view(torch.int16)


@contextmanager
def _forced(config: str) -> Iterator[None]:
    """FASTQ_KERNELS for a while; the library reads it at each call."""
    before = os.environ.get("FASTQ_KERNELS")
    os.environ["FASTQ_KERNELS"] = config
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTQ_KERNELS"]
        else:
            os.environ["FASTQ_KERNELS"] = before


def _measure(problem: _Problem) -> Result:
    names = problem.candidates()
    heuristic = names[0]
    pool = torch.cuda.graph_pool_handle()
    timers = {name: problem.timer(name, pool) for name in names}
    coarse = _medians(sample_in_turns(timers, COARSE_ROUNDS, warm_up=1))
    finalists = {heuristic, *sorted(names, key=coarse.__getitem__)[:FINALISTS]}
    fine = _medians(sample_in_turns({name: timers[name] for name in finalists}, FINE_ROUNDS))
    fastest = min(fine, key=fine.__getitem__)
    if not torch.equal(problem.bits(fastest), problem.bits(heuristic)):
        raise RuntimeError(
            f"int8_gemm on {problem.shape}: {fastest} and {heuristic} differ in their bits, which "
            "is a defect of fastq; please report it"
        )
    return Result(problem.shape, heuristic, fine[heuristic], fastest, fine[fastest])


def _medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


# ---- the table ----------------------------------------------------------------------------------

# (compute capability, SMs, N, K, M): the order of the lines.
Key = tuple[str, int, int, int, int]


def read_table(path: Path) -> dict[Key, str]:
    """What each line says: the configuration, and the comment behind it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no tuning table.
    """
    lines = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        try:
            compute_capability, sm_count, M, N, K, _ = fields
            key = (compute_capability, int(sm_count), int(N), int(K), int(M))
        except ValueError:
            raise ValueError(f"{path}, line {number + 1}: not a line of a tuning table") from None
        lines[key] = line.split(maxsplit=5)[5].strip()
    return lines


def write_table(path: Path, lines: dict[Key, str], device: Device) -> None:
    """Replaces the file as a whole: it is never there in part."""
    text = [
        "# A tuning table of fastq's int8_gemm, for FASTQ_TUNING_TABLE=<this file>.",
        f"# Written by `fastq tune` of fastq {__version__} on {device.name}, "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}.",
        "# compute capability, SMs, M, N, K, configuration; heuristic: none was faster by more "
        f"than {100 * (LEAST_GAIN - 1):.0f} %",
    ]
    for (compute_capability, sm_count, N, K, M), says in sorted(lines.items()):
        text.append(f"{compute_capability} {sm_count} {M} {N} {K} {says}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text("\n".join(text) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _line(result: Result, device: Device) -> tuple[Key, str]:
    M, N, K = result.shape
    says = f"{result.choice}  # {result.fastest_us:.2f} us"
    if result.choice != _HEURISTIC:
        says += f", heuristic {result.heuristic_us:.2f} us"
    return (device.compute_capability, device.sm_count, N, K, M), says


# ---- the command --------------------------------------------------------------------------------


def main(*, shapes: list[Shape], output: Path, device: str, as_json: bool) -> int:
    """Tunes the shapes and prints the gains; the progress bar goes to stderr.

    The table is written after every shape. Lines that it held before stay, but for shapes that are
    measured again. Returns 130 after Ctrl-C, with what was measured until then.
    """
    gpu = find_device(device)
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"{output.parent}, where the table is to be, is no folder")
    lines = read_table(output) if output.exists() else {}
    results: list[Result] = []
    interrupted = False
    with progress_bar() as report:
        report(str(shapes[0]), 0, len(shapes))
        try:
            for result in tune(shapes, gpu):
                key, says = _line(result, gpu)
                lines[key] = says
                results.append(result)
                write_table(output, lines, gpu)
                following = shapes[min(len(results), len(shapes) - 1)]
                report(str(following), len(results), len(shapes))
        except KeyboardInterrupt:
            interrupted = True
    if as_json:
        json.dump(_figures(results, gpu, output), sys.stdout, indent=2)
        print()
    else:
        Console().print(render(results, gpu, output, len(shapes)))
    return 130 if interrupted else 0


def _figures(results: list[Result], device: Device, output: Path) -> dict[str, Any]:
    return {
        "fastq": __version__,
        "device": device.name,
        "compute_capability": device.compute_capability,
        "sm_count": device.sm_count,
        "table": str(output.resolve()) if results else None,
        "shapes": [
            {
                **result.shape._asdict(),
                **{k: v for k, v in result._asdict().items() if k != "shape"},
                "gain": result.gain,
                "choice": result.choice,
            }
            for result in results
        ],
    }


def render(results: list[Result], device: Device, output: Path, total: int) -> Group:
    """The gains as a table, and how to use what was written."""
    heading = Text.assemble(
        (f"fastq {__version__}", "bold"),
        f" on {device.name}: int8_gemm, bfloat16 output, CUDA graphs, medians",
    )
    if not results:
        return Group(heading, Text("interrupted before the first shape: nothing written", "yellow"))
    table = Table()
    for column in ("M × N × K", "heuristic µs", "fastest µs", "gain"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("chosen", overflow="fold")
    for result in results:
        table.add_row(
            " × ".join(map(str, result.shape)),
            f"{result.heuristic_us:,.2f}",
            f"{result.fastest_us:,.2f}",
            f"{result.gain:.3f}",
            Text(result.choice, "" if result.choice == _HEURISTIC else "green"),
        )
    tuned = [result.gain for result in results if result.choice != _HEURISTIC]
    summary = f"{len(tuned)} of {len(results)} shapes are faster than with the heuristic's choice"
    if tuned:
        summary += f", by {100 * (statistics.geometric_mean(tuned) - 1):.1f} % in the mean"
    parts = [heading, table, Text(summary + ".")]
    if len(results) < total:
        parts.append(Text(f"Interrupted after {len(results)} of {total} shapes.", "yellow"))
    parts.append(Text(f"Written to {output}. A program uses it with", no_wrap=True))
    parts.append(Text(f"  FASTQ_TUNING_TABLE={output.resolve()}", no_wrap=True, overflow="ignore"))
    return Group(*parts)
