"""Attention, beside torch's scaled_dot_product_attention (on a GPU each of its fast backends).

``python -m bench.flash_attention --device cpu`` (or ``cuda``) appends to
``bench/results/<device>/flash_attention.jsonl``. Inputs are drawn from N(0, 1); there are as many
queries as keys. The rate counts 4 * batch * heads * seqlen^2 * head_dim operations, half of them
with a causal mask. ``ratio`` is the time of torch's fastest over this implementation's.
``--families default,sm80`` times the kernels of Ampere and newer, too.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastq

from . import results, timing
from .kernel_families import DEFAULT, add_families, in_family, label

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
BACKENDS = {
    "cpu": {"torch SDPA": None},
    "cuda": {
        "torch SDPA (cuDNN)": SDPBackend.CUDNN_ATTENTION,
        "torch SDPA (flash)": SDPBackend.FLASH_ATTENTION,
    },
}


def sdpa(q, k, v, *, causal: bool, backend: SDPBackend | None) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def run(
    writer: results.Writer,
    sizes: dict,
    tag: str,
    rounds: int,
    dtype: torch.dtype,
    families: list[str],
) -> None:
    device = writer.device
    generator = torch.Generator(device=device).manual_seed(0)
    batch, seqlen, heads, heads_k, head_dim = (
        sizes[name] for name in ("batch", "seqlen", "heads", "heads_k", "head_dim")
    )
    causal = bool(sizes["causal"])

    def operands() -> list[torch.Tensor]:
        return [
            torch.randn(batch, seqlen, h, head_dim, generator=generator, device=device).to(dtype)
            for h in (heads, heads_k, heads_k)
        ]

    bytes_each = sum(t.nbytes for t in operands())
    inputs = [operands() for _ in range(timing.copies(bytes_each, device))]
    # torch's wants (batch, heads, seqlen, head_dim); these are views.
    transposed = [[t.transpose(1, 2) for t in qkv] for qkv in inputs]
    candidates = {}
    for family in families if device.type == "cuda" else [DEFAULT]:
        attention = in_family(family, fastq.flash_attention)
        candidates[label(family)] = [partial(attention, *qkv, causal=causal) for qkv in inputs]
    for name, backend in BACKENDS[device.type].items():
        call = partial(sdpa, causal=causal, backend=backend)
        candidates[name] = [partial(call, *qkv) for qkv in transposed]
    clocks = results.read_clocks(device)
    timings = timing.measure(candidates, device, rounds)
    measured = clocks()
    peer = min(BACKENDS[device.type], key=lambda name: timings[name].p50_us)
    operations = 4 * batch * heads * seqlen**2 * head_dim / (2 if causal else 1)
    name = str(dtype).removeprefix("torch.")
    print(f"{results.shape_text(sizes)} {name} ({tag})")
    for implementation, t in timings.items():
        rate = 1e-3 * operations / t.p50_us
        ratio = timings[peer].p50_us / t.p50_us
        print(f"  {implementation:18} {t.p50_us:11.2f} us {rate:9.1f} GFLOP/s {ratio:7.3f}")
        writer.write(
            op="flash_attention",
            tag=tag,
            shape=sizes,
            dtype=name,
            implementation=implementation,
            config=None,
            **t._asdict(),
            copies=len(inputs),
            rate=round(rate, 3),
            unit="GFLOP/s",
            peer=peer,
            ratio=round(ratio, 4),
            clocks=measured,
        )


def main() -> None:
    parser = results.arguments("flash_attention")
    results.add_shapes(parser, "flash_attention")
    add_families(parser)
    options = parser.parse_args()
    writer = results.writer(options, "flash_attention")
    for sizes, tag in results.shapes(options):
        for dtype in DTYPES[writer.device.type]:
            run(writer, sizes, tag, options.rounds, dtype, options.families)
    print(f"appended to {writer.path}")


if __name__ == "__main__":
    main()
