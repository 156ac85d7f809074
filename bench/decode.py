"""A step of decoding: whole models in known shapes, in this runtime and in others.

``python -m bench.decode --device cuda --models llama-7b --batches 1 --contexts 512`` appends to
``bench/results/<device>/decode.jsonl``. A step computes the logits of one new token for each
sequence, after `context` tokens of each; sampling is not in it. Weights are random, and come from
memory, being larger than any cache. Systems:

- ``16bit``: this runtime with float16 weights (bfloat16 on a CPU) and cuBLAS;
- ``w8a8``, ``w8a8_static``: INT8 by the fused path; ``+kv8``: with an INT8 cache besides;
- ``llm_int8``: the outlier split, with one channel in a thousand holding outliers;
- ``transformers``: its model in 16 bits, SDPA attention; ``transformers-compiled``: with a static
  cache and torch.compile; ``bitsandbytes``: its Linear8bitLt in that model.

On a GPU this runtime replays a CUDA graph (`DecodeStep`), and steps follow one another without a
wait: the time is that of the GPU, or of a host that is slower. One model is in memory at a time, so
systems are timed one after the other; ``clocks`` tells what the GPU was doing.

``ratio`` is the time of ``16bit`` over this system's. ``limit_us`` is the time in which the bytes
of the weights and of the cache can be read, by the bandwidth measured in this run (the better of
reading and copying), ``of_limit`` the part of the step that it makes up. ``allocated_bytes`` is
what the model takes, ``allocated_ratio`` that over the one of ``16bit``; ``peak_bytes`` is the
device's memory at its height while decoding, the cache included.

``--explain`` tells where a step goes instead, op by op: see bench/decode_explain.py.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastq.evaluation.speed import weight_bytes
from fastq.runtime import CausalLM, cache_bytes
from fastq.runtime.decode_graph import DecodeStep
from fastq.runtime.generation import new_cache

from . import decode_peers, results, timing
from .decoders import CONFIGS, DTYPES, bytes_read, random_decoder

FLOAT = "16bit"
# System: the scheme of the weights, the kind of the cache.
OURS: dict[str, tuple[str | None, str | None]] = {
    FLOAT: (None, None),
    "w8a8": ("w8a8", None),
    "w8a8+kv8": ("w8a8", "int8"),
    "w8a8_static": ("w8a8_static", None),
    "w8a8_static+kv8": ("w8a8_static", "int8"),
    "llm_int8": ("llm_int8", None),
}
SYSTEMS = (*OURS, *decode_peers.PEERS)
DEFAULT_SYSTEMS = (FLOAT, "w8a8", "w8a8+kv8", "llm_int8", decode_peers.EAGER)
# Of a sample; so far the context grows from what a case says.
STEPS = {"cpu": 2, "cuda": 16}
WARM_UP = 3
BANDWIDTH_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}


class Case(NamedTuple):
    model: str
    batch: int
    context: int


@dataclass
class OurStep:
    """One token for each of `batch` sequences, after `context` random ones of each."""

    model: CausalLM
    batch: int
    context: int
    room: int
    kv_cache: str | None = None
    use_graph: bool | None = None

    def __post_init__(self) -> None:
        device = self.model.device
        self._cache = new_cache(self.model, self.batch, self.context + self.room, self.kv_cache)
        for stored in (self._cache.keys, self._cache.values):
            stored.random_(-127, 128) if self.kv_cache else stored.normal_()
        if self.kv_cache:
            self._cache.key_scales.fill_(1 / 73)
            self._cache.value_scales.fill_(1 / 73)
        self._cache.begin(self.context)
        self._cache.commit(self.context)
        self._tokens = torch.zeros(self.batch, dtype=torch.int64, device=device)
        use_graph = device.type == "cuda" if self.use_graph is None else self.use_graph
        self._decode = DecodeStep(self.model, self._cache, self.room, use_graph=use_graph)

    def rewind(self) -> None:
        """Back to `context` tokens."""
        self._cache.length = self.context
        self._cache._committed.fill_(self.context)

    def step(self) -> Tensor:
        return self._decode(self._tokens)


def time_steps(stepper: Any, device: torch.device, rounds: int) -> timing.Timing:
    """Of one step. The one before each sample keeps a GPU busy until the sample is enqueued."""
    steps, samples = STEPS[device.type], []
    for _ in range(WARM_UP):
        stepper.step()
    for _ in range(rounds):
        stepper.rewind()
        if device.type == "cuda":
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stepper.step()
            begin.record()
            for _ in range(steps):
                stepper.step()
            end.record()
            end.synchronize()
            microseconds = 1e3 * begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            for _ in range(steps):
                stepper.step()
            microseconds = 1e6 * (time.perf_counter() - start)
        samples.append(microseconds / steps)
    return timing.quantiles(samples, "cuda events" if device.type == "cuda" else "perf_counter")


def room(device: torch.device) -> int:
    """Steps that a cache must hold."""
    return max(STEPS[device.type] + 1, WARM_UP)


def measure_bandwidth(device: torch.device, rounds: int) -> dict[str, float]:
    """GB/s of reading and of copying, which reads and writes."""
    source = torch.ones(BANDWIDTH_BYTES[device.type] // 4, device=device)
    out, total = torch.empty_like(source), torch.empty((), device=device)
    calls: dict[str, timing.Calls] = {
        "read": [partial(torch.sum, source, 0, out=total)],
        "copy": [partial(torch.neg, source, out=out)],
    }
    times = timing.measure(calls, device, rounds)
    moved = {"read": source.nbytes, "copy": 2 * source.nbytes}
    return {name: round(1e-3 * moved[name] / t.p50_us, 1) for name, t in times.items()}


def unread(model: nn.Module) -> list[nn.Module | None]:
    """The tables that a step reads a few rows of."""
    if isinstance(model, CausalLM):
        return [model.model.embed_tokens, model.model.embed_positions]
    decoder = getattr(model.model, "decoder", model.model)
    return [decoder.embed_tokens, getattr(decoder, "embed_positions", None)]


@dataclass
class Benchmark:
    writer: results.Writer
    rounds: int
    bandwidth: dict[str, float]

    def __post_init__(self) -> None:
        self.float_us: dict[Case, float] = {}
        self.float_bytes: dict[str, int] = {}
        self.failed: list[str] = []

    def run(
        self, case: Case, system: str, model: nn.Module, allocated: int, stepper: Any
    ) -> timing.Timing:
        device, config = self.writer.device, CONFIGS[case.model]
        clocks = results.read_clocks(device)
        t = time_steps(stepper, device, self.rounds)
        measured = clocks()
        if system == FLOAT:
            self.float_us[case] = t.p50_us
        ratio = self.float_us[case] / t.p50_us if case in self.float_us else None
        kv = OURS[system][1] if system in OURS else None
        dtype = DTYPES[device.type]
        options = {"dtype": dtype, "kv_cache": kv}
        weights = bytes_read(model, unread(model))
        cache = cache_bytes(config, case.batch, case.context, **options)
        limit = 1e-3 * (weights + cache) / max(self.bandwidth.values())
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        print(
            f"  {system:22} {t.p50_us:11.1f} us {1e6 * case.batch / t.p50_us:9.1f} tokens/s "
            f"{limit / t.p50_us:7.1%} of the limit {'' if ratio is None else f'{ratio:7.3f} x'}"
        )
        self.writer.write(
            op="decode",
            tag="",
            shape=case._asdict(),
            dtype=str(dtype).removeprefix("torch."),
            implementation=system,
            config=describe(model, stepper),
            **t._asdict(),
            copies=1,
            rate=round(1e6 * case.batch / t.p50_us, 3),
            unit="tokens/s",
            peer=FLOAT,
            ratio=None if ratio is None else round(ratio, 4),
            weight_bytes=weights,
            cache_bytes=cache,
            bandwidth_gbs=self.bandwidth,
            limit_us=round(limit, 3),
            of_limit=round(limit / t.p50_us, 4),
            allocated_bytes=allocated,
            allocated_ratio=self.allocated_ratio(case.model, allocated),
            peak_bytes=peak,
            clocks=measured,
        )
        return t

    def allocated_ratio(self, model: str, allocated: int) -> float | None:
        whole = self.float_bytes.get(model)
        return None if whole is None else round(allocated / whole, 4)

    def skip(self, case: Case, system: str, reason: str) -> None:
        print(f"  {system:22} {results.shape_text(case._asdict())} skipped: {reason}")
        self.writer.write(
            op="decode",
            tag="",
            shape=case._asdict(),
            dtype=str(DTYPES[self.writer.device.type]).removeprefix("torch."),
            implementation=system,
            skipped=reason,
        )


def describe(model: nn.Module, stepper: Any) -> dict[str, Any]:
    if not isinstance(stepper, OurStep):
        import transformers

        return {"transformers": transformers.__version__}
    return {"fused": model._fused is not None, "graph": stepper._decode._graph is not None}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocated_by(build: Callable[[], nn.Module], device: torch.device) -> tuple[Any, int]:
    """What it builds and the device's memory that this takes, on a CPU that of its tensors."""
    free()
    if device.type != "cuda":
        model = build()
        return model, weight_bytes(model)
    before = torch.cuda.memory_allocated(device)
    model = build()
    free()
    return model, torch.cuda.memory_allocated(device) - before


