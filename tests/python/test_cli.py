"""The command `fastq`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import fastq
from fastq import cli
from fastq.demo import report, run


def fastq_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastq", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_help():
    result = fastq_command("--help")
    assert result.returncode == 0
    for text in ("usage: fastq", "demo", "doctor", "tune", "--version"):
        assert text in result.stdout


@pytest.mark.parametrize("command", ["demo", "doctor", "tune"])
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fastq {fastq.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--max-tokens", "0"], "expected at least 1, got 0"),
        (["demo", "--max-tokens", "many"], "invalid"),
        (["tune"], "one of the arguments --nk --shapes is required"),
        (["tune", "--nk", "4096"], "expected N x K as 4096x4096, got 4096"),
        (["tune", "--nk", "4096x0"], "expected at least 1, got 0"),
        (["tune", "--nk", "8x8", "--m", "1,"], "invalid"),
        (["tune", "--nk", "8x8", "--shapes", "a.json"], "not allowed with argument --nk"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_entry_point():
    scripts = [e for e in entry_points(group="console_scripts") if e.value == "fastq.cli:main"]
    if not scripts:
        pytest.skip("fastq runs from its source tree, not installed")
    assert scripts[0].name == "fastq"
    assert scripts[0].load() is cli.main


def test_doctor_prints_json():
    result = fastq_command("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.returncode == (1 if found["problems"] else 0)
    assert found["versions"]["fastq"] == fastq.__version__


def test_help_imports_no_runtime():
    program = (
        "import sys, fastq, fastq.cli; fastq.cli.build_parser(); "
        "print([m for m in ('transformers', 'tokenizers', 'rich', 'safetensors') "
        "if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def figures(**changed) -> dict:
    return {
        "precision": "bfloat16",
        "perplexity": 14.0,
        "weight_bytes": 13_900_000,
        "linear_weight_bytes": 11_800_000,
        "scored_tokens_per_second": 1000.0,
        "generated_tokens_per_second": 100.0,
        "sample": " of the\n    tree",
    } | changed


RESULT = {
    "fastq": "1.2.3",
    "python": "3.14.0",
    "torch": "2.13.0",
    "device": "cpu",
    "device_name": "x86_64",
    "threads": 2,
    "torch_threads": 1,
    "note": "fastq cannot use this machine's GPU",
    "card": {
        "parameters": 6_951_168,
        "python_version": "3.11.7",
        "held_out": ["csv", "heapq"],
        "unigram_perplexity": 864.6,
    },
    "held_out_tokens": 54921,
    "prompt": "def f",
    "max_tokens": 128,
    "results": [
        figures(),
        figures(precision="int8", perplexity=14.07, weight_bytes=8_200_000, sample=" of [bold]"),
    ],
    "int8_perplexity_change": 0.005,
    "seconds": 20.0,
}


def test_demo_shows_both_precisions(monkeypatch, capsys):
    calls = []

    def measured(*, device, max_tokens, on_start, on_progress):
        calls.append((device, max_tokens))
        on_start(10)
        on_progress("int8: perplexity", 10)
        return RESULT

    monkeypatch.setattr(report, "run_demo", measured)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["demo", "--device", "cpu", "--max-tokens", "7"]) == 0
    assert calls == [("cpu", 7)]
    out = capsys.readouterr().out
    for text in (
        *("bfloat16", "int8 (W8A8)", "14.000", "14.070", "1.005", "13.90", "8.20", "0.590"),
        *("Python 3.14.0", "Python 3.11.7", "csv, heapq", "+0.50 %", "unigram", "865"),
        *("threads: 2, torch's own 1", "tree", "of [bold]", "cannot use this machine's GPU"),
    ):
        assert text in out


def test_demo_prints_json_alone(monkeypatch, capsys):
    monkeypatch.setattr(report, "run_demo", lambda **_: RESULT)
    assert cli.main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT


def test_demo_without_its_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(run.run_demo.__kwdefaults__, "folder", tmp_path)
    assert cli.main(["demo", "--device", "cpu"]) == 1
    assert "fastq demo: " in capsys.readouterr().err
