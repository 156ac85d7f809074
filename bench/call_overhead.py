"""The host's time for one call of an op on a tiny problem, beside ``torch.mm``.

``python -m bench.call_overhead --device cuda`` appends to
``bench/results/<device>/call_overhead.jsonl``. On a GPU nothing is awaited inside a batch of calls,
and the queue is emptied between batches, so that the figure is the time to enqueue.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

import fastq

from . import results, timing

M, N, K = 8, 16, 16
CALLS = 200  # fewer than the launches that a CUDA stream takes before it makes the host wait
BATCHES_A_ROUND = 20


def candidates(device: torch.device) -> dict[str, tuple[str, Callable[[], object]]]:
    """Name -> (dtype, call)."""
    x, w = torch.randn(M, K, device=device), torch.randn(N, K, device=device)
    q, s = fastq.quantize_per_token(x)
    qw, sw = fastq.quantize_per_channel(w)
    out = torch.empty(M, N, dtype=torch.bfloat16, device=device)
    b = qw.t()
    calls: dict[str, tuple[str, Callable[[], object]]] = {
        "fastq.int8_gemm[out]": (
            "int8 -> bfloat16",
            partial(fastq.int8_gemm, q, b, s, sw, out=out),
        ),
        "fastq.int8_gemm": ("int8 -> bfloat16", partial(fastq.int8_gemm, q, b, s, sw)),
        "fastq.quantize_per_token": ("float32 -> int8", partial(fastq.quantize_per_token, x)),
        "fastq.dequantize[out]": ("int8 -> bfloat16", partial(fastq.dequantize, q, s, out=out)),
        "torch.mm[float32, out]": ("float32", partial(torch.mm, x, w.t(), out=out.float())),
        "torch.mm[bfloat16, out]": (
            "bfloat16",
            partial(torch.mm, x.bfloat16(), w.t().bfloat16(), out=out),
        ),
    }
    if device.type == "cpu":
        packed = fastq.pack_weight(b)
        call = partial(fastq.int8_gemm, q, packed, s, sw, out=out)
        calls["fastq.int8_gemm[packed, out]"] = ("int8 -> bfloat16", call)
    return calls


def measure(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int):
    """Microseconds a call: quantiles over batches of calls, the candidates in turns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(BATCHES_A_ROUND):
                wait()
                begin = time.perf_counter()
                for _ in range(CALLS):
                    call()
                samples[name].append(1e6 * (time.perf_counter() - begin) / CALLS)
    wait()
    return {name: timing.quantiles(values, "perf_counter") for name, values in samples.items()}


def main() -> None:
    parser = results.arguments("call_overhead")
    options = parser.parse_args()
    writer = results.writer(options, "call_overhead")
    cases = candidates(writer.device)
    calls = {name: call for name, (_, call) in cases.items()}
    with torch.inference_mode():
        timings = measure(calls, writer.device, options.rounds)
    peer = "torch.mm[float32, out]"
    for name, t in timings.items():
        ratio = timings[peer].p50_us / t.p50_us
        print(f"{name:30} p10 {t.p10_us:7.2f}  p50 {t.p50_us:7.2f}  p90 {t.p90_us:7.2f} us a call")
        writer.write(
            op="call_overhead",
            tag="bar" if name == "fastq.int8_gemm[out]" else "",
            shape={"M": M, "N": N, "K": K},
            dtype=cases[name][0],
            implementation=name,
            config=None,
            **t._replace(timer=f"{t.timer}, batches of {CALLS} calls")._asdict(),
            rate=round(1 / t.p50_us, 4),
            unit="million calls/s",
            peer=peer,
            ratio=round(ratio, 4),
            clocks=results.clocks(writer.device),
        )
    print(f"appended to {writer.path}")


if __name__ == "__main__":
    main()
