"""LLM.int8() as transformers saves it with bitsandbytes.

A quantised linear layer is `weight` int8 (N, K), `SCB` float32 (N,), the largest magnitude of each
row, so that weight * SCB[:, None] / 127 is the float weight, and `weight_format`, a uint8 0 for
"row". config.json holds transformers' `BitsAndBytesConfig`.

Source: bitsandbytes 0.50 (nn/modules.py), transformers 5 (quantizers/quantizer_bnb_8bit.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..nn.outlier_linear import check_threshold
from .linear_state import LinearState, Stored

METHOD = "bitsandbytes"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class BitsAndBytes:
    """A checkpoint whose INT8 weights are those of LLM.int8(), with one threshold."""

    threshold: float
    source: str

    @classmethod
    def from_config(cls, raw: dict[str, Any], source: str) -> BitsAndBytes:
        """Reads the `quantization_config` of a config.json; `source` is named in the messages.

        Raises NotImplementedError for another format than INT8.
        """
        if not raw.get("load_in_8bit", raw.get("_load_in_8bit", False)):
            raise NotImplementedError(
                f"{source}: quantization_config is bitsandbytes' without load_in_8bit; expected "
                "LLM.int8()"
            )
        if raw.get("llm_int8_has_fp16_weight"):
            raise NotImplementedError(
                f"{source}: llm_int8_has_fp16_weight is not supported; expected INT8 weights"
            )
        threshold = raw.get("llm_int8_threshold", 6.0)
        return cls(check_threshold(f"{source}: llm_int8_threshold", threshold), source)

    def quantizes(self, name: str, dtype: str | None) -> bool:
        """Whether the linear layer is quantised; `dtype` is that of its stored weight."""
        return dtype == "I8"

    def tensors(self, name: str, n: int, k: int, bias: bool) -> dict[str, Stored]:
        """The tensors that a quantised linear layer of (n, k) consists of."""
        stored = {
            "weight": Stored(((n, k),), frozenset({"I8"})),
            "SCB": Stored(((n,),), frozenset({"F32"})),
            "weight_format": Stored(((), (1,)), frozenset({"U8"}), required=False),
        }
        if bias:
            stored["bias"] = Stored(((n,),), _FLOATS)
        return {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}

    def read(self, name: str, tensor: Callable[[str], Tensor | None]) -> LinearState:
        """The layer, from what `tensor` gives for the names of :meth:`tensors`.

        Raises ValueError for magnitudes that are negative or not finite, and NotImplementedError
        for a weight that is not stored row by row.
        """
        kind = tensor(f"{name}.weight_format")
        if kind is not None and int(kind) != 0:
            raise NotImplementedError(
                f"{self.source}: {name}.weight_format is {int(kind)}, expected 0 (row); load and "
                "save the checkpoint with a newer bitsandbytes"
            )
        largest = tensor(f"{name}.SCB")
        if not bool(((largest >= 0) & largest.isfinite()).all()):
            raise ValueError(
                f"{self.source}: {name}.SCB has elements that are negative or not finite"
            )
        scale = torch.where(largest == 0, 1.0, largest / 127)
        bias = tensor(f"{name}.bias")
        return LinearState(
            "llm_int8",
            tensor(f"{name}.weight"),
            scale,
            None if bias is None else bias.float(),
            threshold=self.threshold,
        )


def write_config(threshold: float, floats: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model, with the linear layers that are left in float."""
    return {
        "_load_in_4bit": False,
        "_load_in_8bit": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": floats,
        "llm_int8_threshold": threshold,
        "load_in_4bit": False,
        "load_in_8bit": True,
        "quant_method": METHOD,
    }


def write(name: str, state: LinearState) -> dict[str, Tensor]:
    """The tensors of one layer, but for its bias."""
    return {
        f"{name}.weight": state.weight,
        f"{name}.SCB": _largest(state.weight_scale),
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _largest(scale: Tensor) -> Tensor:
    """The SCB that gives the scale again when it is divided by 127, bit for bit if there is one:
    a rounded product may be off by one."""
    near = scale * 127
    for direction in (0.0, float("inf")):
        other = torch.nextafter(near, torch.full_like(near, direction))
        near = torch.where((near / 127 != scale) & (other / 127 == scale), other, near)
    return near
