"""The examples of README.md run as they stand there; the C one is in test_embedding.py."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

from byte_tokenizer import write_tokenizer
from conftest import REPOSITORY, run_tool
from test_embedding import readme_block


def test_python_example(capsys) -> None:
    names: dict = {}
    exec(compile(readme_block("python"), "README.md", "exec"), names)
    assert names["y"].shape == (4, 512)
    assert names["error"] < 0.02
    assert "largest error" in capsys.readouterr().out


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder with a checkpoint `llama` and a text in it, `fastq` on PATH, and no GPU."""
    transformers = pytest.importorskip("transformers", reason="transformers writes the checkpoint")
    folder = tmp_path / "work"
    checkpoint = folder / "llama"
    checkpoint.mkdir(parents=True)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=write_tokenizer(checkpoint),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(checkpoint)
    (folder / "text.txt").write_text("There was a king who had a daughter.\n" * 20)
    program = tmp_path / "bin" / "fastq"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fastq "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(folder)
    return folder


def test_from_a_checkpoint_to_text(user) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    mark = r"^<!-- checkpoint-commands -->\n```sh\n(.+?)^```$"
    (block,) = re.findall(mark, text, re.MULTILINE | re.DOTALL)
    commands = block.splitlines()
    assert [command.split()[:2] for command in commands] == [
        ["fastq", name] for name in ("quantize", "eval", "generate")
    ]
    printed = []
    for command in commands:
        result = subprocess.run(
            command, shell=True, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        printed.append(result.stdout)
    quantised, evaluated, generated = printed
    assert quantised.startswith("llama-int8: 14 layers in INT8 (smoothquant_o1), ")
    assert re.match(r"perplexity \d+\.\d{4} on \d+ tokens ", evaluated)
    prompt = shlex.split(commands[2])[-1]
    assert generated.startswith(prompt)
    assert len(generated) > len(prompt) + 1
    assert {path.name for path in user.iterdir()} == {"llama", "llama-int8", "text.txt"}


def test_commands_stand_under_their_marks() -> None:
    """`.ci/run` takes the test command from README.md by this mark."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for mark, program in (("demo-command", "fastq demo"), ("test-command", "pytest")):
        (command,) = re.findall(rf"^<!-- {mark} -->\n```sh\n(.+)\n```$", text, re.MULTILINE)
        assert command.startswith("python3 -m venv .venv && ")
        assert command.endswith(f"/bin/{program}")
        assert "-c constraints.txt" in command


def test_tables_are_those_of_the_results() -> None:
    tree = {**os.environ, "PYTHONPATH": os.pathsep.join((str(REPOSITORY), *sys.path))}
    run_tool(sys.executable, "-m", "bench.readme_table", "--check", env=tree)
