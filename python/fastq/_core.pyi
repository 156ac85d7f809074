from collections.abc import Callable
from typing import Any

from torch import Tensor, dtype

def version() -> str: ...
def describe() -> str: ...
def set_num_threads(num_threads: int) -> None: ...
def get_num_threads() -> int: ...
def set_settled_weights(are_settled: bool) -> bool: ...
def set_mode_probes(
    is_grad_enabled: Callable[[], bool], probes: tuple[Callable[[], Any], ...]
) -> None: ...
def is_direct(*tensors: Tensor | None) -> bool: ...
def int8_gemm(
    a: Tensor,
    b: Tensor,
    sa: Tensor | None,
    sb: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    packed_shape: list[int] | tuple[int, int] | None,
    b_is_constant: bool,
    residual: Tensor | None,
    activation: str | None,
    zero_point: Tensor | None,
    column_sums: Tensor | None,
    out_scale: Tensor | None,
) -> None: ...
def int8_gemm_direct(
    a: Tensor,
    b: Tensor,
    sa: Tensor | None,
    sb: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    out_dtype: dtype | None,
    packed_shape: list[int] | tuple[int, int] | None,
    b_is_constant: bool,
    *options: Any,  # none, or the last five of int8_gemm
) -> Tensor | None: ...
def int8_gemm_describe(
    a: Tensor,
    b: Tensor,
    sa: Tensor | None,
    sb: Tensor | None,
    out: Tensor,
    packed_shape: list[int] | tuple[int, int] | None,
    out_scale: Tensor | None,
    b_is_constant: bool,
) -> str: ...
def int8_gemm_candidates(
    a: Tensor,
    b: Tensor,
    sa: Tensor | None,
    sb: Tensor | None,
    out: Tensor,
    b_is_constant: bool,
) -> str: ...
def pack_weight(b: Tensor) -> Tensor: ...
def quantize_per_token(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    rotation: int,
    smooth: Tensor | None,
    zero_point: Tensor | None,
    is_static: bool,
) -> None: ...
def quantize_per_channel(w: Tensor, q: Tensor, scale: Tensor, rotation: int) -> None: ...
def norm_quant(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    rotation: int,
    smooth: Tensor | None,
    zero_point: Tensor | None,
    is_static: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_out: Tensor | None,
    norm: str,
    eps: float,
) -> None: ...
def activation_quant(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    rotation: int,
    smooth: Tensor | None,
    zero_point: Tensor | None,
    is_static: bool,
    up: Tensor | None,
    activation: str | None,
) -> None: ...
def dequantize(q: Tensor, scale: Tensor, out: Tensor) -> None: ...
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None: ...
def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    out: Tensor,
    lse: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
) -> None: ...
def kv_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    q: Tensor | None,
    out: Tensor | None,
) -> None: ...
def llm_int8_matmul(
    x: Tensor,
    w: Tensor,
    sw: Tensor,
    threshold: float,
    bias: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
    w_is_constant: bool,
    out: Tensor,
    outlier_count: Tensor | None,
) -> None: ...
