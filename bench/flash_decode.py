"""Attention of one new token to a cache, beside torch's scaled_dot_product_attention (on a GPU each
of its fast backends) and a copy of memory.

``python -m bench.flash_decode --device cpu`` (or ``cuda``) appends to
``bench/results/<device>/flash_decode.jsonl``. Inputs are drawn from N(0, 1), and every sequence has
``seqlen`` tokens. The rate counts the bytes of the cache, its scales included; a copy's, what it
reads and writes. ``ratio`` is the time of torch's fastest over this implementation's; ``ratios``
has an int8 cache's to our own of q's dtype, too.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastq

from . import results, timing
from .flash_attention import BACKENDS, DTYPES, sdpa

COPY, INT8 = "copy", "fastq (int8 cache)"
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# A cache of this size leaves no other in any L2, and memory may not hold two of the largest.
LARGE_BYTES = 1 << 30


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """An int8 cache and its scales (batch, seqlen, heads), those of a head side by side."""
    q, scale = fastq.quantize_per_token(x)
    return q, scale.squeeze(-1).transpose(1, 2).contiguous().transpose(1, 2)


def run(writer: results.Writer, sizes: dict, tag: str, rounds: int, dtype: torch.dtype) -> None:
    device = writer.device
    generator = torch.Generator(device=device).manual_seed(0)
    batch, seqlen, heads, heads_k, head_dim = (
        sizes[name] for name in ("batch", "seqlen", "heads", "heads_k", "head_dim")
    )

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    elements = 2 * batch * seqlen * heads_k * head_dim
    cache_bytes = elements * dtype.itemsize
    int8_bytes = elements + 4 * elements // head_dim
    copies = 1 if cache_bytes >= LARGE_BYTES else timing.copies(int8_bytes, device)
    queries = [random(batch, 1, heads, head_dim) for _ in range(copies)]
    caches = [[random(batch, seqlen, heads_k, head_dim) for _ in range(2)] for _ in range(copies)]
    lengths = torch.full((batch,), seqlen, dtype=torch.int32, device=device)
    candidates = {
        "fastq": [
            partial(fastq.flash_decode, q, *kv, lengths)
            for q, kv in zip(queries, caches, strict=True)
        ]
    }
    int8 = []
    for q, kv in zip(queries, caches, strict=True):
        (k, k_scale), (v, v_scale) = (quantized(x) for x in kv)
        call = partial(fastq.flash_decode, q, k, v, lengths, k_scale=k_scale, v_scale=v_scale)
        int8.append(call)
    candidates[INT8] = int8
    # torch's wants (batch, heads, seqlen, head_dim); these are views.
    transposed = [
        [x.transpose(1, 2) for x in (q, *kv)] for q, kv in zip(queries, caches, strict=True)
    ]
    for name, backend in BACKENDS[device.type].items():
        call = partial(sdpa, causal=False, backend=backend)
        candidates[name] = [partial(call, *qkv) for qkv in transposed]
    source = torch.ones(COPY_BYTES[device.type] // 4, dtype=torch.int32, device=device)
    # Not copy_, which may go by way of a copy engine.
    candidates[COPY] = [partial(torch.neg, source, out=torch.empty_like(source))]

    clocks = results.read_clocks(device)
    timings = timing.measure(candidates, device, rounds)
    measured = clocks()
    peer = min(BACKENDS[device.type], key=lambda name: timings[name].p50_us)
    moved = dict.fromkeys(candidates, cache_bytes)
    moved |= {INT8: int8_bytes, COPY: 2 * source.nbytes}
    name = str(dtype).removeprefix("torch.")
    print(f"{results.shape_text(sizes)} {name} ({tag})")
    for implementation, t in timings.items():
        rate, ratio = 1e-3 * moved[implementation] / t.p50_us, timings[peer].p50_us / t.p50_us
        print(f"  {implementation:18} {t.p50_us:11.2f} us {rate:9.1f} GB/s {ratio:7.3f}")
        ratios = {}
        if implementation == INT8:
            ratios["fastq"] = round(timings["fastq"].p50_us / t.p50_us, 4)
        writer.write(
            op="flash_decode",
            tag=tag,
            shape=sizes,
            dtype=name,
            implementation=implementation,
            config=None,
            **t._asdict(),
            copies=len(candidates[implementation]),
            rate=round(rate, 3),
            unit="GB/s",
            peer=peer,
            ratio=round(ratio, 4),
            ratios=ratios,
            clocks=measured,
        )


def main() -> None:
    parser = results.arguments("flash_decode")
    results.add_shapes(parser, "flash_decode")
    options = parser.parse_args()
    writer = results.writer(options, "flash_decode")
    for sizes, tag in results.shapes(options):
        for dtype in DTYPES[writer.device.type]:
            run(writer, sizes, tag, options.rounds, dtype)
    print(f"appended to {writer.path}")


if __name__ == "__main__":
    main()