def groups(systems: Sequence[str]) -> Iterator[tuple[Any, list[str]]]:
    """(scheme or peer, systems that share its weights), the float one first."""
    by_weights: dict[Any, list[str]] = {}
    for system in sorted(systems, key=SYSTEMS.index):
        key = OURS[system][0] if system in OURS else system
        by_weights.setdefault(key, []).append(system)
    yield from by_weights.items()


def run_model(benchmark: Benchmark, name: str, options: argparse.Namespace) -> None:
    device, config = benchmark.writer.device, CONFIGS[name]
    cases = [Case(name, b, c) for b in options.batches for c in options.contexts]
    for key, systems in groups(options.systems):
        is_peer = key in decode_peers.PEERS
        if is_peer:
            reason = decode_peers.why_not(key, config, device)
            if reason is not None:
                for case in cases:
                    benchmark.skip(case, key, reason)
                continue
        build = decode_peers.build if is_peer else random_decoder
        arguments = (key, config, device) if is_peer else (config, key, device)
        try:
            model, allocated = allocated_by(partial(build, *arguments), device)
        except torch.OutOfMemoryError:
            for case in cases:
                for system in systems:
                    benchmark.skip(case, system, "the model does not fit the device's memory")
            continue
        if FLOAT in systems:
            benchmark.float_bytes[name] = allocated
        part = benchmark.allocated_ratio(name, allocated)
        print(
            f"{name}, {', '.join(systems)}: {1e-9 * allocated:.2f} GB"
            + ("" if part is None else f", {part:.3f} x {FLOAT}")
        )
        for case in cases:
            print(f"{name}, batch {case.batch}, {case.context} tokens")
            for system in systems:
                _run_case(benchmark, case, system, model, allocated, options)
        del model
        free()


