"""Decides whether fastq's CUDA backend is built, with which compiler and for which GPUs.

The one place of this decision: CMake runs this file (third_party/cuda.cmake) and the PEP 517
wrapper imports it (build_backend.py), so what is asked of the package index and what is compiled
cannot differ. Standard library only.

    FASTQ_CUDA=OFF   no CUDA backend
    FASTQ_CUDA=ON    CUDA backend; an error without a compiler or without architectures
    FASTQ_CUDA=AUTO  CUDA backend when a compiler is found and either FASTQ_CUDA_ARCHS is set or a
                     GPU is visible
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping

CUTLASS_REQUIREMENT = "nvidia-cutlass==4.2.0.0"
RELEASE_ARCHS = "80;90a;100;120"

_DEFAULT_TOOLKIT = "/usr/local/cuda"
_WORDS = {
    "AUTO": "AUTO",
    **dict.fromkeys(("ON", "1", "TRUE", "YES"), "ON"),
    **dict.fromkeys(("OFF", "0", "FALSE", "NO"), "OFF"),
}


class PlanError(Exception):
    """What was asked for cannot be built here; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class CudaPlan:
    """The decision. ``archs`` holds names such as ``80`` or ``90a``; empty without CUDA."""

    cuda: bool
    reason: str
    compiler: str = ""
    archs: tuple[str, ...] = ()


def parse_archs(text: str) -> tuple[str, ...]:
    """Splits ``80;90a`` (also with commas or spaces); duplicates go, the order stays."""
    archs = tuple(dict.fromkeys(re.split(r"[;,\s]+", text.strip(" ;,\t\n")))) if text else ()
    archs = tuple(arch for arch in archs if arch)
    for arch in archs:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", arch):
            raise PlanError(
                f"FASTQ_CUDA_ARCHS: expected names such as {RELEASE_ARCHS}, got {arch!r}"
            )
        if int(arch.rstrip("af")) < 80:
            raise PlanError(f"FASTQ_CUDA_ARCHS: fastq needs compute capability 8.0, got {arch!r}")
    return archs


def find_compiler(env: Mapping[str, str]) -> str:
    """The path of nvcc, or ''. A compiler named outright is never replaced by another one."""
    named = env.get("CMAKE_CUDA_COMPILER") or env.get("CUDACXX")
    if named:
        return shutil.which(named, path=env.get("PATH", "")) or ""
    on_path = shutil.which("nvcc", path=env.get("PATH", ""))
    if on_path:
        return on_path
    for toolkit in (env.get("CUDA_HOME"), env.get("CUDA_PATH"), _DEFAULT_TOOLKIT):
        found = shutil.which("nvcc", path=os.path.join(toolkit, "bin")) if toolkit else None
        if found:
            return found
    return ""


def visible_archs(env: Mapping[str, str]) -> tuple[str, ...]:
    """The architectures of the GPUs that nvidia-smi lists; Hopper is ``90a``, which WGMMA needs."""
    if env.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles"):
        return ()
    smi = shutil.which("nvidia-smi", path=env.get("PATH", ""))
    if not smi:
        return ()
    try:
        answer = subprocess.run(
            [smi, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    capabilities = sorted(
        {(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)", answer, re.M)}
    )
    return tuple(
        f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
        for major, minor in capabilities
        if major >= 8
    )


def make_plan(env: Mapping[str, str]) -> CudaPlan:
    """Decides from FASTQ_CUDA, FASTQ_CUDA_ARCHS and the compiler and GPUs that ``env`` reaches.

    Raises PlanError for an unknown word, a bad architecture, or FASTQ_CUDA=ON that cannot be met.
    """
    asked = env.get("FASTQ_CUDA", "").strip() or "AUTO"
    mode = _WORDS.get(asked.upper())
    if mode is None:
        raise PlanError(f"FASTQ_CUDA: expected AUTO, ON or OFF, got {asked!r}")
    if mode == "OFF":
        return CudaPlan(False, "FASTQ_CUDA=OFF")

    archs = parse_archs(env.get("FASTQ_CUDA_ARCHS", ""))
    compiler = find_compiler(env)
    if not compiler:
        if mode == "ON":
            raise PlanError(
                "FASTQ_CUDA=ON, but no CUDA compiler was found (looked at CMAKE_CUDA_COMPILER, "
                f"CUDACXX, PATH, CUDA_HOME, CUDA_PATH and {_DEFAULT_TOOLKIT}). Install the CUDA "
                "toolkit or set CUDACXX to its nvcc, or set FASTQ_CUDA=OFF for a CPU-only build."
            )
        return CudaPlan(False, "no CUDA compiler found")
    if archs:
        return CudaPlan(True, "FASTQ_CUDA_ARCHS is set", compiler, archs)
    archs = visible_archs(env)
    if archs:
        return CudaPlan(True, "a GPU is visible", compiler, archs)
    if mode == "ON":
        raise PlanError(
            "FASTQ_CUDA=ON, but no GPU of compute capability 8.0 or newer is visible here to take "
            "the architectures from. Name them, for example FASTQ_CUDA_ARCHS=90a, or "
            f"FASTQ_CUDA_ARCHS='{RELEASE_ARCHS}' for a release."
        )
    return CudaPlan(False, f"{compiler} found, but no GPU is visible and FASTQ_CUDA_ARCHS is unset")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="NAME=VALUE",
        help="takes precedence over the environment; an empty value leaves the environment's",
    )
    env = dict(os.environ)
    for setting in parser.parse_args().settings:
        name, _, value = setting.partition("=")
        if value:
            env[name] = value
    try:
        plan = make_plan(env)
    except PlanError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({**dataclasses.asdict(plan), "archs": ";".join(plan.archs)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
