"""Where a figure is from: the commit, the versions and the machine that it was measured on."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from . import __version__, ops


def provenance(device: torch.device, repository: Path | None = None) -> dict[str, Any]:
    """The time (UTC), the commit and whether the tree differs from it, fastq's and torch's
    versions, the device by name and what it is driven by.

    The commit is that of `repository`, or of the checkout that fastq's modules are part of;
    "unknown" where there is none, as of an installed wheel.
    """
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"time": stamp, **_environment(device, repository)}


@functools.cache
def _environment(device: torch.device, repository: Path | None) -> dict[str, Any]:
    """What stays as it is while a program runs."""
    commit, dirty = find_commit(repository)
    fields = {
        "commit": commit,
        "dirty": dirty,
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastq": __version__,
    }
    if device.type == "cuda":
        cuda = ops.describe()["cuda"]
        query = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        fields |= {
            "driver": _output("nvidia-smi", *query),
            "cuda": torch.version.cuda,
            "fastq_cuda": {name: cuda[name] for name in ("archs", "runtime", "driver", "cutlass")},
        }
    else:
        fields |= {
            "driver": None,
            "isa": ops.describe()["cpu"]["isa"],
            "threads": ops.get_num_threads(),
            "torch_threads": torch.get_num_threads(),
        }
    return fields


def find_commit(repository: Path | None = None) -> tuple[str, bool | None]:
    """The commit and whether the tree differs from it, stored benchmark results aside:
    FASTQ_COMMIT and FASTQ_DIRTY, for a tree that git does not know, or what git says."""
    if "FASTQ_COMMIT" in os.environ:
        dirty = os.environ.get("FASTQ_DIRTY")
        return os.environ["FASTQ_COMMIT"], None if dirty is None else dirty == "1"
    if repository is None:
        # A wheel may lie in a virtual environment inside a checkout of something else.
        here = Path(__file__).resolve()
        if not _output("git", "-C", str(here.parent), "ls-files", here.name):
            return "unknown", None
        repository = here.parents[2]
    git = ("git", "-C", str(repository))
    commit = _output(*git, "rev-parse", "HEAD")
    if commit is None:
        return "unknown", None
    return commit, bool(_output(*git, "status", "--porcelain", "--", ":!bench/results"))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
