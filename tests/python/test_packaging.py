"""What is installed, what it exports and loads, and how a build decides about CUDA."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastq
from conftest import REPOSITORY, find_tool, run_tool
from fastq import _core

sys.path.insert(0, str(REPOSITORY / "third_party"))
import cuda_plan

PREFIX = Path(_core.__file__).parent  # the fastq/ folder of the wheel


# ---- the wheel ----------------------------------------------------------------------------------


def test_version_has_one_source() -> None:
    listed = (REPOSITORY / "CMakeLists.txt").read_text(encoding="utf-8")
    version = re.search(r"project\(fastq VERSION (\S+)", listed)[1]
    assert fastq.__version__ == version
    assert importlib.metadata.version("fastq-kernels") == version


@pytest.mark.parametrize(
    "path",
    [
        "lib/libfastq.so",
        "include/fastq/fastq.h",
        "include/fastq/fastq.hpp",
        "lib/cmake/fastq/fastqConfig.cmake",
        "licenses/pybind11/LICENSE",
    ],
)
def test_wheel_is_an_install_prefix(path: str) -> None:
    file = PREFIX / path
    assert file.is_file()
    assert not file.is_symlink()  # a wheel would hold a second copy


def test_licences_come_with_what_was_compiled_in() -> None:
    holders = {
        "pybind11": "Wenzel Jakob",
        **({"cutlass": "NVIDIA CORPORATION"} if fastq.describe()["cuda"] is not None else {}),
    }
    found = {folder.name: folder for folder in (PREFIX / "licenses").iterdir()}
    assert found.keys() == holders.keys()
    for name, holder in holders.items():
        (file,) = found[name].iterdir()
        assert holder in file.read_text(encoding="utf-8")


def test_own_licence_is_in_the_metadata() -> None:
    metadata = importlib.metadata.metadata("fastq-kernels")
    assert metadata["License-Expression"] == "Apache-2.0"
    distribution = importlib.metadata.distribution("fastq-kernels")
    (licence,) = [
        file
        for file in distribution.files
        if file.name == "LICENSE" and "dist-info" in file.parts[0]
    ]
    assert "Apache License" in licence.read_text()


def test_package_is_typed() -> None:
    package = Path(fastq.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "_core.pyi").is_file()


def test_every_module_is_installed() -> None:
    source, installed = REPOSITORY / "python" / "fastq", Path(fastq.__file__).parent
    modules = {file.relative_to(source) for file in source.rglob("*.py")}
    assert Path("integrations/bitsandbytes.py") in modules
    assert [module for module in modules if not (installed / module).is_file()] == []


def test_exports_the_c_abi_and_nothing_else() -> None:
    listing = run_tool(find_tool("nm"), "-D", "--defined-only", PREFIX / "lib" / "libfastq.so")
    exported = {line.split()[-1] for line in listing.splitlines()}
    header = (PREFIX / "include" / "fastq" / "fastq.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"^FASTQ_API [\w\s*]*?\b(fastq_\w+)\(", header, re.MULTILINE))
    assert len(declared) == header.count("\nFASTQ_API ")
    assert exported == declared


def needed(library: Path) -> set[str]:
    dynamic = run_tool(find_tool("readelf"), "-d", library)
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))


def test_libraries_need_only_the_system() -> None:
    """cudart is static; the driver and NCCL are opened at run time."""
    system = r"lib(c|m|stdc\+\+|gcc_s|pthread|dl|rt)\.so\.\d+|ld-linux-x86-64\.so\.2"
    for name in needed(PREFIX / "lib" / "libfastq.so") | (needed(Path(_core.__file__))):
        assert re.fullmatch(system, name) or name == "libfastq.so"
    assert "libfastq.so" in needed(Path(_core.__file__))


# ---- import -------------------------------------------------------------------------------------


def run_python(program: str, **environment: str) -> str:
    return run_tool(sys.executable, "-c", program, env={**os.environ, **environment})


def test_import_loads_no_cuda_driver() -> None:
    program = """
import torch
def driver():
    with open("/proc/self/maps") as maps:
        return {line.split("/")[-1].strip() for line in maps if "libcuda.so" in line}
