"""libfastq in C and C++ programs that have neither Python nor torch."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from conftest import REPOSITORY, NativeBuild, find_tool, run_tool

SYSTEM_LIBRARIES = {
    "libfastq.so.0",
    "libc.so.6",
    "libm.so.6",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
}


def readme_block(language: str) -> str:
    """The one fenced block of that language in README.md that is a whole program."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"README.md holds {len(blocks)} {language} blocks, expected one"
    return blocks[0]


@pytest.fixture(scope="module")
def programs(native_build: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs, built against the installed tree alone."""
    folder = tmp_path_factory.mktemp("embed")
    source = folder / "readme.c"
    source.write_text(readme_block("c"), encoding="utf-8")
    cmake = find_tool("cmake")
    run_tool(
        *(cmake, "-S", REPOSITORY / "tests" / "cpp" / "embed", "-B", folder / "build"),
        *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"),
        f"-DCMAKE_PREFIX_PATH={native_build.prefix}",
        f"-DREADME_EXAMPLE={source}",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
    )
    run_tool(cmake, "--build", folder / "build")
    return folder / "build"


def run_alone(program: Path) -> list[str]:
    """Runs a program without an environment, so that nothing but its own rpath finds libraries."""
    result = subprocess.run([program], capture_output=True, text=True, env={}, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def matrix(lines: list[str]) -> np.ndarray:
    return np.array([[float(word) for word in line.split()] for line in lines])


def pattern(rows: int, cols: int, step: int) -> np.ndarray:
    return (np.arange(rows * cols) * step % 255 - 127).reshape(rows, cols)


def test_c_program(programs: Path) -> None:
    *rows, error = run_alone(programs / "embed_c")
    a, w = pattern(3, 70, 37), pattern(5, 70, 91)
    scale_a, scale_b = 0.01 * np.arange(1, 4), 0.002 * np.arange(1, 6)
    expected = (a @ w.T) * scale_a[:, None] * scale_b + 0.5 * np.arange(5)
    np.testing.assert_allclose(matrix(rows), expected, rtol=1e-5, atol=1e-5)
    assert error.startswith("error: int8_gemm")
    assert "69" in error  # the K that came


def test_cpp_program(programs: Path) -> None:
    *rows, error = run_alone(programs / "embed_cpp")
    x = ((np.arange(4 * 50) * 29 % 101) / 16 - 3).astype(np.float32).reshape(4, 50)
    w = ((np.arange(6 * 50) * 53 % 97) / 64 - 0.75).astype(np.float32).reshape(6, 50)

    def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
        return np.rint(values / scale).astype(np.int64), scale.astype(np.float64)

    (qx, scale_x), (qw, scale_w) = quantize(x), quantize(w)
    expected = (qx @ qw.T) * scale_x * scale_w.T
    np.testing.assert_allclose(matrix(rows), expected, rtol=1e-5, atol=1e-6)
    assert error.startswith("error: int8_gemm")
    assert "uint8" in error


def test_readme_c_program(programs: Path) -> None:
    """The program multiplies a by w.T, both written out in README.md, with scales 0.5 and 0.25."""
    expected = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]) @ np.array([[1, 0, -1, 0], [2, 2, 2, 2]]).T
    np.testing.assert_allclose(matrix(run_alone(programs / "readme_c")), expected * 0.125)


@pytest.mark.parametrize("program", ["embed_c", "embed_cpp", "readme_c"])
def test_program_needs_neither_python_nor_torch(programs: Path, program: str) -> None:
    loaded = run_tool(find_tool("ldd"), programs / program, env={"PATH": os.defpath})
    names = set(re.findall(r"^\s*(?:/\S*/)?([^\s/]+\.so\S*)", loaded, re.MULTILINE))
    assert "libfastq.so.0" in names
    assert names - {"linux-vdso.so.1"} <= SYSTEM_LIBRARIES

    commands = (programs / "compile_commands.json").read_text(encoding="utf-8")
    folders = set(re.findall(r"-(?:I|isystem) ?([^\s\"]+)", commands))
    assert len(folders) == 1, folders  # the installed headers
    assert sorted(path.name for path in Path(folders.pop()).iterdir()) == ["fastq"]


def test_native_tests(native_build: NativeBuild) -> None:
    """The C++ tests, in tests/cpp."""
    ctest = find_tool("ctest")
    output = run_tool(
        *(ctest, "--test-dir", native_build.build, "--output-on-failure", "--no-tests=error")
    )
    assert "100% tests passed" in output


def test_shared_library_keeps_its_abi_version(native_build: NativeBuild) -> None:
    library = native_build.prefix / "lib" / "libfastq.so"
    assert library.resolve().name == "libfastq.so.0.1.0"
    assert (native_build.prefix / "share" / "licenses" / "fastq" / "LICENSE").is_file()