def _run_case(
    benchmark: Benchmark,
    case: Case,
    system: str,
    model: nn.Module,
    allocated: int,
    options: argparse.Namespace,
) -> None:
    device = benchmark.writer.device
    free()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        if system in OURS:
            kv = OURS[system][1]
            stepper: Any = OurStep(model, case.batch, case.context, room(device), kv)
        else:
            sizes = (case.batch, case.context, room(device))
            stepper = decode_peers.PeerStep(system, model, *sizes)
        step = benchmark.run(case, system, model, allocated, stepper)
        if options.explain and system in OURS:
            from .decode_explain import explain

            explain(benchmark, case, system, model, step.p50_us)
    except Exception as error:  # one that fails does not end the run of the others
        benchmark.skip(case, system, f"{type(error).__name__}: {str(error)[:300]}")
        if not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exc()
            benchmark.failed.append(system)


def add_names(
    parser: argparse.ArgumentParser, kind: str, names: Iterable[str], default: Sequence[str]
) -> None:
    """--models MODEL ..., of the names."""
    parser.add_argument(
        f"--{kind}s",
        nargs="+",
        choices=list(names),
        default=list(default),
        metavar=kind.upper(),
        help=f"of {', '.join(names)}; default: {', '.join(default)}",
    )


def add_models(parser: argparse.ArgumentParser, models: Sequence[str]) -> None:
    add_names(parser, "model", CONFIGS, models)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = results.arguments("decode")
    add_models(parser, [name for name in CONFIGS if name != "tiny"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 1024])
    add_names(parser, "system", SYSTEMS, DEFAULT_SYSTEMS)
    parser.add_argument("--explain", action="store_true", help="tell where a step goes, too")
    options = parser.parse_args(arguments)
    writer = results.writer(options, "decode")
    bandwidth = measure_bandwidth(writer.device, options.rounds)
    print(f"bandwidth, GB/s: {bandwidth}")
    benchmark = Benchmark(writer, options.rounds, bandwidth)
    for name in options.models:
        run_model(benchmark, name, options)
    print(f"appended to {writer.path}")
    if benchmark.failed:
        sys.exit(f"failed: {', '.join(sorted(set(benchmark.failed)))}")


if __name__ == "__main__":
    main()
