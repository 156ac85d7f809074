"""The README's tables, from results made up for them."""

from __future__ import annotations

import json
import sys

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY))
from bench import model_tables, quality_table, readme_table


def step(model: str, batch: int, system: str, us: float, ratio: float | None, of_limit: float):
    shape = {"model": model, "batch": batch, "context": 512}
    return {
        "op": "decode",
        "shape": shape,
        "implementation": system,
        "p50_us": us,
        "ratio": ratio,
        "of_limit": of_limit,
        "allocated_bytes": 2e9 if system == "16bit" else 1.04e9,
        "allocated_ratio": 0.52,
    }


def test_decode():
    lines = [
        step("llama-7b", 1, "16bit", 5000, 1.0, 0.9),
        step("llama-7b", 1, "w8a8+kv8", 2500, 2.0, 0.825),
        step("llama-7b", 16, "w8a8+kv8", 4000, None, 0.8),
        {"op": "decode", "shape": {}, "implementation": "llm_int8", "skipped": "no memory"},
    ]
    assert model_tables.decode_tables(lines) == [
        "A step of decoding, ms (and × 16 bit of this runtime, % of the bandwidth limit):",
        "",
        "| model | batch × tokens | 16 bit | W8A8, INT8 cache |",
        "| --- | ---: | ---: | ---: |",
        "| llama-7b | 1 × 512 | 5.00 (90 %) | 2.50 (2.00 ×, 82 %) |",
        "| llama-7b | 16 × 512 |  | 4.00 (80 %) |",
        "",
        "Memory that the models take, GB (and × 16 bit):",
        "",
        "| model | 16 bit | W8A8 |",
        "| --- | ---: | ---: |",
        "| llama-7b | 2.00 | 1.04 (0.520 ×) |",
        "",
    ]


def test_where_a_step_goes():
    def op(name: str, model: str, time: str, step_us: float, share: float):
        return {
            "time": time,
            "tag": name,
            "shape": {"model": model, "batch": 1, "context": 512, "inputs": ""},
            "implementation": "w8a8",
            "config": {"kernels": [f"{name}_kernel"], "kernels_a_call": 1},
            "calls": 32,
            "us_a_call": 100 * share,
            "limit_us_a_call": 50 * share,
            "us_a_step": 3200 * share,
            "share": share,
            "step_us": step_us,
            "kernels_a_step": 260,
            "kernels_a_layer": 8,
        }

    lines = [
        op("gone", "llama-7b", "2026-01-01", 7000, 0.9),
        op("small", "llama-7b", "2026-01-02", 6000, 0.004),
        op("norm", "llama-7b", "2026-01-02", 6000, 0.25),
        op("gemm", "llama-7b", "2026-01-02", 6000, 0.75),
        op("other", "opt-13b", "2026-01-03", 9000, 1.0),
    ]
    head, _, *rows = model_tables.ops_table(lines)
    assert head == (
        "Where a step of llama-7b in W8A8 goes, batch 1, 512 tokens (260 kernels, 8 a layer; "
        "6,000 µs a step as a graph):"
    )
    assert rows[2:] == [
        "| `gemm` | `gemm_kernel` | 32 | 75.00 | 37.50 | 2,400.0 | 75.0 % |",
        "| `norm` | `norm_kernel` | 32 | 25.00 | 12.50 | 800.0 | 25.0 % |",
        "",
    ]


def test_prefill():
    def prompt(batch: int, seqlen: int, system: str, ratio: float):
        shape = {"model": "opt-13b", "batch": batch, "seqlen": seqlen}
        return {"shape": shape, "implementation": system, "p50_us": 12345, "ratio": ratio}

    lines = [prompt(1, 128, "16bit", 1.0), prompt(1, 128, "w8a8", 1.1)]
    lines += [prompt(4, 2048, "w8a8", 1.75), prompt(1, 128, "w8a8[eager]", 0.5)]
    assert model_tables.prefill_table(lines)[2:] == [
        "| model | scheme | 128 | 8,192 |",
        "| --- | ---: | ---: | ---: |",
        "| opt-13b | W8A8 | 12.3 (1.10 ×) | 12.3 (1.75 ×) |",
        "",
    ]


def test_quality(tmp_path):
    assert quality_table.section(tmp_path) == []
    run = {"dtype": "float32", "device": "AMD EPYC", "torch": "2.13.0", "dirty": True}
    run |= {"time": "2026-11-23T10:00:00Z", "commit": "0123456789", "tokens": 1000, "sentences": 9}
    own = {"name": "float", "scheme": None, "kv_cache": None, "weight_bytes": 2e6}
    int8 = {"name": "W8A8", "scheme": "w8a8", "kv_cache": None, "weight_bytes": 1e6}
    for name, worse in (("quality", 0.01), ("quality_planted_outliers", 0.5)):
        rows = [own | {"perplexity": 10, "change": 0}]
        rows += [int8 | {"perplexity": 10 * (1 + worse), "change": worse}]
        (tmp_path / f"{name}.json").write_text(json.dumps(run | {"rows": rows}))
    cosines = {"cosine": 0.98765, "min_cosine": 0.9, "same_neighbour": 0.955}
    rows = [int8 | cosines]
    (tmp_path / "quality_minilm.json").write_text(json.dumps(run | {"rows": rows}))
    where = "(float32 on AMD EPYC, torch 2.13.0, 2026-11-23, commit 0123456, changed)"
    assert quality_table.section(tmp_path) == [
        f"The demo's model, perplexity on 1,000 tokens {where}:",
        "",
        "| scheme | perplexity | change | with outliers | change | weights (MB) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| float | 10.000 |  | 10.000 |  | 2.0 |",
        "| W8A8 | 10.100 | +1.00 % | 15.000 | +50.00 % | 1.0 |",
        "",
        f"MiniLM's encoder, embeddings of 9 sentences {where}:",
        "",
        "| scheme | mean cosine | least | same nearest | weights (MB) |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| W8A8 | 0.9877 | 0.9000 | 95.5 % | 1.0 |",
        "",
    ]


def test_replacing_leaves_the_rest():
    text = "before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n"
    new = "before\n<!-- a:begin -->\nnew\n\n<!-- a:end -->\nafter\n"
    assert readme_table.replace(text, "a", ["new", ""]) == new
    assert readme_table.replace(new, "a", ["new", ""]) == new
