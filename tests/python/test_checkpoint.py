"""Checkpoints: whole, sharded, damaged and foreign."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastq.nn import Int8Linear
from fastq.quantization import quantize
from fastq.runtime import CausalLM, ModelConfig, Tokenizer, checkpoint, load_model
from fastq.runtime.layout import to_checkpoint

CONFIG = ModelConfig(
    vocab_size=19,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    dtype="float32",
)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def make_model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CONFIG).requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid checkpoint."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    save_file(make_model().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def edit_config(folder: Path, **entries) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | entries))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> dict[str, str]:
    """Splits the checkpoint in three files, an index beside them; returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        names = sorted(tensors)[i::3]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_loads(folder, device):
    model = load_model(folder, device=device)
    assert torch.equal(model(IDS.to(device)).cpu().argmax(-1), make_model()(IDS).argmax(-1))
    torch.testing.assert_close(model(IDS.to(device)).cpu(), make_model()(IDS))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_loads_shards(folder):
    shard(folder)
    assert torch.equal(load_model(folder)(IDS), make_model()(IDS))


def test_loads_one_file_rather_than_an_index(folder):
    write_index(folder, {"model.norm.weight": "absent.safetensors"})
    assert torch.equal(load_model(folder)(IDS), make_model()(IDS))


@pytest.mark.parametrize(
    ("stored", "named", "asked", "expected"),
    [
        (torch.float32, "float32", None, torch.float32),
        (torch.bfloat16, "bfloat16", None, torch.bfloat16),
        (torch.float16, None, None, torch.float32),
        (torch.bfloat16, "bfloat16", torch.float16, torch.float16),
        (torch.float64, "float32", None, torch.float32),
    ],
)
def test_dtype(folder, stored, named, asked, expected):
    edit_tensors(folder, lambda t: t.update({k: v.to(stored) for k, v in t.items()}))
    edit_config(folder, dtype=named, torch_dtype=named)
    model = load_model(folder, dtype=asked)
    assert {p.dtype for p in model.parameters()} == {expected}
    reference = make_model().model.norm.weight.to(stored).to(expected)
    assert torch.equal(model.model.norm.weight, reference)


def test_tied_embeddings_share_memory(folder):
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_embeddings_may_be_stored_twice(folder):
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_embeddings_that_differ(folder):
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed"):
        load_model(folder)


def test_old_rotary_buffers_are_ignored(folder):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({name: torch.ones(2)}))
    assert torch.equal(load_model(folder)(IDS), make_model()(IDS))


_LOAD = """
import sys
import torch
from fastq.runtime import load_model

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

load_model(sys.argv[1])  # what the first use of libraries takes is not the weights'
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM, the peak of VmRSS
model = load_model(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
touched = sum(p.view(-1)[::64].sum().item() for p in model.parameters())  # mapped pages come in
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(size, status("VmHWM") - before)
"""


