"""The README's figure, from results made up for it."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from conftest import REPOSITORY

pytest.importorskip("matplotlib", reason="matplotlib draws the figure")
sys.path.insert(0, str(REPOSITORY))
from bench import plot


def line(op: str, shape: dict, implementation: str, ratio: float | None, **fields) -> dict:
    common = {"op": op, "shape": shape, "dtype": "float16", "implementation": implementation}
    return common | {"device": "NVIDIA H200", "p50_us": 10.0, "ratio": ratio, "rate": 1} | fields


def write(folder, op: str, lines: list[dict]) -> None:
    text = "".join(json.dumps(each) + "\n" for each in lines)
    (folder / f"{op}.jsonl").write_text(text, encoding="utf-8")


def gemm(M: int, N: int, ratio: float) -> dict:
    shape = {"M": M, "N": N, "K": 64}
    return line("int8_gemm", shape, "fastq", ratio, ratios={"bf16": ratio})


def decode(model: str, batch: int, context: int, system: str, ratio: float | None) -> dict:
    shape = {"model": model, "batch": batch, "context": context}
    return line("decode", shape, system, ratio, rate=1234.5 * (ratio or 1))


@pytest.fixture
def results(tmp_path):
    write(
        tmp_path,
        "int8_gemm",
        [
            gemm(1, 8, 9.0),  # measured again below: the newest counts
            gemm(1, 8, 1.0),
            gemm(1, 16, 4.0),
            gemm(32, 8, 3.0),
            line("int8_gemm", {"M": 1, "N": 8, "K": 64}, "torch.mm[bfloat16]", 0.5, ratios={}),
        ],
    )
    shape = {"model": "opt-6.7b", "batch": 2, "seqlen": 2048}
    lines = [line("prefill", shape, "w8a8", 1.5), line("prefill", shape, "16bit", 1.0)]
    write(tmp_path, "prefill", lines)
    skipped = decode("opt-13b", 1, 512, "llm_int8", None)
    del skipped["p50_us"]
    write(
        tmp_path,
        "decode",
        [
            *(decode("opt-6.7b", b, c, "w8a8", 1.6) for b in (1, 16) for c in (512, 1024)),
            decode("opt-6.7b", 1, 512, "transformers", 0.1),
            decode("opt-13b", 1, 512, "w8a8", None),  # nothing in 16 bits to compare with
            skipped | {"skipped": "the model does not fit the device's memory"},
        ],
    )
    return tmp_path


def test_what_is_drawn(results):
    product, prompts, *decoding = plot.panels_of(results)
    (curve,) = product.content
    assert curve.points == {1: [1.0, 4.0], 32: [3.0]}
    assert plot.mean(curve.points[1]) == pytest.approx(2)
    assert "2 weights" in curve.name
    assert prompts.content == [plot.Curve("opt-6.7b", {4096: [1.5]})]
    assert [panel.title for panel in decoding] == [
        "Decoding, batch 1, 512 tokens",
        "Decoding, batch 16, 512 tokens",
    ]
    assert decoding[0].content.groups == {
        "opt-6.7b": {"w8a8": (1.6, "1,975"), "transformers": (0.1, "123")}
    }


def test_no_empty_axes(results):
    (results / "int8_gemm.jsonl").unlink()
    figure = plot.draw(plot.panels_of(results), "three panels")
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes if axes.axison]
    assert len(titles) == 3
    assert all(titles)


@pytest.mark.parametrize("ops", [("int8_gemm",), ("int8_gemm", "prefill", "decode"), ("decode",)])
def test_file(results, tmp_path, monkeypatch, ops):
    for op in {"int8_gemm", "prefill", "decode"} - set(ops):
        (results / f"{op}.jsonl").unlink()
    written = []
    for name in ("a.svg", "b.svg"):
        arguments = ["bench.plot", "--results", str(results), "--output", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", arguments)
        plot.main()
        written.append((tmp_path / name).read_text(encoding="utf-8"))
    assert written[0] == written[1]  # no date, no chance
    root = ElementTree.fromstring(written[0])
    texts = " ".join(text for text in root.itertext() if text.strip())
    assert "NVIDIA H200" in texts
    for op, title in (
        ("int8_gemm", "INT8 product"),
        ("prefill", "Reading prompts"),
        ("decode", "Decoding, batch 16"),
    ):
        assert (title in texts) == (op in ops)


def test_no_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.plot", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        plot.main()
    assert "holds no results" in capsys.readouterr().err


def test_the_readme_shows_it():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (path,) = re.findall(r"!\[[^]]+\]\((.+?)\)", text)
    assert path == f"bench/results/{plot.DEVICE}/speed.svg"
    assert (REPOSITORY / path).is_file()
