"""The README's tables, from results made up for them."""

from __future__ import annotations

import json
import sys

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY))
from bench import quality_table, readme_table


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
