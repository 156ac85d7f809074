"""`fastq doctor`: what it finds here, and what it says where something is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import platform

import pytest
import torch

import fastq
from fastq import distributions, doctor, ops


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def library(cuda) -> dict:
    return {"version": "0", "cpu": ops.describe()["cpu"], "cuda": cuda}


NO_DEVICE = {
    "archs": "90a",
    "runtime": "13.0",
    "driver": None,
    "devices": [],
    "reason": "CUDA driver version is insufficient for CUDA runtime version",
}
ONE_DEVICE = NO_DEVICE | {"driver": "13.0", "devices": [{"name": "a GPU"}], "reason": None}


def test_versions(found):
    versions = found["versions"]
    assert versions["fastq"] == fastq.__version__
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__
    assert versions["safetensors"] == importlib.metadata.version("safetensors")


def test_every_op_has_a_kernel_on_every_device(found):
    assert found["devices"][0] == "cpu"
    assert set(found["kernels"]) == set(found["devices"])
    for device, kernels in found["kernels"].items():
        backend = device.partition(":")[0]
        ops_named = {name.split()[0] for name in kernels}
        expected = {"int8_gemm", "quantize_per_token", "quantize_per_channel", "dequantize"}
        optional = {"llm_int8_matmul"}  # where the device has it
        assert ops_named | optional == expected | optional
        assert device != "cpu" or optional <= ops_named
        assert all(kernel.partition("/")[0] == backend for kernel in kernels.values())


def test_the_instruction_set_can_be_forced(monkeypatch):
    monkeypatch.setenv("FASTQ_CPU_ISA", "scalar")
    kernels = doctor.examine()["kernels"]["cpu"]
    assert kernels["quantize_per_token"] == "cpu/scalar"
    assert kernels["int8_gemm 64x1024x1024"].startswith("cpu/scalar/")


@pytest.mark.cuda
def test_gpu(found):
    assert "cuda:0" in found["devices"]
    assert found["versions"]["driver_cuda"]
    assert not [p for p in found["problems"] if "GPU" in p["what"] or "cuda" in p["what"]]


def test_exit_code_and_text(found, monkeypatch, capsys):
    findings = found | {"problems": []}
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert "Kernels on cpu" in text
    assert text.endswith("Problems\n  none\n")
    findings["problems"] = [{"what": "the moon is full", "fix": "pip install wolf"}]
    assert doctor.main() == 1
    assert "the moon is full\n    mend it with: pip install wolf" in capsys.readouterr().out
    assert doctor.main(as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == findings["problems"]


def test_name_clash(monkeypatch):
    monkeypatch.setattr(distributions, "clashing_distributions", lambda: ["fastq 9.9"])
    problem = next(p for p in doctor.examine()["problems"] if "import name" in p["what"])
    assert problem["what"].startswith("fastq 9.9 ")
    assert problem["fix"].startswith("pip uninstall -y fastq &&")


def test_missing_dependency(monkeypatch):
    monkeypatch.setattr(doctor, "_DEPENDENCIES", ("numpy", "no_such_package"))
    problems = doctor.examine()["problems"]
    assert {"what": "no_such_package is not installed", "fix": "pip install no_such_package"} in (
        problems
    )


def test_an_op_that_is_wrong(monkeypatch):
    right = ops.int8_gemm
    monkeypatch.setattr(ops, "int8_gemm", lambda *args, **kwargs: right(*args, **kwargs) + 1)
    problem = next(p for p in doctor.examine()["problems"] if "fail on cpu" in p["what"])
    assert "int8_gemm gave 85 wrong elements of 85" in problem["what"]


@pytest.mark.parametrize(
    ("cuda", "torch_sees", "torch_cuda", "driver", "expected"),
    [
        (None, False, None, None, []),
        (NO_DEVICE, False, None, None, []),
        (ONE_DEVICE, True, "13.0", "580.1", []),
        (None, True, "13.0", "580.1", ["no CUDA backend"]),
        (None, False, None, "580.1", ["no CUDA backend", "is a CPU build"]),
        (NO_DEVICE, True, "12.8", "550.1", ["driver version is insufficient"]),
        (ONE_DEVICE, False, None, "580.1", ["is a CPU build"]),
        (ONE_DEVICE, False, "13.0", "580.1", ["cannot reach it"]),
    ],
)
def test_gpu_problems(monkeypatch, cuda, torch_sees, torch_cuda, driver, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: driver)
    problems = doctor._gpu_problems(library(cuda))
    assert len(problems) == len(expected)
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem["what"]
        assert problem["fix"]


def test_nvidia_driver(monkeypatch, tmp_path):
    file = tmp_path / "version"
    monkeypatch.setattr(doctor, "_NVIDIA_DRIVER", file)
    assert doctor._nvidia_driver() is None
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\nGCC\n")
    assert doctor._nvidia_driver() == "580.65.06"
