"""PEP 517 wrapper around scikit-build-core: asks for CUTLASS exactly when CUDA will be built.

The settings are read where scikit-build-core reads them: -Ccmake.define.NAME=VALUE, CMAKE_ARGS,
then the plain environment variables of the same names. The decision is handed on to CMake as
defines, so that a rebuild of an editable install, later and in another environment, keeps it.
"""

from __future__ import annotations

import os
import shlex

from scikit_build_core import build as _backend

import cuda_plan

build_sdist = _backend.build_sdist
get_requires_for_build_sdist = _backend.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = _backend.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _backend.prepare_metadata_for_build_editable

_SETTINGS = ("FASTQ_CUDA", "FASTQ_CUDA_ARCHS", "CMAKE_CUDA_COMPILER", "CUTLASS_DIR")


def _settings_env(config_settings) -> dict[str, str]:
    """The environment, overlaid with what the caller defines for CMake."""
    env = dict(os.environ)
    for argument in shlex.split(os.environ.get("CMAKE_ARGS", "")):
        name, _, value = argument.removeprefix("-D").partition("=")
        name = name.partition(":")[0]
        if argument.startswith("-D") and name in _SETTINGS:
            env[name] = value
    for key, value in (config_settings or {}).items():
        name = key.removeprefix("skbuild.").removeprefix("cmake.define.")
        if name != key and name in _SETTINGS:
            env[name] = value if isinstance(value, str) else ";".join(value)
    return env


def _plan(env) -> cuda_plan.CudaPlan:
    try:
        return cuda_plan.make_plan(env)
    except cuda_plan.PlanError as error:
        raise SystemExit(f"fastq: {error}") from None  # no traceback: it is the user's to mend


def _requires(config_settings) -> list[str]:
    env = _settings_env(config_settings)
    needed = _plan(env).cuda and not env.get("CUTLASS_DIR")
    return [cuda_plan.CUTLASS_REQUIREMENT] if needed else []


def _with_plan(config_settings) -> dict:
    env = _settings_env(config_settings)
    plan = _plan(env)
    settings = {
        key: value
        for key, value in (config_settings or {}).items()
        if key.removeprefix("skbuild.").removeprefix("cmake.define.") not in _SETTINGS
    }
    settings["cmake.define.FASTQ_CUDA"] = "ON" if plan.cuda else "OFF"
    if plan.cuda:
        settings["cmake.define.FASTQ_CUDA_ARCHS"] = ";".join(plan.archs)
        settings["cmake.define.CMAKE_CUDA_COMPILER"] = plan.compiler
        if env.get("CUTLASS_DIR"):
            settings["cmake.define.CUTLASS_DIR"] = env["CUTLASS_DIR"]
    return settings


def get_requires_for_build_wheel(config_settings=None):
    return _backend.get_requires_for_build_wheel(config_settings) + _requires(config_settings)


def get_requires_for_build_editable(config_settings=None):
    return _backend.get_requires_for_build_editable(config_settings) + _requires(config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return _backend.build_wheel(wheel_directory, _with_plan(config_settings), metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return _backend.build_editable(wheel_directory, _with_plan(config_settings), metadata_directory)
