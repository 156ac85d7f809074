"""Reading prompts: whole models in known shapes, W8A8 beside 16 bits, both in this runtime.

``python -m bench.prefill --device cuda --models llama-7b`` appends to
``bench/results/<device>/prefill.jsonl``. A call reads `batch` prompts of `seqlen` tokens into an
empty cache and computes the logits after the last token of each; `batch` x `seqlen` are the tokens
of ``--tokens``, in prompts of at most 2048. Weights are random. Where both models are in memory
together, as they are unless ``--apart`` is given, they take turns. On a GPU a call is timed in a
CUDA graph and, under the name ``<system>[eager]``, as `generate` runs it, launch by launch: there
the host may be what takes longer. ``ratio`` is the time of ``16bit``, timed the same way, over
this system's; the rate counts two operations a weight and token, those of attention not among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastq.runtime import CausalLM, KVCache

from . import results, timing
from .decode import FLOAT, OURS, add_models, free
from .decoders import CONFIGS, DTYPES, random_decoder

SYSTEMS = (FLOAT, "w8a8", "w8a8_static", "llm_int8")
LONGEST = 2048
MODELS = ("opt-6.7b", "opt-13b", "opt-30b", "llama-7b", "llama-13b")
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)


@torch.no_grad()
def read(model: CausalLM, cache: KVCache, ids: Tensor) -> Tensor:
    """The logits after prompts that go into the cache from its start."""
    cache.length = 0
    cache._committed.zero_()
    return model(ids, cache, last_only=True)


def layer_weights(model: CausalLM) -> int:
    """Elements of the layers' linear weights."""
    c = model.config
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    mlp = (3 if c.mlp_gated else 2) * c.intermediate_size
    return c.num_hidden_layers * c.hidden_size * (heads * c.head_dim + mlp)


class Benchmark:
    def __init__(self, writer: results.Writer, rounds: int) -> None:
        self.writer, self.rounds = writer, rounds
        self.float_us: dict[tuple, float] = {}

    def run(self, name: str, models: dict[str, CausalLM], tokens: int) -> None:
        """Times the models, which take turns, at so many tokens."""
        device = self.writer.device
        seqlen = min(tokens, LONGEST)
        batch = tokens // seqlen
        free()
        ids = torch.randint(CONFIGS[name].vocab_size, (batch, seqlen), device=device)
        calls: dict[str, timing.Calls] = {}
        for system, model in models.items():
            call = partial(read, model, model.new_cache(batch, seqlen), ids)
            calls[system] = [call]
            if device.type == "cuda":
                calls[f"{system}[eager]"] = [call]
        eager = [system for system in calls if system.endswith("[eager]")]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        clocks = results.read_clocks(device)
        timings = timing.measure(calls, device, self.rounds, eager)
        measured = clocks()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        print(f"{name}, {batch} x {seqlen} tokens")
        for system, t in timings.items():
            self._write(name, (batch, seqlen), system, t, models, measured, peak)

    def _write(
        self,
        name: str,
        sizes: tuple[int, int],
        system: str,
        t: timing.Timing,
        models: dict[str, CausalLM],
        clocks: results.Clocks,
        peak: int | None,
    ) -> None:
        suffix = "[eager]" if system.endswith("[eager]") else ""
        own = system.removesuffix(suffix)
        if own == FLOAT:
            self.float_us[name, sizes, suffix] = t.p50_us
        baseline = self.float_us.get((name, sizes, suffix))
        ratio = None if baseline is None else round(baseline / t.p50_us, 4)
        tokens = sizes[0] * sizes[1]
        rate = 2e-6 * tokens * layer_weights(models[own]) / t.p50_us
        shown = "" if ratio is None else f"{ratio:7.3f} x"
        print(f"  {system:22} {t.p50_us:11.1f} us {rate:8.1f} TOP/s {shown}")
        self.writer.write(
            op="prefill",
            tag="",
            shape={"model": name, "batch": sizes[0], "seqlen": sizes[1]},
            dtype=str(DTYPES[self.writer.device.type]).removeprefix("torch."),
            implementation=system,
            config={"fused": models[own]._fused is not None, "models_in_memory": len(models)},
            **t._asdict(),
            copies=1,
            rate=round(rate, 3),
            unit="TOP/s",
            peer=FLOAT + suffix,
            ratio=ratio,
            tokens_per_second=round(1e6 * tokens / t.p50_us, 1),
            peak_bytes=peak,
            clocks=clocks,
        )


def run_model(benchmark: Benchmark, name: str, options: argparse.Namespace) -> None:
    device = benchmark.writer.device
    systems = sorted(options.systems, key=SYSTEMS.index)
    for group in [[system] for system in systems] if options.apart else [systems]:
        free()
        models = {
            system: random_decoder(CONFIGS[name], OURS[system][0], device) for system in group
        }
        for tokens in options.tokens:
            try:
                benchmark.run(name, models, tokens)
            except torch.OutOfMemoryError as error:
                print(f"{name}, {tokens} tokens: out of memory: {str(error)[:200]}")
        del models


def main(arguments: Sequence[str] | None = None) -> None:
    parser = results.arguments("prefill")
    add_models(parser, MODELS)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=[FLOAT, "w8a8"], metavar="SYSTEM"
    )
    parser.add_argument("--apart", action="store_true", help="one model in memory at a time")
    options = parser.parse_args(arguments)
    benchmark = Benchmark(results.writer(options, "prefill"), options.rounds)
    for name in options.models:
        run_model(benchmark, name, options)
    print(f"appended to {benchmark.writer.path}")


if __name__ == "__main__":
    main()
