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
        "weight_bytes": 2e9 if system == "16 bit" else 1.04e9,
    }


def test_decode():
    lines = [
        step("llama-7b", 1, "16 bit", 5000, 1.0, 0.9),
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
        "Weights that a step reads, GB:",
        "",
        "| model | 16 bit | W8A8 |",
        "| --- | ---: | ---: |",
        "| llama-7b | 2.0 | 1.0 |",
        "",
    ]


def test_prefill():
    def prompt(batch: int, seqlen: int, system: str, ratio: float):
        shape = {"model": "opt-13b", "batch": batch, "seqlen": seqlen}
        return {"shape": shape, "implementation": system, "p50_us": 12345, "ratio": ratio}

    lines = [prompt(1, 128, "16 bit", 1.0), prompt(1, 128, "w8a8", 1.1)]
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
