"""New keys and values to a cache, rotated, and queries rotated with them, beside eager torch.

``python -m bench.kv_append --device cpu`` (or ``cuda``) appends to
``bench/results/<device>/kv_append.jsonl``. Inputs are drawn from N(0, 1), and every sequence gets
``seqlen`` new tokens. torch rotates by halves and copies to a slice, which asks for lengths that
are the same and known on the host; ``ratio`` is its time over this implementation's. The rate
counts what must be read and written; a copy of q, k and v shows what the memory allows.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastq
from fastq.runtime.rotary import apply_rotary

from . import results, timing
from .flash_attention import DTYPES
from .flash_decode import INT8

TORCH, COPY = "torch", "torch.clone"


def torch_append(q, k, v, k_cache, v_cache, first: int, table: list[Tensor]) -> Tensor:
    """kv_append as one would write it in torch."""
    k_cache[:, first:] = apply_rotary(k, *table)
    v_cache[:, first:] = v
    return apply_rotary(q, *table)


def clone(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.clone()


def run(writer: results.Writer, sizes: dict, tag: str, rounds: int, dtype: torch.dtype) -> None:
    device = writer.device
    generator = torch.Generator(device=device).manual_seed(0)
    batch, seqlen, heads, heads_k, head_dim = (
        sizes[name] for name in ("batch", "seqlen", "heads", "heads_k", "head_dim")
    )

    def random(h: int) -> Tensor:
        return torch.randn(batch, seqlen, h, head_dim, generator=generator, device=device).to(dtype)

    capacity = max(seqlen, 64)
    first = capacity - seqlen
    q_bytes, kv_bytes = (
        batch * seqlen * h * head_dim * dtype.itemsize for h in (heads, 2 * heads_k)
    )
    copies = timing.copies(2 * (q_bytes + kv_bytes), device)
    inputs = [[random(h) for h in (heads, heads_k, heads_k)] for _ in range(copies)]
    shape = (batch, capacity, heads_k, head_dim)
    caches = [[torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"] for _ in inputs]
    int8 = [[torch.zeros(shape, dtype=torch.int8, device=device) for _ in "kv"] for _ in inputs]
    scales = [torch.zeros(shape[:3], device=device) for _ in "kv"]
    lengths = torch.full((batch,), capacity, dtype=torch.int32, device=device)
    angles = torch.rand(capacity, head_dim // 2, generator=generator, device=device)
    cos, sin = angles.cos(), angles.sin()
    append = partial(fastq.kv_append, rotary_cos=cos, rotary_sin=sin)
    to_int8 = partial(append, k_scale=scales[0], v_scale=scales[1])
    by_torch = partial(torch_append, first=first, table=[cos[first:], sin[first:]])
    candidates = {
        "fastq": [
            partial(append, k, v, *cache, lengths, q=q)
            for (q, k, v), cache in zip(inputs, caches, strict=True)
        ],
        INT8: [
            partial(to_int8, k, v, *cache, lengths, q=q)
            for (q, k, v), cache in zip(inputs, int8, strict=True)
        ],
        TORCH: [partial(by_torch, *qkv, *cache) for qkv, cache in zip(inputs, caches, strict=True)],
        COPY: [partial(clone, *qkv) for qkv in inputs],
    }
    clocks = results.read_clocks(device)
    timings = timing.measure(candidates, device, rounds)
    measured = clocks()
    moved = dict.fromkeys(candidates, 2 * (q_bytes + kv_bytes))
    moved[INT8] = 2 * q_bytes + kv_bytes + kv_bytes // dtype.itemsize * (head_dim + 4) // head_dim
    name = str(dtype).removeprefix("torch.")
    print(f"{results.shape_text(sizes)} {name} ({tag})")
    for implementation, t in timings.items():
        rate, ratio = 1e-3 * moved[implementation] / t.p50_us, timings[TORCH].p50_us / t.p50_us
        print(f"  {implementation:18} {t.p50_us:11.2f} us {rate:9.1f} GB/s {ratio:7.3f}")
        writer.write(
            op="kv_append",
            tag=tag,
            shape=sizes,
            dtype=name,
            implementation=implementation,
            config=None,
            **t._asdict(),
            copies=copies,
            rate=round(rate, 3),
            unit="GB/s",
            peer=TORCH,
            ratio=round(ratio, 4),
            clocks=measured,
        )


def main() -> None:
    parser = results.arguments("kv_append")
    results.add_shapes(parser, "kv_append")
    options = parser.parse_args()
    writer = results.writer(options, "kv_append")
    if options.device == "cpu":
        timing.keep_freed_memory()
    for sizes, tag in results.shapes(options):
        for dtype in DTYPES[writer.device.type]:
            run(writer, sizes, tag, options.rounds, dtype)
    print(f"appended to {writer.path}")


if __name__ == "__main__":
    main()
