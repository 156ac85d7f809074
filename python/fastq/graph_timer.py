"""Times calls on a GPU by replaying CUDA graphs of them: no host time, no gaps between calls."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch

# Calls that do the same on different copies of the inputs: running through them keeps the caches
# from holding what a real model would have to fetch.
Calls = list[Callable[[], object]]
NOT_CAPTURED = "cuda events, not captured"


class GraphTimer:
    """A CUDA graph of many calls, or the calls themselves where they cannot be captured.

    `timer` says which of the two it is. A graph keeps the kernels that its calls chose when it was
    captured.
    """

    SAMPLE_US = 1500.0
    MAX_CALLS = 512

    def __init__(self, calls: Calls, pool: tuple[int, int]):
        """`pool` is the memory that the calls of all graphs allocate from, one after the other."""
        self.pool = pool
        self.graphs: list[torch.cuda.CUDAGraph] = []  # torch gives up a pool with its last graph
        for call in calls:
            call()
        torch.cuda.synchronize()
        self.timer = self._capture(calls)
        once = self.sample()
        if once * len(calls) < self.SAMPLE_US:
            wanted = min(self.SAMPLE_US / max(once, 0.5), self.MAX_CALLS)
            repeats = math.ceil(wanted / len(calls))
            if repeats > 1:
                self.timer = self._capture(calls * repeats)
        self.replay()
        torch.cuda.synchronize()

    def _capture(self, calls: Calls) -> str:
        self.count = len(calls)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self.graphs.append(graph)
        torch.cuda.synchronize()
        try:
            # torch.cuda.graph would empty the allocator's cache each time, which takes longer than
            # a measurement.
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=self.pool)
                try:
                    for call in calls:
                        call()
                finally:
                    graph.capture_end()
        except RuntimeError:
            torch.cuda.synchronize()
            self.replay = lambda: [call() for call in calls]
            return NOT_CAPTURED
        self.replay = graph.replay
        return "cuda graph"

    def sample(self) -> float:
        """Microseconds a call. The replay before the timed one keeps the GPU busy until all of that
        is enqueued."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.replay()
        begin.record()
        self.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / self.count


def sample_in_turns(
    timers: dict[str, GraphTimer], rounds: int, *, warm_up: int = 3
) -> dict[str, list[float]]:
    """`rounds` samples of each, in microseconds a call.

    They take turns, so that a clock that changes meets all of them alike; the turns of `warm_up`
    come before and bring the clocks to where they stay.
    """
    samples: dict[str, list[float]] = {name: [] for name in timers}
    # No candidate always follows the same neighbour: power spent lowers the clocks of who is next.
    order, shuffle = list(timers), random.Random(0).shuffle
    for turn in range(-warm_up, rounds):
        shuffle(order)
        for name in order:
            value = timers[name].sample()
            if turn >= 0:
                samples[name].append(value)
    return samples
