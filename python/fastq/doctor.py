"""`fastq doctor`: what this machine and this installation offer, and what is missing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import __version__, distributions, ops
from .llm_int8 import llm_int8_matmul
from .quantize_ops import quantize_per_channel, quantize_per_token

# In a checkout of fastq.
_REBUILD = "pip install --force-reinstall --no-deps ."
_DEPENDENCIES = ("numpy", "rich", "safetensors", "tokenizers")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_GEMM_SHAPES = ((1, 1024, 1024), (64, 1024, 1024), (1024, 1024, 1024))  # M, N, K


def examine() -> dict[str, Any]:
    """Everything doctor reports. Touches the CUDA driver and runs every op once per device.

    `problems` holds what is wrong, each with `what` and the command `fix`; `notes` what is merely
    absent.
    """
    library = ops.describe()
    devices = ["cpu", *(f"cuda:{i}" for i in range(_usable_gpus(library)))]
    problems = [*_package_problems(), *_gpu_problems(library)]
    kernels = {}
    for device in devices:
        try:
            kernels[device] = _kernels(device, library)
        except (RuntimeError, ValueError, TypeError) as error:
            fix = _REBUILD if device == "cpu" else f"FASTQ_CUDA=ON {_REBUILD}"
            problems.append({"what": f"the ops fail on {device}: {error}", "fix": fix})
    return {
        "versions": _versions(library),
        "library": library,
        "devices": devices,
        "kernels": kernels,
        "notes": _notes(library),
        "problems": problems,
    }


def _usable_gpus(library: dict[str, Any]) -> int:
    if library["cuda"] is None or not torch.cuda.is_available():
        return 0
    return min(len(library["cuda"]["devices"]), torch.cuda.device_count())


def _versions(library: dict[str, Any]) -> dict[str, str | None]:
    cuda = library["cuda"] or {}
    return {
        "fastq": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "fastq_cuda": cuda.get("runtime"),
        "driver_cuda": cuda.get("driver"),
        "nvidia_driver": _nvidia_driver(),
        "cuda_toolkit": _cuda_toolkit(),
        **{name: _installed(name) for name in (*_DEPENDENCIES, "transformers")},
    }


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_driver() -> str | None:
    with contextlib.suppress(OSError):
        words = _NVIDIA_DRIVER.read_text().split("\n", 1)[0].split()
        return next((word for word in words if word[0].isdigit() and "." in word), None)
    return None


def _cuda_toolkit() -> str | None:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20)
        release = text.stdout.partition("release ")[2].partition(",")[0]
        return release or None
    return None


def _package_problems() -> list[dict[str, str]]:
    problems = []
    for other in distributions.clashing_distributions():
        problems.append(
            {
                "what": f"{other} installs the same import name and overwrites fastq's files",
                "fix": f"pip uninstall -y {distributions.THEIRS} && pip install --force-reinstall "
                f"--no-deps {distributions.OURS}",
            }
        )
    for name in _DEPENDENCIES:
        if importlib.util.find_spec(name) is None:
            problems.append({"what": f"{name} is not installed", "fix": f"pip install {name}"})
    model = Path(__file__).parent / "demo" / "model" / "model.safetensors"
    if not model.is_file():
        problems.append({"what": "the demo's model is not in the package", "fix": _REBUILD})
    return problems


def _gpu_problems(library: dict[str, Any]) -> list[dict[str, str]]:
    """A GPU is here and something keeps fastq from it."""
    cuda = library["cuda"]
    torch_sees = torch.cuda.is_available()
    library_sees = cuda is not None and bool(cuda["devices"])
    if not (torch_sees or library_sees or _nvidia_driver()):
        return []
    problems = []
    if cuda is None:
        problems.append(
            {
                "what": "a GPU is here, but this build of fastq has no CUDA backend",
                "fix": f"FASTQ_CUDA=ON {_REBUILD}",
            }
        )
    elif not library_sees:
        problems.append(
            {
                "what": f"fastq's CUDA backend finds no device: {cuda['reason']}",
                "fix": "update the NVIDIA driver, or rebuild with an older CUDA toolkit: "
                f"FASTQ_CUDA=ON {_REBUILD}",
            }
        )
    if not torch_sees:
        reason = "is a CPU build" if torch.version.cuda is None else "cannot reach it"
        problems.append(
            {
                "what": f"a GPU is here, but torch {torch.__version__} {reason}; install a CUDA "
                "build that the driver takes",
                "fix": "pip install --force-reinstall torch",
            }
        )
    return problems


def _notes(library: dict[str, Any]) -> list[str]:
    notes = []
    if library["cuda"] is None:
        notes.append("built without the CUDA backend: CUDA tensors are refused")
    elif not library["cuda"]["devices"]:
        notes.append(f"no CUDA device: {library['cuda']['reason']}")
    if _installed("transformers") is None:
        notes.append("transformers is absent; only the tests need it: pip install transformers")
    return notes


def _kernels(device: str, library: dict[str, Any]) -> dict[str, str]:
    """The kernel each op takes, after one run of each that is compared with exact arithmetic. An op
    that has none on the device is left out."""
    torch.manual_seed(0)
    x = torch.randn(5, 33)
    weight = torch.randint(-127, 128, (17, 33), dtype=torch.int8)
    q, s = (t.cpu() for t in quantize_per_token(x.to(device)))
    _expect("quantize_per_token", q, (x / s).round().to(torch.int8))
    q_weight, s_weight = (t.cpu() for t in quantize_per_channel(x.to(device)))
    _expect("quantize_per_channel", q_weight, (x / s_weight[:, None]).round().to(torch.int8))
    back = ops.dequantize(q.to(device), s.to(device), out_dtype=torch.float32)
    _expect("dequantize", back.cpu(), q.float() * s)
    sums = ops.int8_gemm(
        q.to(device), weight.to(device).t(), None, None, out_dtype=torch.int32
    ).cpu()
    _expect("int8_gemm", sums, (q.long() @ weight.t().long()).to(torch.int32))

    names = ["quantize_per_token", "quantize_per_channel", "dequantize", "llm_int8_matmul"]
    try:
        _check_llm_int8(device, weight)
    except NotImplementedError:
        names.remove("llm_int8_matmul")

    kernels = {}
    for M, N, K in _GEMM_SHAPES:
        a = torch.zeros(M, K, dtype=torch.int8, device=device)
        b = torch.zeros(N, K, dtype=torch.int8, device=device).t()
        kernels[f"int8_gemm {M}x{N}x{K}"] = ops.describe_int8_gemm(a, b)
        if device == "cpu":
            packed = ops.pack_weight(b)
            kernels[f"int8_gemm {M}x{N}x{K}, packed"] = ops.describe_int8_gemm(a, packed)
    for name in names:
        kernels[name] = f"cpu/{library['cpu']['isa']}" if device == "cpu" else "cuda"
    return kernels


def _check_llm_int8(device: str, weight: torch.Tensor) -> None:
    """Integers, one of them an outlier, and scales of 1: no rounding."""
    x = torch.randint(-127, 128, (5, weight.shape[1])).float()
    x[:, 0], x[2, 7] = 127.0, 512.0
    scales = torch.ones(len(weight), device=device)
    y = llm_int8_matmul(x.to(device), weight.to(device), scales, threshold=200.0)
    _expect("llm_int8_matmul", y.cpu(), x @ weight.t().float())


def _expect(op: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(actual, expected):
        wrong = int((actual != expected).sum())
        raise RuntimeError(f"{op} gave {wrong} wrong elements of {expected.numel()}")


def main(*, as_json: bool = False) -> int:
    """Prints the findings; returns 1 when there are problems."""
    found = examine()
    print(json.dumps(found, indent=2) if as_json else _render(found))
    return 1 if found["problems"] else 0


def _render(found: dict[str, Any]) -> str:
    library = found["library"]
    lines = ["Versions"]
    lines += [f"  {name:<22}{version or '-'}" for name, version in found["versions"].items()]
    lines += ["", "CPU"]
    lines += [f"  {name:<22}{_flat(value)}" for name, value in library["cpu"].items()]
    lines += ["", "CUDA"]
    if library["cuda"] is None:
        lines.append("  not in this build")
    else:
        lines += [
            f"  {name:<22}{_flat(value)}"
            for name, value in library["cuda"].items()
            if name != "devices"
        ]
        for i, gpu in enumerate(library["cuda"]["devices"]):
            lines.append(f"  {f'device {i}':<22}{_flat(gpu)}")
    for device, kernels in found["kernels"].items():
        lines += ["", f"Kernels on {device} (each op has run and is right)"]
        lines += [f"  {op:<34}{kernel}" for op, kernel in kernels.items()]
    if found["notes"]:
        lines += ["", "Notes", *(f"  {note}" for note in found["notes"])]
    lines += ["", "Problems"]
    for problem in found["problems"]:
        lines += [f"  {problem['what']}", f"    mend it with: {problem['fix']}"]
    if not found["problems"]:
        lines.append("  none")
    return "\n".join(lines)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_flat(item) for item in value)
    return "-" if value is None else str(value)
