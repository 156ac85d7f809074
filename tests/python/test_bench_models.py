"""The benchmarks of whole models, end to end on a tiny one."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from conftest import REPOSITORY
from fastq.evaluation.speed import weight_bytes
from fastq.runtime import cache_bytes

sys.path.insert(0, str(REPOSITORY))

from bench import decode, decode_explain, models_summary, prefill
from bench.decode_peers import BITSANDBYTES, COMPILED, EAGER
from bench.decoders import CONFIGS, SCHEMES, bytes_read, random_decoder

CPU = torch.device("cpu")
HALF = {"dtype": torch.bfloat16}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_decoders(scheme):
    model = random_decoder(CONFIGS["tiny"], scheme, CPU)
    logits = model(torch.randint(101, (2, 5)))
    assert logits.shape == (2, 5, 101)
    assert bool(logits.isfinite().all())
    assert logits.std() > 0.01
    assert (model._fused is not None) == (scheme is not None)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("opt-1.3b", 1.316),
        ("opt-6.7b", 6.66),
        ("opt-13b", 12.85),
        ("opt-30b", 29.97),
        ("llama-7b", 6.74),
        ("llama-13b", 13.02),
    ],
)
def test_shapes_of_the_known_models(name, billions):
    with torch.device("meta"):
        model = decode.CausalLM(CONFIGS[name])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(1e9 * billions, rel=2e-3)


def test_bytes_of_a_step():
    model = random_decoder(CONFIGS["tiny"], None, CPU)
    table = 101 * 64 * 2
    assert bytes_read(model, decode.unread(model)) == weight_bytes(model) - table


def test_decode(tmp_path, capsys):
    out = tmp_path / "decode.jsonl"
    arguments = ["--models", "tiny", "--batches", "1", "3", "--contexts", "20", "--rounds", "3"]
    systems = ["w8a8+kv8", "w8a8", "16bit", "llm_int8", EAGER, COMPILED, BITSANDBYTES]
    decode.main([*arguments, "--out", str(out), "--systems", *systems, "--explain"])
    results = lines(out)
    assert len(results) == 2 * len(systems)
    timed = [line for line in results if "skipped" not in line]
    assert {line["implementation"] for line in timed} >= {*systems[:4]}
    for line in timed:
        assert line["shape"]["model"] == "tiny"
        assert line["p10_us"] <= line["p50_us"] <= line["p90_us"]
        assert line["ratio"] > 0
        assert line["weight_bytes"] > 0
        assert (line["allocated_ratio"] < 1) == (systems.index(line["implementation"]) in (0, 1, 3))
        batch, is_int8 = line["shape"]["batch"], line["implementation"].endswith("+kv8")
        kv = "int8" if is_int8 else None
        expected = cache_bytes(CONFIGS["tiny"], batch, 20, kv_cache=kv, **HALF)
        assert line["cache_bytes"] == expected
    reasons = {line["implementation"]: line["skipped"] for line in results if "skipped" in line}
    assert reasons[COMPILED] == "it is timed on a GPU only, not on cpu"
    assert BITSANDBYTES in reasons
    ops = lines(tmp_path / "decode_ops.jsonl")
    quantised = [line for line in ops if line["implementation"] == "w8a8"]
    products = [line["calls"] for line in quantised if line["tag"] == "fastq::int8_gemm"]
    assert sum(products) == 2 * 2 * 4  # batches, layers, products
    assert sum(line["share"] for line in quantised) == pytest.approx(2, abs=1e-2)
    assert "fastq::flash_decode" in capsys.readouterr().out
    rows = models_summary.ops_table(quantised, at_least=0)
    assert len(rows) == len(quantised) + 3
    assert any("`fastq::flash_decode` 3 × 26 × 4 × 16" in row for row in rows)
    assert models_summary.read_ops(tmp_path) == ops
    assert len({(line["time"], line["shape"]["batch"]) for line in quantised}) == 2  # runs
    older = {**quantised[0], "tag": "kv_append", "time": "2020-01-01T00:00:00Z"}
    other = {**quantised[0], "tag": "with the same inputs"}
    both = models_summary.ops_table([older, *quantised, other], at_least=0)
    assert len(both) == len(rows) + 1
    assert any("`with the same inputs`" in row for row in both)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void fastq::cuda::(anonymous namespace)::combine<__half, 8>(Params)", "combine"),
        ("void fastq::cuda::quantize_rows<fastq::cuda::Traits<float> >(Params)", "quantize_rows"),
        ("nvjet_sm90_hsh_256x8_64x6_2x1_v_bz_TNT", "nvjet_sm90_hsh_256x8_64x6_2x1_v_bz_TNT"),
        ("(anonymous)", "(anonymous)"),
    ],
)
def test_short_names_of_kernels(kernel, name):
    assert decode_explain.short(kernel) == name


def test_prefill(tmp_path):
    out = tmp_path / "prefill.jsonl"
    systems = ["--systems", "16bit", "w8a8"]
    arguments = ["--models", "tiny", "--tokens", "16", "--rounds", "2", "--out", str(out)]
    prefill.main([*arguments, *systems])
    float_line, int8_line = lines(out)
    assert [float_line["implementation"], int8_line["implementation"]] == systems[1:]
    assert float_line["shape"] == {"model": "tiny", "batch": 1, "seqlen": 16}
    assert float_line["ratio"] == 1
    ratio = float_line["p50_us"] / int8_line["p50_us"]
    assert int8_line["ratio"] == pytest.approx(ratio, abs=1e-3)
    assert int8_line["config"]["fused"]


def step(system: str, p50_us: float, **fields) -> dict:
    shape = {"model": "llama-7b", "batch": 1, "context": 512}
    line = {"op": "decode", "shape": shape, "implementation": system, "p50_us": p50_us}
    return line | {"of_limit": 0.7, "allocated_ratio": 0.52, "peak_bytes": 8e9} | fields


def test_summary():
    lines = [
        step("16bit", 4000.0),
        step("w8a8", 2000.0),
        step("llm_int8", 3000.0),
        step(EAGER, 29000.0),
        step(BITSANDBYTES, 90000.0),
    ]
    del (skipped := step(COMPILED, 0.0))["p50_us"]
    bars = {bar.name.split(": ")[1]: bar for bar in models_summary.decode_bars([*lines, skipped])}
    assert {name: bar.passes for name, bar in bars.items()} == {
        "w8a8 against 16bit": True,
        "w8a8, part of the limit": True,
        "w8a8 against transformers": False,
        "llm_int8 against bitsandbytes": True,
        "w8a8, memory of the weights": True,
    }
    assert bars["w8a8 against transformers"].value == pytest.approx(14.5)
    head, _, row, _ = models_summary.decode_table([*lines, skipped])
    assert "compiled" not in head
    assert row.startswith("| llama-7b, 1, 512 | 4.00 | 2.00 | 2.00 | 70% | 3.00 | 29.00 |")


def test_a_prompt_is_read_anew():
    model = random_decoder(CONFIGS["tiny"], "w8a8", CPU)
    ids = torch.randint(101, (2, 7))
    cache = model.new_cache(2, 7)
    first = prefill.read(model, cache, ids)
    assert torch.equal(prefill.read(model, cache, ids), first)


def test_a_step_is_rewound():
    model = random_decoder(CONFIGS["tiny"], "w8a8", CPU)
    stepper = decode.OurStep(model, batch=2, context=9, room=3)
    first = stepper.step().clone()
    stepper.step()
    stepper.rewind()
    assert torch.equal(stepper.step(), first)
    assert stepper._cache.seqlens.tolist() == [10, 10]
