"""The demo: its corpus, its perplexity, a training run in small, and the shipped model."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastq.demo
from fastq.demo import corpus, run, train
from fastq.evaluation import nats_per_token, windows
from fastq.nn import Int8Linear
from fastq.runtime import Tokenizer, load_model

DEMO = Path(fastq.demo.__file__).parent
SHIPPED = pytest.mark.skipif(
    not (run.MODEL_FOLDER / "model.safetensors").is_file(),
    reason="the demo's model is not in this checkout",
)


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory) -> Path:
    """A small standard library: modules to train on, the held-out ones, and what is skipped."""
    folder = tmp_path_factory.mktemp("stdlib")
    texts = {f"module{i}.py": f"def function{i}(x):\n    return x + {i}\n" * 40 for i in range(9)}
    texts |= {f"{name}.py": f'"""Module {name}."""\nx = 1\n' * 30 for name in corpus.HELD_OUT}
    texts |= {
        "package/__init__.py": "import os\n",
        "package/copy.py": texts["module0.py"],
        "test/test_heapq.py": "import heapq\n",
        "test/test_csv/__init__.py": "import csv\n",
        "test/test_module1.py": "import module1\n",
        "distutils/cmd.py": "class Command: pass\n",
        "site-packages/other.py": "import other\n",
        "__pycache__/stale.py": "pass\n",
        "pydoc_data/topics.py": "topics = {}\n",
        "encodings/cp437.py": "table = 'x'\n",
        "_sysconfigdata_linux.py": "build_time_vars = {}\n",
        "table.py": "# " + "ä" * 50 + "\n",
        "empty.py": "",
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "broken.py").write_bytes(b"# \xff\xfe not utf-8\n")
    (folder / "written_in_latin.py").write_bytes(
        b"# coding: latin-1\nname = 'caf\xe9'\n" + b"value = 1\n" * 9
    )
    return folder


class TestCorpus:
    def test_training_texts(self, stdlib):
        names = [name for name, _ in corpus.training_texts(stdlib)]
        assert names == [
            *(f"module{i}.py" for i in range(9)),
            "package/__init__.py",
            "test/test_module1.py",
            "written_in_latin.py",
        ]
        assert "café" in dict(corpus.training_texts(stdlib))["written_in_latin.py"]

    def test_held_out_texts(self, stdlib):
        texts = corpus.held_out_texts(stdlib)
        assert tuple(texts) == corpus.HELD_OUT
        assert texts["csv"].startswith('"""Module csv."""')

    def test_the_running_python_has_them_all(self):
        texts = corpus.held_out_texts()
        assert all(len(text) > 1000 for text in texts.values())

    def test_no_held_out_text_is_trained_on(self):
        """Lines of some length are the module's own; a tenth may be idioms of the library."""
        known = set()
        for _, text in corpus.training_texts(corpus.stdlib_folder()):
            known.update(line.strip() for line in text.splitlines())
        for name, text in corpus.held_out_texts().items():
            lines = [line.strip() for line in text.splitlines()]
            lines = [line for line in lines if len(line) > 30]
            assert sum(line in known for line in lines) <= 0.15 * len(lines), name

    @pytest.mark.parametrize(
        ("path", "held_out"),
        [
            ("heapq.py", True),
            ("test/test_heapq.py", True),
            ("test/test_gzip/__init__.py", True),
            ("queue/__init__.py", True),
            ("_heapq.py", True),
            ("asyncio/queues.py", False),
            ("cmdline.py", False),
            ("test/test_cmd_line.py", False),
        ],
    )
    def test_is_held_out(self, path, held_out):
        assert corpus.is_held_out(Path(path)) == held_out

    def test_a_library_without_source(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"calendar\.py"):
            corpus.held_out_texts(tmp_path)