before = driver()
import fastq
print(sorted(driver() - before), torch.cuda.is_initialized())
"""
    assert run_python(program).strip() == "[] False"


@pytest.mark.cuda
def test_cuda_works_in_a_child_forked_after_import() -> None:
    """A driver initialised before the fork would make every call of the child fail."""
    program = """
import os, torch, fastq
child = os.fork()
if child == 0:
    code = 1
    try:
        a = torch.ones(32, 64, dtype=torch.int8, device="cuda")
        out = fastq.int8_gemm(a, a.t(), 1.0, 1.0, out_dtype=torch.float32)
        code = 0 if bool((out == 64).all()) else 2
    finally:
        os._exit(code)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(program).strip() == "0"


# ---- FASTQ_CUDA ---------------------------------------------------------------------------------


class Machine:
    """A pretended machine: a folder of programs and the environment that reaches it."""

    def __init__(self, root: Path) -> None:
        self.bin = root / "bin"
        self.bin.mkdir()
        self.env = {"PATH": str(self.bin)}

    def program(self, name: str, script: str = "exit 0", folder: Path | None = None) -> Path:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    def gpus(self, *capabilities: str) -> None:
        self.program("nvidia-smi", "\n".join(f"echo {text}" for text in capabilities))

    def plan(self, **settings: str) -> cuda_plan.CudaPlan:
        return cuda_plan.make_plan({**self.env, **settings})


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(cuda_plan, "_DEFAULT_TOOLKIT", str(tmp_path / "no-toolkit"))
    return Machine(tmp_path)


def test_auto_on_a_bare_machine_is_cpu_only(machine: Machine) -> None:
    assert not machine.plan().cuda
    assert not machine.plan(FASTQ_CUDA_ARCHS="90a").cuda


def test_auto_needs_a_gpu_or_archs_beside_the_compiler(machine: Machine) -> None:
    nvcc = machine.program("nvcc")
    assert not machine.plan().cuda
    named = machine.plan(FASTQ_CUDA_ARCHS="80;90a")
    assert (named.cuda, named.compiler, named.archs) == (True, str(nvcc), ("80", "90a"))
    machine.gpus("9.0", "9.0", "8.0")
    assert machine.plan().archs == ("80", "90a")
    assert machine.plan(FASTQ_CUDA_ARCHS="120").archs == ("120",)
    assert not machine.plan(CUDA_VISIBLE_DEVICES="").cuda
    assert not machine.plan(FASTQ_CUDA="OFF").cuda


@pytest.mark.parametrize(
    "script", ["exit 9", "echo 'No devices were found'", "echo 7.5"], ids=["broken", "none", "old"]
)
def test_a_gpu_that_fastq_cannot_use_is_none(machine: Machine, script: str) -> None:
    machine.program("nvcc")
    machine.program("nvidia-smi", script)
    assert not machine.plan().cuda


def test_a_gpu_without_a_compiler_is_cpu_only(machine: Machine) -> None:
    machine.gpus("9.0")
    assert not machine.plan().cuda
    with pytest.raises(cuda_plan.PlanError, match="no CUDA compiler was found"):
        machine.plan(FASTQ_CUDA="ON")


def test_on_without_gpu_asks_for_archs(machine: Machine) -> None:
    machine.program("nvcc")
    with pytest.raises(cuda_plan.PlanError, match="FASTQ_CUDA_ARCHS=90a"):
        machine.plan(FASTQ_CUDA="ON")
    assert machine.plan(FASTQ_CUDA="on", FASTQ_CUDA_ARCHS="90a").cuda


