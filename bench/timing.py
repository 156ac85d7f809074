"""The timers. Implementations take turns, sample by sample, so that a clock that changes or a
neighbour that wakes up meets all of them alike.

An implementation is a list of calls that do the same on different copies of the inputs; running
through the list keeps the caches from holding what a real model would have to fetch.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch

import fastq
from fastq.graph_timer import NOT_CAPTURED, Calls, GraphTimer, sample_in_turns

__all__ = ["EAGER", "NOT_CAPTURED", "Calls", "Timing", "copies", "measure", "quantiles"]

EAGER = "eager"


class Timing(NamedTuple):
    """Microseconds a call; the names are those of a line of results."""

    p10_us: float
    p50_us: float
    p90_us: float
    timer: str  # how it was measured


def quantiles(samples_us: list[float], timer: str) -> Timing:
    ordered = sorted(samples_us)

    def at(fraction: float) -> float:
        return round(ordered[round(fraction * (len(ordered) - 1))], 3)

    return Timing(at(0.1), at(0.5), at(0.9), timer)


def cache_bytes(device: torch.device) -> int:
    """The L2 of a GPU; the largest cache of a CPU."""
    if device.type == "cuda":
        return fastq.describe()["cuda"]["devices"][device.index or 0]["l2_bytes"]
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [path.read_text().strip() for path in caches]
    return max((int(s[:-1]) << {"K": 10, "M": 20}[s[-1]] for s in sizes), default=32 << 20)


def copies(bytes_each: int, device: torch.device) -> int:
    """How many copies of the inputs make at least 4 x the L2 of a GPU, 2 x the last cache of a CPU
    (where that is large, and shared with others)."""
    wanted = (4 if device.type == "cuda" else 2) * cache_bytes(device)
    return min(max(2, math.ceil(wanted / max(bytes_each, 1))), 256)


class EagerTimer(GraphTimer):
    """Calls one after the other without a graph: a short one takes as long as the host needs."""

    def _capture(self, calls: Calls) -> str:
        self.count = len(calls)
        self.replay = lambda: [call() for call in calls]
        return EAGER


def measure(
    candidates: dict[str, Calls],
    device: torch.device,
    rounds: int,
    eager: Collection[str] = (),
) -> dict[str, Timing]:
    """Times every candidate, in turns; on a GPU as CUDA graphs, but for those named `eager`."""
    if device.type == "cuda":
        return _measure_cuda(candidates, rounds, eager)
    return _measure_cpu(candidates, rounds)


def keep_freed_memory() -> None:
    """Makes glibc give freed memory out again, large blocks too, which it would return to the
    system: so a product that allocates its output meets as few new pages as one that is given it.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    glibc = ctypes.CDLL(None)
    if hasattr(glibc, "mallopt"):
        glibc.mallopt(mmap_max, 0)
        glibc.mallopt(trim_threshold, 2**31 - 1)


_CPU_SETTLE_S, _CPU_SAMPLE_S = 20e-3, 10e-3
_CPU_SHAPE_S, _CPU_LEAST_ROUNDS = 12.0, 9


def _measure_cpu(candidates: dict[str, Calls], rounds: int) -> dict[str, Timing]:
    """A sample is 10 ms of calls at least. Before it the candidate runs untimed for 20 ms: the
    threads of the one before may still spin. Fewer rounds where they would take too long."""
    clock = time.perf_counter

    def run(calls: itertools.cycle, seconds: float) -> float:
        begin = clock()
        count = 0
        while True:
            next(calls)()
            count += 1
            elapsed = clock() - begin
            if elapsed >= seconds:
                return elapsed / count

    endless = {name: itertools.cycle(calls) for name, calls in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    begin = clock()
    for done in range(rounds):
        if done >= _CPU_LEAST_ROUNDS and clock() - begin > _CPU_SHAPE_S:
            break
        for name, calls in endless.items():
            run(calls, _CPU_SETTLE_S)
            samples[name].append(1e6 * run(calls, _CPU_SAMPLE_S))
    return {name: quantiles(values, "perf_counter") for name, values in samples.items()}


def _measure_cuda(
    candidates: dict[str, Calls], rounds: int, eager: Collection[str]
) -> dict[str, Timing]:
    pool = torch.cuda.graph_pool_handle()
    graphs = {
        name: (EagerTimer if name in eager else GraphTimer)(calls, pool)
        for name, calls in candidates.items()
    }
    samples = sample_in_turns(graphs, rounds)
    return {name: quantiles(values, graphs[name].timer) for name, values in samples.items()}
