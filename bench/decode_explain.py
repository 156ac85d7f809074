"""Where a step of decoding goes, op by op: ``python -m bench.decode --explain``.

A step is run without a graph under torch's profiler, which tells each op's kernels and the time
that they take; beside them stands the time in which the op's bytes can be read. Run so, kernels do
not overlap, as they do in a graph by programmatic dependent launch: ``step_us``, the step as a
graph, may be less than the sum, or more by the gaps between kernels. The lines go to
``decode_ops.jsonl`` beside the others. On a CPU an op's time is its own there.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastq.runtime import CausalLM, cache_bytes

from . import results
from .decoders import CONFIGS, DTYPES

STEPS = 4
# Inputs with more elements are tables and caches, of which an op reads a few rows.
TABLE = 1 << 20
INT8_PRODUCTS = ("fastq::int8_gemm", "fastq::llm_int8_matmul")
FLOAT_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


@dataclass
class Op:
    """All calls of an op with inputs of the same shapes, in `STEPS` steps."""

    name: str
    shapes: list[list[int]]
    microseconds: float = 0.0
    calls: int = 0
    kernels: list[str] = field(default_factory=list)  # of all calls


def profile_steps(stepper: Any, device: torch.device) -> list[Op]:
    """The ops that take time in `STEPS` steps, the slowest first."""
    stepper.step()
    stepper.step()
    stepper.rewind()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize()
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiled:
        for _ in range(STEPS):
            stepper.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    on_gpu = device.type == "cuda"
    ops: dict[tuple, Op] = {}
    for event in profiled.events():
        if event.device_type != DeviceType.CPU:
            continue
        if not (event.kernels if on_gpu else "::" in event.name):
            continue
        shapes = [list(shape) for shape in event.input_shapes or [] if shape]
        key = (event.name, str(shapes))
        op = ops.setdefault(key, Op(event.name, shapes))
        op.calls += 1
        if on_gpu:
            op.microseconds += sum(kernel.duration for kernel in event.kernels)
            op.kernels += [kernel.name for kernel in event.kernels]
        else:
            op.microseconds += event.self_cpu_time_total
    if on_gpu and not ops:  # where the profiler does not tell which op launched a kernel
        for event in profiled.events():
            if event.device_type == DeviceType.CUDA:
                op = ops.setdefault((event.name,), Op(short(event.name), []))
                op.calls += 1
                op.microseconds += event.self_device_time_total
                op.kernels.append(event.name)
    return sorted(ops.values(), key=lambda op: -op.microseconds)


def op_bytes(op: Op, layer_cache: int, itemsize: int) -> int:
    """What one call must read, at the least; `layer_cache` are the bytes of a layer's cache."""
    if op.name == "fastq::flash_decode":
        return layer_cache
    sizes = [torch.Size(shape).numel() for shape in op.shapes]
    if op.name in INT8_PRODUCTS:
        return max(sizes, default=0)
    if op.name in FLOAT_PRODUCTS:
        return itemsize * max(sizes, default=0)
    return itemsize * sum(size for size in sizes if size <= TABLE)


def short(kernel: str) -> str:
    """A kernel's name without its namespaces, template arguments and parameters."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    text = name.split("<")[0].split("(")[0]
    return text.rsplit("::", 1)[-1] or kernel[:40]


def kernels_of_a_layer(ops: list[Op], layers: int) -> tuple[float, int]:
    """Kernels that a step launches, and that each layer does."""
    count = sum(len(op.kernels) for op in ops) / STEPS
    in_layers: dict[str, int] = defaultdict(int)
    for op in ops:
        in_layers[op.name] += len(op.kernels)
    return count, sum(kernels // (STEPS * layers) for kernels in in_layers.values())


def explain(benchmark: Any, case: Any, system: str, model: nn.Module, step_us: float) -> None:
    """Prints the table of a system's step and writes a line an op."""
    from .decode import OURS, OurStep

    assert isinstance(model, CausalLM)
    device, config, kv = model.device, CONFIGS[case.model], OURS[system][1]
    room = STEPS + 2
    stepper = OurStep(model, case.batch, case.context, room, kv, use_graph=False)
    ops = profile_steps(stepper, device)
    dtype = DTYPES[device.type]
    layers = config.num_hidden_layers
    cache = cache_bytes(config, case.batch, case.context, dtype=dtype, kv_cache=kv) // layers
    bandwidth = max(benchmark.bandwidth.values())
    total = max(sum(op.microseconds for op in ops) / STEPS, 1e-3)
    launched, in_layer = kernels_of_a_layer(ops, layers)
    print(
        f"  {system}: {total:.1f} us in ops, {step_us:.1f} us a step, {launched:.0f} kernels, "
        f"{in_layer} a layer"
    )
    print("    us a step    share   calls  us a call     limit  op")
    writer = results.Writer(benchmark.writer.path.with_name("decode_ops.jsonl"), device)
    run: dict[str, str] = {}  # all its lines have the first one's time, by which they are told
    for op in ops:
        us, calls = op.microseconds / STEPS, op.calls / STEPS
        moved = op_bytes(op, cache, dtype.itemsize)
        limit = 1e-3 * moved / bandwidth
        names = sorted({short(kernel) for kernel in op.kernels})
        if us >= 0.002 * total:
            shapes = " ".join("x".join(map(str, shape)) for shape in op.shapes[:3])
            print(
                f"    {us:9.1f} {us / total:8.1%} {calls:7.1f} {us / calls:10.2f} {limit:9.2f}  "
                f"{op.name} {shapes} [{', '.join(names)}]"
            )
        line = writer.write(
            **run,
            op="decode_ops",
            tag=op.name,
            shape={**case._asdict(), "inputs": str(op.shapes)},
            dtype=str(dtype).removeprefix("torch."),
            implementation=system,
            config={"kernels": names, "kernels_a_call": len(op.kernels) / op.calls},
            calls=calls,
            us_a_step=round(us, 3),
            us_a_call=round(us / calls, 3),
            share=round(us / total, 5),
            bytes_a_call=moved,
            limit_us_a_call=round(limit, 3),
            step_us=step_us,
            kernels_a_step=launched,
            kernels_a_layer=in_layer,
        )
        run = {"time": line["time"]}
