"""The command `fastq`, as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from safetensors.torch import save_file

import fastq
from fastq import cli, quantization
from fastq.checkpoints import save
from fastq.commands import models, quantize
from fastq.demo import report, run
from fastq.evaluation import perplexity
from fastq.evaluation.table import ROWS
from fastq.nn import Int8Linear, OutlierLinear
from fastq.provenance import provenance
from fastq.runtime import CausalLM, ModelConfig, Tokenizer, generate, load_model

SHIPPED = pytest.mark.skipif(
    not (run.MODEL_FOLDER / "model.safetensors").is_file(),
    reason="the demo's model is not in this checkout",
)


COMMANDS = ("quantize", "generate", "eval", "bench", "demo", "doctor", "tune")


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
    for text in ("usage: fastq", *COMMANDS, "--version"):
        assert text in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
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
        (["quantize", "demo"], "the following arguments are required: OUT"),
        (["quantize", "demo", "x", "--scheme", "int3"], "invalid choice: 'int3'"),
        (["quantize", "demo", "x", "--alpha", "2"], "expected a number from 0 to 1, or search"),
        (["quantize", "demo", "x", "--override", "a=b"], "expected PATTERN=SCHEME"),
        (["quantize", "demo", "x", "--keep-worst", "-1"], "expected at least 0, got -1"),
        (["quantize", "demo", "x", "--percentile", "99"], "expected a scheme with static scales"),
        (["generate", "demo"], "one of the arguments --prompt --prompt-file is required"),
        (["generate", "demo", "--prompt", "a", "--logprobs"], "--logprobs: expected --json too"),
        (["eval", "--plant-outliers"], "--plant-outliers: expected --table too"),
        (["eval", "--table", "--kv-cache", "int8"], "not allowed with --table"),
        (["eval", "--context", "8", "--stride", "9"], "expected at most the context, 8"),
        (["bench", "--batch", "0"], "expected at least 1, got 0"),
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

    def measured(*, device, max_tokens, on_progress):
        calls.append((device, max_tokens))
        on_progress("int8: perplexity", 10, 10)
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


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("wrong"), 1, "fastq bench: wrong\n"),
        (NotImplementedError("absent"), 1, "fastq bench: absent\n"),
        (OSError("unreadable"), 1, "fastq bench: unreadable\n"),
        (KeyboardInterrupt(), 130, "fastq bench: interrupted\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(models, "load", fail)
    assert cli.main(["bench"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == message


def test_a_reader_that_goes_away():
    """As `fastq generate ... | head` ends: no traceback."""
    program = f"{sys.executable} -m fastq generate demo --prompt a --max-tokens 40 | head -c 1"
    result = subprocess.run(program, shell=True, capture_output=True, text=True, timeout=300)
    assert result.stdout == "a"
    assert result.stderr == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights, with the shipped one's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = json.loads((run.MODEL_FOLDER / "config.json").read_text())
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps(config | sizes | {"dtype": "float32"}))
    shutil.copy(run.MODEL_FOLDER / "tokenizer.json", folder)
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_file(folder / "config.json"))
    state = {name: 0.3 * torch.randn_like(p) for name, p in model.named_parameters()}
    save_file(state, folder / "model.safetensors")
    return folder


@SHIPPED
class TestCommands:
    def json_of(self, capsys, *arguments) -> dict:
        assert cli.main([*map(str, arguments), "--device", "cpu", "--json"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""  # no progress bar where there is no terminal
        return json.loads(captured.out)

    @pytest.mark.parametrize(
        ("arguments", "layers"),
        [
            ((), 14),
            (("--scheme", "llm_int8", "--threshold", "4"), 14),
            (("--scheme", "smoothquant_o3", "--alpha", "search"), 14),
            (("--override", "down_proj=float", "--override", "layers.1.mlp.*=w8a8_tensor"), 13),
            (("--skip", "lm_head", "--skip", "layers.0", "--keep-worst", "2"), 5),
        ],
        ids=str,
    )
    def test_quantize(self, folder, tmp_path, capsys, arguments, layers):
        text = tmp_path / "text.txt"
        text.write_text("import os\n\n\ndef name(path):\n    return os.path.split(path)\n" * 9)
        calibration = ("--calibration", text, "--samples", 3, "--length", 32)
        out = tmp_path / "out"
        result = self.json_of(capsys, "quantize", folder, out, *arguments, *calibration)
        assert result["quantized_layers"] == layers
        model = load_model(out)
        kinds = [m for m in model.modules() if isinstance(m, (Int8Linear, OutlierLinear))]
        assert len(kinds) == layers
        assert result["weight_bytes"] < result["weight_bytes_before"]
        parameters = sum(p.numel() for p in load_model(folder).parameters())
        assert result["weight_bytes_before"] == 4 * parameters
        scored = self.json_of(capsys, "eval", out, "--text", text, "--dtype", "float32")
        own = self.json_of(capsys, "eval", folder, "--text", text)
        assert scored["perplexity"] == pytest.approx(own["perplexity"], rel=0.1)
        assert scored["perplexity"] != own["perplexity"]

    def test_quantize_leaves_no_half(self, folder, tmp_path, capsys, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(save, "write_shards", interrupted)
        assert cli.main(["quantize", str(folder), str(tmp_path / "out"), "--device", "cpu"]) == 130
        assert list(tmp_path.iterdir()) == []

    def test_schemes_are_those_of_fastq_quantize(self):
        assert quantize.SCHEMES == quantization.SCHEMES

    def test_generate_streams(self, capsys):
        arguments = ["generate", "demo", "--device", "cpu", "--dtype", "float32"]
        arguments += ["--max-tokens", "8", "--prompt", "import os"]
        assert cli.main(arguments) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.startswith("import os")
        model, tokenizer = (
            load_model(run.MODEL_FOLDER, dtype=torch.float32),
            Tokenizer(run.MODEL_FOLDER),
        )
        (expected,) = generate(
            model, tokenizer.encode("import os"), max_new_tokens=8, tokenizer=tokenizer
        )
        assert captured.out == f"import os{expected.text}\n"

    def test_generate_json(self, folder, tmp_path, capsys):
        file = tmp_path / "prompt.txt"
        file.write_text("def f(x, yyy):")
        arguments = ("--max-tokens", 6, "--temperature", 1, "--top-k", 50, "--seed", 3)
        arguments += ("--ignore-eos", "--logprobs", "--repetition-penalty", 1.1)
        both = ("--prompt", "a", "--prompt", "def f(x, yyy):")
        result = self.json_of(capsys, "generate", folder, *both, *arguments)
        assert result["model"] == str(folder)
        tokenizer = Tokenizer(folder)
        for found, prompt in zip(result["results"], both[1::2], strict=True):
            assert found["prompt"] == prompt
            assert found["prompt_tokens"] == len(tokenizer.encode(prompt))
            assert len(found["ids"]) == len(found["logprobs"]) == 6
            assert found["finish_reason"] == "length"
            assert max(found["logprobs"]) < 0
        alone = self.json_of(capsys, "generate", folder, "--prompt-file", file, *arguments)
        assert alone["results"][0]["prompt"] == "def f(x, yyy):"

    def test_generate_to_the_last_position(self, folder, capsys):
        result = self.json_of(
            capsys, "generate", folder, "--prompt", "a b", "--max-tokens", 9999, "--ignore-eos"
        )
        (found,) = result["results"]
        assert len(found["ids"]) + found["prompt_tokens"] == 512

    def test_generate_batch_as_text(self, folder, capsys):
        arguments = ["generate", str(folder), "--device", "cpu", "--max-tokens", "3"]
        assert cli.main([*arguments, "--prompt", "first", "--prompt", "second one"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("first")
        assert "\nsecond one" in out

    def test_eval(self, folder, tmp_path, capsys):
        text = tmp_path / "text.txt"
        text.write_text("def name(path):\n    return path\n" * 20)
        arguments = ("eval", folder, "--text", text, "--context", 24, "--stride", 10)
        result = self.json_of(capsys, *arguments)
        tokens = torch.tensor(Tokenizer(folder).encode(text.read_text()))
        assert result["tokens"] == len(tokens) - 1
        assert (result["context"], result["stride"]) == (24, 10)
        expected = perplexity(load_model(folder), tokens, context=24, stride=10)
        assert result["perplexity"] == pytest.approx(expected, rel=1e-6)
        first = self.json_of(capsys, *arguments, "--max-tokens", 30, "--kv-cache", "int8")
        assert first["tokens"] == 30
        assert first["kv_cache"] == "int8"

    def test_eval_prints_a_line(self, folder, tmp_path, capsys):
        text = tmp_path / "text.txt"
        text.write_text("x = 1\n" * 30)
        assert cli.main(["eval", str(folder), "--text", str(text), "--device", "cpu"]) == 0
        assert capsys.readouterr().out.startswith("perplexity ")

    def test_eval_table(self, folder, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        text, output = tmp_path / "text.txt", tmp_path / "table.json"
        text.write_text("def name(path):\n    return path\n" * 30)
        arguments = ["eval", str(folder), "--table", "--plant-outliers", "--device", "cpu"]
        arguments += ["--text", str(text), "--calibration", str(text), "--output", str(output)]
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        stored = json.loads(output.read_text())
        here = provenance(torch.device("cpu"))
        assert stored.pop("time") <= here.pop("time")
        assert {name: stored[name] for name in here} == here
        assert stored["planted_outliers"]
        assert [row["name"] for row in stored["rows"]] == [row.name for row in ROWS]
        for row in stored["rows"]:
            assert row["name"] in out
            assert f"{row['perplexity']:.3f}" in out
        assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "text.txt"]

    def test_bench(self, folder, capsys):
        arguments = ("--batch", 2, "--prompt-tokens", 9, "--new-tokens", 4, "--repeats", 1)
        result = self.json_of(capsys, "bench", folder, *arguments, "--scheme", "w8a8")
        assert (result["batch_size"], result["prompt_tokens"], result["new_tokens"]) == (2, 9, 4)
        assert result["decode_tokens_per_second"] > 0
        assert result["scheme"] == "w8a8"
        assert cli.main(["bench", str(folder), "--device", "cpu", *map(str, arguments)]) == 0
        out = capsys.readouterr().out
        for text in ("prefill", "decoding", "tokens/s", "peak memory"):
            assert text in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["generate", "absent", "--prompt", "a"], "absent: no such folder"),
            (["generate", "demo", "--prompt", "a", "--top-p", "3"], "top_p is 3.0"),
            (["generate", "demo", "--prompt-file", "absent.txt"], "absent.txt"),
            (["eval", "demo", "--context", "513"], "the context is 513, expected at most"),
            (["eval", "demo", "--text", "absent.txt"], "absent.txt"),
            (["quantize", "demo", "x", "--skip", "nothing"], "'nothing', which matches no module"),
        ],
        ids=str,
    )
    def test_failures(self, arguments, message, monkeypatch, tmp_path, capsys):
        monkeypatch.chdir(tmp_path)
        assert cli.main([*arguments, "--device", "cpu"]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"fastq {arguments[0]}: ")
        assert message in captured.err
        assert list(tmp_path.iterdir()) == []
