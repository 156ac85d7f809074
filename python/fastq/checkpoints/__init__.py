"""Checkpoints of quantised models, in the formats of compressed-tensors and bitsandbytes."""

from .linear_state import Stored
from .read import (
    Quantization,
    build_linears,
    expected_tensors,
    quantised_linears,
    quantization_of,
)
from .save import save_quantized
from .stored_linears import StoredLinear

__all__ = [
    "Quantization",
    "Stored",
    "StoredLinear",
    "build_linears",
    "expected_tensors",
    "quantised_linears",
    "quantization_of",
    "save_quantized",
]
