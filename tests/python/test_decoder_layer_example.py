"""cpp/examples/decoder_layer, built on the installed package: a layer without Python or torch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastq
from conftest import REPOSITORY, find_tool, run_tool
from decoders import make_decoder
from fastq import _core
from fastq.runtime import ModelConfig, kv_cache, load_model
from fastq.runtime.model import ForwardState
from fastq.runtime.rotary import rotary_table
from quantized_folders import edit_quantization, read_config

LAYER = 1
BATCH, SEQLEN, STEPS = 2, 21, 5
SIZES = {
    "hidden_size": 203,
    "intermediate_size": 331,
    "num_hidden_layers": 2,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 80,
    "rope_theta": 5e4,
    "norm_eps": 1e-5,
}


def build(folder: Path, device: str) -> Path:
    """The program, built as a user would, with every warning an error."""
    if device == "cuda" and shutil.which("nvcc") is None:
        pytest.skip("no CUDA toolkit: nvcc is not on PATH")
    found = importlib.util.find_spec("nlohmann_json")
    if found is None:
        pytest.skip("nlohmann-json is not installed (pip install '.[test]')")
    prefixes = (Path(_core.__file__).parent, Path(found.origin).parent)
    cmake = find_tool("cmake")
    run_tool(
        *(cmake, "-S", REPOSITORY / "cpp" / "examples" / "decoder_layer", "-B", folder),
        *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"),
        f"-DCMAKE_PREFIX_PATH={';'.join(map(str, prefixes))}",
        f"-DWITH_CUDA={'ON' if device == 'cuda' else 'OFF'}",
        *("-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wpedantic", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"),
    )
    run_tool(cmake, "--build", folder)
    return folder / "decoder_layer"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory):
    """The program for a device, built once."""
    built: dict[str, Path] = {}

    def program(device: str) -> Path:
        if device not in built:
            built[device] = build(tmp_path_factory.mktemp(device), device)
        return built[device]

    return program


def run_program(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Runs it on as many threads as this process: attention's bits depend on them."""
    environment = {**os.environ, "FASTQ_NUM_THREADS": str(fastq.get_num_threads())}
    command = [str(part) for part in (program, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def save_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = fastq.quantize(make_decoder(dtype=dtype, **SIZES))
    fastq.save_quantized(model, folder, max_shard_size=400_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def hidden_states(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"prompt": (BATCH, SEQLEN), "steps": (STEPS, BATCH, 1)}
    size = SIZES["hidden_size"]
    return {
        name: torch.randn(*shape, size, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def rounded_rotary_table(
    config: ModelConfig, length: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """`rotary_table` with each of its operations rounded correctly, as the program's are: torch's
    power, cosine and sine are off by a last bit now and then."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    power = np.power(config.rope_theta, exponent.astype(np.float64)).astype(np.float32)
    angle = np.outer(np.arange(length, dtype=np.float32), np.float32(1) / power)
    assert angle.dtype == np.float32
    parts = (part(angle.astype(np.float64)).astype(np.float32) for part in (np.cos, np.sin))
    table = tuple(torch.from_numpy(part).to(device) for part in parts)
    torch.testing.assert_close(table, rotary_table(config, length, device), rtol=0, atol=1e-5)
    return table


def runtime_layer(folder: Path, inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """What the Python runtime's layer makes of the program's inputs."""
    model = load_model(folder, device=device)
    cache = model.new_cache(BATCH, SEQLEN + STEPS)
    model.model.layers = nn.ModuleList([model.model.layers[LAYER]])
    fused = model.fused_decoder()
    assert fused is not None

    def layer(hidden: Tensor) -> Tensor:
        cache.begin(hidden.shape[1])
        out = fused(hidden.to(device), ForwardState(cache))
        cache.commit(hidden.shape[1])
        return out.cpu()

    with torch.inference_mode():
        prompt = layer(inputs["prompt"])
        return {"prompt": prompt, "steps": torch.stack([layer(x) for x in inputs["steps"]])}


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.cuda),
        pytest.param("cuda", torch.float16, marks=pytest.mark.cuda),
    ],
)
def test_equals_the_runtime(
    device: str,
    dtype: torch.dtype,
    programs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_cache, "rotary_table", rounded_rotary_table)
    folder, inputs = save_checkpoint(tmp_path / "model", dtype), hidden_states(dtype)
    save_file(inputs, tmp_path / "in.safetensors")
    result = run_program(
        *(programs(device), folder, LAYER, tmp_path / "in.safetensors"),
        *(tmp_path / "out.safetensors", "--device", device),
    )
    assert result.returncode == 0, result.stderr
    outputs = load_file(tmp_path / "out.safetensors")
    expected = runtime_layer(folder, inputs, device)
    assert outputs.keys() == expected.keys()
    for name, want in expected.items():
        if dtype == torch.float32:
            assert torch.equal(outputs[name], want)
            continue
        # The program adds the MLP's output in its product's epilogue, which rounds once; the
        # runtime rounds the product and then the sum.
        rounding = torch.finfo(dtype).eps
        atol = rounding * want.abs().max().item() / 2
        torch.testing.assert_close(outputs[name], want, rtol=rounding, atol=atol)


def set_entry(folder: Path, name: str, value: object) -> None:
    raw = read_config(folder)
    raw[name] = value
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def make_static(quantization: dict) -> None:
    (group,) = quantization["config_groups"].values()
    group["input_activations"] |= {"strategy": "tensor", "dynamic": False}


def cut_short(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: set_entry(folder, "model_type", "opt"), '"opt", expected "llama"'),
        (lambda folder: set_entry(folder, "attention_bias", True), "attention_bias is true"),
        (lambda folder: set_entry(folder, "num_attention_heads", 0), "num_attention_heads"),
        (
            lambda folder: set_entry(folder, "intermediate_size", 330),
            "[331,203], expected [330,203]",
        ),
        (lambda folder: edit_quantization(folder, make_static), '"tensor", expected "token"'),
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (cut_short, "lies outside of the file"),
    ],
)
def test_refuses_what_it_does_not_compute(edit, message: str, programs, tmp_path: Path) -> None:
    folder, output = save_checkpoint(tmp_path / "model"), tmp_path / "out.safetensors"
    save_file(hidden_states(torch.float32), tmp_path / "in.safetensors")
    edit(folder)
    result = run_program(programs("cpu"), folder, LAYER, tmp_path / "in.safetensors", output)
    assert result.returncode == 1
    assert message in result.stderr
    assert not output.exists()


def test_refuses_other_inputs(programs, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    inputs, output = hidden_states(torch.float32), tmp_path / "out.safetensors"
    for changed, layer, message in (
        ({"prompt": inputs["prompt"].flatten()}, LAYER, "prompt must be (batch, seqlen, hidden_"),
        ({"prompt": inputs["prompt"][:0]}, LAYER, "prompt must be (batch, seqlen, hidden_size)"),
        ({"steps": inputs["steps"][:, :1]}, LAYER, "steps must be (num_steps, batch, 1, hidden"),
        ({"prompt": inputs["prompt"].bfloat16()}, LAYER, "another dtype than the checkpoint"),
        ({}, 2, "model.layers.2.input_layernorm.weight is in none of the checkpoint's files"),
    ):
        tensors = {name: x.contiguous() for name, x in (inputs | changed).items()}
        save_file(tensors, tmp_path / "in.safetensors")
        result = run_program(programs("cpu"), folder, layer, tmp_path / "in.safetensors", output)
        assert (result.returncode, output.exists()) == (1, False)
        assert message in result.stderr