def test_where_the_compiler_is_found(machine: Machine, tmp_path: Path) -> None:
    in_home = machine.program("nvcc", folder=tmp_path / "toolkit" / "bin")
    settings = {"FASTQ_CUDA_ARCHS": "90a", "CUDA_HOME": str(tmp_path / "toolkit")}
    assert machine.plan(**settings).compiler == str(in_home)
    on_path = machine.program("nvcc")
    assert machine.plan(**settings).compiler == str(on_path)
    assert machine.plan(**settings, CUDACXX=str(in_home)).compiler == str(in_home)
    assert machine.plan(**settings, CMAKE_CUDA_COMPILER=str(in_home)).compiler == str(in_home)
    # A compiler that is named but absent is not replaced by another one in silence.
    assert not machine.plan(**settings, CUDACXX=str(tmp_path / "absent")).cuda


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FASTQ_CUDA": "maybe"}, "expected AUTO, ON or OFF, got 'maybe'"),
        ({"FASTQ_CUDA_ARCHS": "sm_90"}, "got 'sm_90'"),
        ({"FASTQ_CUDA_ARCHS": "75"}, "compute capability 8.0, got '75'"),
    ],
)
def test_a_setting_that_means_nothing(machine: Machine, settings: dict, message: str) -> None:
    with pytest.raises(cuda_plan.PlanError, match=re.escape(message)):
        machine.plan(**settings)


def test_archs_take_any_separator() -> None:
    assert cuda_plan.parse_archs("80,90a; 120 80") == ("80", "90a", "120")
    assert cuda_plan.parse_archs("") == ()


REQUIRES = """
import sys
sys.path.insert(0, "third_party")
import build_backend
settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
for hook in (build_backend.get_requires_for_build_wheel,
             build_backend.get_requires_for_build_editable):
    print([name for name in hook(settings) if "cutlass" in name])
"""


@pytest.mark.parametrize(
    ("environment", "settings", "asked"),
    [
        ({}, [], False),
        ({"FASTQ_CUDA": "OFF"}, ["cmake.define.FASTQ_CUDA=ON"], True),
        ({"FASTQ_CUDA_ARCHS": "90a"}, [], True),
        ({"FASTQ_CUDA_ARCHS": "90a"}, ["cmake.define.FASTQ_CUDA=OFF"], False),
        ({"FASTQ_CUDA_ARCHS": "90a", "CUTLASS_DIR": "/some/checkout"}, [], False),
        ({"CMAKE_ARGS": "-DFASTQ_CUDA_ARCHS:STRING=90a"}, [], True),
    ],
)
def test_cutlass_is_asked_for_exactly_when_cuda_will_be_built(
    machine: Machine, environment: dict[str, str], settings: list[str], asked: bool
) -> None:
    nvcc = machine.program("nvcc")
    # Without a GPU to be seen, FASTQ_CUDA=ON takes its architectures from the settings.
    if "cmake.define.FASTQ_CUDA=ON" in settings:
        settings = [*settings, "cmake.define.FASTQ_CUDA_ARCHS=90a"]
    clean = {name: value for name, value in os.environ.items() if "FASTQ" not in name}
    env = {**clean, "CUDA_VISIBLE_DEVICES": "", "CUDACXX": str(nvcc), **environment}
    answer = subprocess.run(
        [sys.executable, "-c", REQUIRES, *settings],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert answer.split("\n")[:2] == [str(["nvidia-cutlass==4.2.0.0"] if asked else [])] * 2


@pytest.mark.parametrize(
    ("defines", "message"),
    [
        (["-DFASTQ_CUDA=ON"], "no CUDA compiler was found"),
        (["-DFASTQ_CUDA=perhaps"], "expected AUTO, ON or OFF"),
    ],
)
def test_cmake_refuses_what_it_cannot_build(
    tmp_path: Path, defines: list[str], message: str
) -> None:
    result = subprocess.run(
        [
            *(find_tool("cmake"), "-S", REPOSITORY, "-B", tmp_path / "build", "-G", "Ninja"),
            *(f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", *defines),
        ],
        env={**os.environ, "CUDACXX": str(tmp_path / "absent"), "FASTQ_CUDA_ARCHS": "90a"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


# ---- the repository -----------------------------------------------------------------------------


def test_formatters_have_one_version() -> None:
    """pre-commit and the constraints agree, or a commit would fail in CI that passed at home."""
    pins = dict(
        re.findall(
            r"^(ruff|clang-format)==(\S+)$",
            (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    )
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert dict(re.findall(r"\b(ruff|clang-format)==([\d.]+)", hooks)) == pins
    assert pins.keys() == {"ruff", "clang-format"}
