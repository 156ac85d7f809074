"""The structs of fastq.h for ctypes, and the library that `import fastq` has loaded."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

import fastq  # noqa: F401  (loads libfastq)

INVALID_VALUE, INVALID_TYPE, NOT_IMPLEMENTED = 1, 2, 3
CPU, CUDA = 0, 1
READ_ONLY = 1
_DTYPES = {
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int8: 4,
    torch.int32: 5,
    torch.uint8: 6,
}


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("sizes", ctypes.c_int64 * 8),
        ("strides", ctypes.c_int64 * 8),
    )


class Weight(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("data", Tensor),
        ("scale", Tensor),
        ("layout", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("column_sums", Tensor),
    )


class GemmArgs(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("a", Tensor),
        ("b", ctypes.POINTER(Weight)),
        ("scale_a", Tensor),
        ("bias", Tensor),
        ("out", Tensor),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t),
        ("allocate", ctypes.c_void_p),
        ("allocate_context", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("zero_point", Tensor),
        ("residual", Tensor),
        ("out_scale", Tensor),
        ("activation", ctypes.c_int32),
        ("b_is_constant", ctypes.c_int32),
    )


class QuantizeArgs(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("x", Tensor),
        ("q", Tensor),
        ("scale", Tensor),
        ("stream", ctypes.c_void_p),
        ("rotation", ctypes.c_int32),
        ("is_static", ctypes.c_int32),
        ("zero_point", Tensor),
        ("smooth", Tensor),
    )


class NormQuantArgs(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("quantize", ctypes.POINTER(QuantizeArgs)),
        ("weight", Tensor),
        ("bias", Tensor),
        ("residual", Tensor),
        ("residual_out", Tensor),
        ("eps", ctypes.c_float),
        ("norm", ctypes.c_int32),
    )


class ActivationQuantArgs(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("quantize", ctypes.POINTER(QuantizeArgs)),
        ("up", Tensor),
        ("activation", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class DequantizeArgs(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("q", Tensor),
        ("scale", Tensor),
        ("out", Tensor),
        ("stream", ctypes.c_void_p),
    )


def _load() -> ctypes.CDLL:
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libfastq.so"):
            library = ctypes.CDLL(path)
            library.fastq_last_error.restype = ctypes.c_char_p
            return library
    raise RuntimeError("libfastq is not loaded")


library = _load()


def last_error() -> str:
    return library.fastq_last_error().decode()


def view(x: torch.Tensor, *, device_type: int = CPU, flags: int = 0) -> Tensor:
    """A CPU tensor as the library sees it; `device_type` may lie about where it is."""
    result = Tensor(x.data_ptr(), _DTYPES[x.dtype], device_type, 0, x.dim(), flags)
    result.sizes[: x.dim()] = list(x.shape)
    result.strides[: x.dim()] = list(x.stride())
    return result


def with_size(struct: type, **fields: object) -> ctypes.Structure:
    """An argument struct whose first field holds its size."""
    return struct(struct_size=ctypes.sizeof(struct), **fields)