def deep_checkpoint(folder: Path, family: str) -> Path:
    """26 M or 34 M parameters in tensors of 0.4 MB to 1 MB, float32, in two shards."""
    plain = {"norm": "layer", "mlp_gated": False, "position": "learned", "activation": "gelu_tanh"}
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    config = ModelConfig(
        vocab_size=101,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        dtype="float32",
        **(plain | biases | {"norm_eps": 1e-5} if family == "gpt2" else {}),
        tie_word_embeddings=family == "gpt2",
        family=family,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    tensors = to_checkpoint(config, CausalLM(config).requires_grad_(False).state_dict())
    names = list(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part{i}.safetensors")
    write_index(folder, weight_map)
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def deep(request, tmp_path_factory) -> Path:
    return deep_checkpoint(tmp_path_factory.mktemp("deep") / request.param, request.param)


class TestMemory:
    """Loading takes at most 1.1 times the weights."""

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_host(self, deep, folder, dtype):
        command = [sys.executable, "-c", _LOAD, folder, deep, dtype]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        size, peak = map(int, run.stdout.split())
        assert size > (90e6 if dtype == "float32" else 45e6)
        assert 0.9 * size <= peak <= 1.1 * size

    @pytest.mark.cuda
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_device(self, deep, dtype):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = load_model(deep, dtype=dtype, device="cuda")
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        assert torch.cuda.max_memory_allocated() - before <= 1.1 * size

    def test_nothing_is_read_before_all_is_checked(self, folder, monkeypatch):
        edit_config(folder, num_attention_heads=4, num_key_value_heads=2)
        monkeypatch.setattr(checkpoint, "read_tensors", None)
        with pytest.raises(ValueError, match="expected"):
            load_model(folder)


class TestConvert:
    def test_every_linear_layer_in_order(self, folder):
        """Each is passed once, whole, before any later one has weights."""
        seen = []

        def convert(name, layer):
            assert not any(p.is_meta for p in layer.parameters())
            seen.append((name, layer.weight.clone()))
            return torch.nn.Identity() if name.endswith("layers.1.mlp.up_proj") else layer

        model = load_model(folder, convert=convert)
        expected = dict(make_model().named_parameters())
        linear = [n for n, m in make_model().named_modules() if isinstance(m, torch.nn.Linear)]
        assert [name for name, _ in seen] == linear
        assert all(torch.equal(weight, expected[f"{name}.weight"]) for name, weight in seen)
        assert isinstance(model.model.layers[1].mlp.up_proj, torch.nn.Identity)

    def test_quantised_while_loaded(self, folder):
        def convert(name, layer):
            return layer if name == "lm_head" else Int8Linear.from_float(layer)

        expected = quantize(make_model())(IDS)
        assert torch.equal(load_model(folder, convert=convert)(IDS), expected)

    def test_a_tied_head_comes_last(self, folder):
        edit_config(folder, tie_word_embeddings=True)
        edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
        names = []
        model = load_model(folder, convert=lambda name, layer: names.append(name) or layer)
        assert names[-1] == "lm_head"
        assert len(names) == len(set(names)) == 15
        assert model.lm_head.weight is model.model.embed_tokens.weight


class TestDamaged:
    @pytest.mark.parametrize("keep", [0, 4, 9, 200, -1])
    def test_truncated(self, folder, keep):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        size = file.stat().st_size
        with pytest.raises(
            ValueError, match=rf"model\.safetensors: expected a complete safetensors.* {size} bytes"
        ):
            load_model(folder)

    def test_truncated_shard(self, folder):
        weight_map = shard(folder)
        file = folder / weight_map["model.norm.weight"]
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(ValueError, match=f"{file.name}: expected a complete safetensors file"):
            load_model(folder)

    @pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(99), b"{}", b"\xff" * 64])
    def test_foreign(self, folder, content):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="expected a complete safetensors file"):
            load_model(folder)

    def test_missing_tensor(self, folder):
        edit_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(
            ValueError,
            match=r"model\.safetensors: missing tensor model\.layers\.1\.mlp\.up_proj\.weight; "
            "config.json asks for 21 tensors, got 20",
        ):
            load_model(folder)

    def test_extra_tensor(self, folder):
        edit_config(folder, num_hidden_layers=1)
        with pytest.raises(
            ValueError, match=r"unexpected tensor model\.layers\.1\.\S+ and 8 more; config.json"
        ):
            load_model(folder)

    def test_shape_mismatch(self, folder):
        edit_config(folder, intermediate_size=13)
        with pytest.raises(
            ValueError,
            match=r"model\.safetensors: tensor model\.layers\.0\.mlp\.gate_proj\.weight has shape "
            r"\(12, 8\), expected \(13, 8\)",
        ):
            load_model(folder)

    def test_integer_tensor(self, folder):
        edit_tensors(
            folder, lambda t: t.update({"model.norm.weight": torch.ones(8, dtype=torch.int8)})
        )
        with pytest.raises(ValueError, match=r"model\.norm\.weight has dtype I8, expected one of"):
            load_model(folder)

    def test_config_is_not_json(self, folder):
        (folder / "config.json").write_text('{"model_type": "llama",')
        with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
            load_model(folder)

    def test_config_is_not_an_object(self, folder):
        (folder / "config.json").write_text("[1]")
        with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got list"):
            load_model(folder)

    @pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
    def test_index_does_not_parse(self, folder, text):
        shard(folder)
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: expected JSON with a weight_map"):
            load_model(folder)

    @pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", 7])
    def test_index_leaves_the_folder(self, folder, name):
        shard(folder)
        write_index(folder, {"model.norm.weight": name})
        with pytest.raises(ValueError, match="expected the name of a file beside it"):
            load_model(folder)

    def test_index_places_a_tensor_wrongly(self, folder):
        weight_map = shard(folder)
        file = weight_map["model.norm.weight"]
        tensors = load_file(folder / file)
        tensors.pop("model.norm.weight")
        save_file(tensors, folder / file)
        with pytest.raises(ValueError, match=rf"{file}: missing tensor model\.norm\.weight"):
            load_model(folder)


class TestAbsent:
    def test_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
            load_model(tmp_path / "nowhere")

    def test_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or"):
            load_model(folder)

    def test_pickle_is_refused(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, which is a pickle"):
            load_model(folder)

    def test_shard(self, folder):
        file = shard(folder)["model.norm.weight"]
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"{file}: no such file"):
            load_model(folder)

    def test_tokenizer(self, folder):
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
            Tokenizer(folder)


def test_tokenizer_that_does_not_parse(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer\.json"):
        Tokenizer(folder)


def test_dtype_that_is_not_a_float(folder):
    with pytest.raises(TypeError, match=r"dtype is torch\.int8, expected one of float32"):
        load_model(folder, dtype=torch.int8)


def test_config_dtype_that_is_not_supported(folder):
    edit_config(folder, dtype="float8_e4m3fn")
    with pytest.raises(NotImplementedError, match="dtype 'float8_e4m3fn' is not supported"):
        load_model(folder)
