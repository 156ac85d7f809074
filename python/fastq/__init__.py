"""fastq: INT8 transformer kernels and a small runtime on top of them."""

from . import distributions as _distributions

_distributions.warn_of_clash()

from . import nn  # noqa: E402
from ._core import version as _version  # noqa: E402
from .attention import flash_attention  # noqa: E402
from .checkpoints import save_quantized  # noqa: E402
from .decode import flash_decode, kv_append  # noqa: E402
from .llm_int8 import llm_int8_matmul  # noqa: E402
from .ops import (  # noqa: E402
    PackedWeight,
    dequantize,
    describe,
    describe_int8_gemm,
    get_num_threads,
    int8_gemm,
    pack_weight,
    set_num_threads,
    settled_weights,
)
from .quantization import quantize  # noqa: E402
from .quantize_ops import (  # noqa: E402
    gelu_quant,
    layer_norm_quant,
    quantize_per_channel,
    quantize_per_token,
    relu_quant,
    rms_norm_quant,
    silu_mul_quant,
)

__version__ = _version()

__all__ = [
    "PackedWeight",
    "dequantize",
    "describe",
    "describe_int8_gemm",
    "flash_attention",
    "flash_decode",
    "gelu_quant",
    "get_num_threads",
    "int8_gemm",
    "kv_append",
    "layer_norm_quant",
    "llm_int8_matmul",
    "nn",
    "pack_weight",
    "quantize",
    "quantize_per_channel",
    "quantize_per_token",
    "relu_quant",
    "rms_norm_quant",
    "save_quantized",
    "set_num_threads",
    "settled_weights",
    "silu_mul_quant",
]