class Bigram(torch.nn.Module):
    """Logits that depend on the last token alone."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)

    def forward(self, ids):
        return self.table(ids)


class TestPerplexity:
    @pytest.mark.parametrize("length", [2, 7, 8, 9, 33])
    def test_windows(self, length):
        inputs, targets = windows(torch.arange(100, 100 + length), 8)
        assert inputs.shape == targets.shape == (math.ceil((length - 1) / 8), 8)
        seen = targets[targets >= 0]
        assert seen.tolist() == list(range(101, 100 + length))
        assert torch.equal(inputs[targets >= 0], seen - 1)

    @pytest.mark.parametrize("batch", [1, 3, 100])
    def test_nats_per_token(self, device, batch):
        torch.manual_seed(0)
        model = Bigram(11).requires_grad_(False).to(device)
        tokens = torch.randint(11, (75,), device=device)
        progress = []
        nats = nats_per_token(model, tokens, 8, batch=batch, on_progress=progress.append)
        log_p = model.table.weight.double().log_softmax(-1).cpu()
        expected = -log_p[tokens[:-1].cpu(), tokens[1:].cpu()].mean().item()
        assert nats == pytest.approx(expected, rel=1e-5)
        assert sum(progress) == 74


TINY = ["--steps", "6", "--batch", "2", "--layers", "1", "--eval-every", "3", "--warmup", "2"]
TINY += ["--vocab-size", "300", "--device", "cpu", "--stdlib-version", "3.0.0"]


@pytest.fixture(scope="module")
def tiny(stdlib, tmp_path_factory) -> Path:
    """A model folder from a training run of six steps."""
    out = tmp_path_factory.mktemp("tiny")
    assert train.main(["--out", str(out), "--stdlib", str(stdlib), *TINY]) == 0
    return out


class TestTrain:
    def test_the_card(self, tiny):
        card = json.loads((tiny / "card.json").read_text())
        assert card["python_version"] == "3.0.0"
        assert card["held_out"] == list(corpus.HELD_OUT)
        assert card["files"] == 12
        assert card["steps"] == 6
        assert card["tokens_processed"] == 6 * 2 * 512
        assert "PSF" in card["licence"]

    def test_the_card_gives_the_saved_models_perplexity(self, tiny, stdlib):
        card = json.loads((tiny / "card.json").read_text())
        model, tokenizer = load_model(tiny), Tokenizer(tiny)
        assert model.dtype == torch.bfloat16
        assert card["parameters"] == sum(p.numel() for p in model.parameters())
        ids = []
        for text in corpus.held_out_texts(stdlib).values():
            ids += [0, *tokenizer.encode(text)]
        assert card["held_out_tokens"] == len(ids) - 1
        nats = nats_per_token(model, torch.tensor(ids), train.CONTEXT)
        assert card["perplexity"] == pytest.approx(math.exp(nats), rel=2e-3)

    def test_the_card_gives_the_unigram_perplexity(self, tiny, stdlib):
        card = json.loads((tiny / "card.json").read_text())
        tokenizer = Tokenizer(tiny)
        texts = [text for _, text in corpus.training_texts(stdlib)]
        counts = dict.fromkeys(range(tokenizer.vocab_size), 1)
        for i, text in enumerate(texts):
            if i % train.DEV_EVERY:
                for token in [0, *tokenizer.encode(text)]:
                    counts[token] += 1
        total = sum(counts.values())
        held_out = []
        for text in corpus.held_out_texts(stdlib).values():
            held_out += [0, *tokenizer.encode(text)]
        nats = [math.log(total / counts[token]) for token in held_out[1:]]
        assert card["unigram_perplexity"] == pytest.approx(
            math.exp(sum(nats) / len(nats)), abs=0.01
        )

    def test_it_learns(self, stdlib, tmp_path, capsys):
        options = [*TINY, "--steps", "30", "--batch", "1", "--eval-every", "30", "--lr", "5e-3"]
        train.main(["--out", str(tmp_path), "--stdlib", str(stdlib), *options])
        card = json.loads((tmp_path / "card.json").read_text())
        assert card["dev_perplexity"] < 100  # 300 tokens; chance is 300
        assert "step     30" in capsys.readouterr().out

    def test_runs_as_a_file_without_fastq(self, stdlib, tmp_path):
        program = (
            "import runpy, sys; sys.modules['fastq'] = None; "
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        command = [sys.executable, "-c", program, str(DEMO / "train.py"), "--out", str(tmp_path)]
        command += ["--stdlib", str(stdlib), *TINY, "--steps", "1", "--batch", "1"]
        # The folder of a program comes first in sys.path; run_path leaves that to us.
        subprocess.run(
            command, check=True, capture_output=True, timeout=300, env=_with_path(str(DEMO))
        )
        assert (tmp_path / "model.safetensors").is_file()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--stdlib", "x"], "--stdlib needs --stdlib-version"),
            (["--steps", "0"], "--steps must be at least 1"),
            (["--max-minutes", "0"], "--max-minutes must be positive"),
        ],
    )
    def test_bad_options(self, capsys, options, message):
        with pytest.raises(SystemExit) as exit_:
            train.main(["--out", "never-written", *options])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err

    def test_no_source(self, tmp_path):
        with pytest.raises(SystemExit, match="no Python source to train on"):
            train.main(
                ["--out", "never-written", "--stdlib", str(tmp_path), "--stdlib-version", "3.0.0"]
            )


def _with_path(folder: str) -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": folder}


class TestRun:
    def test_figures(self, tiny, stdlib, device):
        progress = []
        result = run.run_demo(
            device=str(device),
            max_tokens=5,
            folder=tiny,
            stdlib=stdlib,
            on_progress=lambda *step: progress.append(step),
        )
        parts = {label: [] for label, _, _ in progress}
        for label, done, total in progress:
            parts[label].append((done, total))
        assert len(parts) == 4
        for steps in parts.values():
            assert steps == sorted(steps)
            assert steps[-1] == (steps[0][1], steps[0][1])  # all that was announced
        assert result["torch_threads"] in (1, torch.get_num_threads())
        assert result["python"] == platform.python_version()
        own, int8 = result["results"]
        assert int8["precision"] == "int8"
        card = result["card"]
        assert own["perplexity"] == pytest.approx(card["perplexity"], rel=2e-2)
        assert result["int8_perplexity_change"] == int8["perplexity"] / own["perplexity"] - 1
        assert abs(result["int8_perplexity_change"]) < 0.05
        assert 0 < int8["weight_bytes"] < own["weight_bytes"]
        # One layer of 7 matrices.
        elements = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 704
        bytes_each = 4 if own["precision"] == "float32" else 2
        assert own["linear_weight_bytes"] == bytes_each * elements
        assert elements < int8["linear_weight_bytes"] < 1.05 * elements
        json.dumps(result)

    def test_thread_count_of_torch_is_restored(self, tiny, stdlib, monkeypatch):
        threads = torch.get_num_threads()
        monkeypatch.setattr(run, "_faster_thread_count", lambda model, tokens: 1)
        seen = []
        result = run.run_demo(
            device="cpu",
            max_tokens=1,
            folder=tiny,
            stdlib=stdlib,
            on_progress=lambda *step: seen.append(torch.get_num_threads()),
        )
        assert result["torch_threads"] == 1
        assert set(seen) == {1}
        assert torch.get_num_threads() == threads

    def test_weight_bytes_counts_a_shared_tensor_once(self):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8))
        model[1].weight = model[0].weight
        assert run.weight_bytes(model) == 4 * (64 + 8)
        module = Int8Linear(8, 8, device="cpu")
        assert run.weight_bytes(module) == 64 + 32 + 32

    def test_pick_device(self, monkeypatch):
        assert run.pick_device("cpu") == (torch.device("cpu"), None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert run.pick_device() == (torch.device("cpu"), None)
        with pytest.raises(RuntimeError, match="device is cuda:0, but torch sees no GPU"):
            run.pick_device("cuda:0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(run.ops, "describe", lambda: {"cuda": None})
        chosen, note = run.pick_device()
        assert chosen.type == "cpu"
        assert "fastq doctor" in note

    def test_no_bfloat16_on_the_cpu(self, tiny, stdlib, monkeypatch):
        monkeypatch.setattr(run, "computes_bfloat16", lambda device: False)
        result = run.run_demo(device="cpu", max_tokens=2, folder=tiny, stdlib=stdlib)
        assert result["results"][0]["precision"] == "float32"


@SHIPPED
class TestShippedModel:
    def test_size(self):
        files = list(run.MODEL_FOLDER.iterdir())
        assert sum(file.stat().st_size for file in files) <= 15e6
        card = json.loads((run.MODEL_FOLDER / "card.json").read_text())
        assert card["held_out"] == list(corpus.HELD_OUT)

    def test_int8_perplexity_is_within_a_percent(self, device):
        result = run.run_demo(device=str(device), max_tokens=8)
        own, card = result["results"][0], result["card"]
        assert abs(result["int8_perplexity_change"]) <= 0.01
        assert own["perplexity"] < card["unigram_perplexity"] / 10
        same = platform.python_version().rpartition(".")[0] in card["python_version"]
        assert own["perplexity"] == pytest.approx(card["perplexity"], rel=0.01 if same else 0.3)
