"""Generation on torch tensors: a cache of keys and values, and attention to it."""

from __future__ import annotations

from torch import Tensor

from .attention import check_softmax_scale, check_window, with_unit_stride
from .ops import check_tensors, is_direct
from .torch_library import (
    flash_decode_append_kernel,
    flash_decode_append_op,
    flash_decode_append_out_kernel,
    flash_decode_append_out_op,
    flash_decode_kernel,
    flash_decode_op,
    flash_decode_out_kernel,
    flash_decode_out_op,
    kv_append_kernel,
    kv_append_op,
    kv_append_rotate_kernel,
    kv_append_rotate_op,
    kv_append_rotate_out_kernel,
    kv_append_rotate_out_op,
)

# The op, the kernel where it is called directly, and the same with an out.
_ATTEND = (flash_decode_op, flash_decode_kernel, flash_decode_out_op, flash_decode_out_kernel)
_APPEND_AND_ATTEND = (
    flash_decode_append_op,
    flash_decode_append_kernel,
    flash_decode_append_out_op,
    flash_decode_append_out_kernel,
)


def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`flash_attention` of a few queries to a cache of keys and values.

    The queries are the last seqlen_q tokens of each sequence: ``p(i) = i + cache_seqlens[b] -
    seqlen_q`` is where query i stands among the keys. So with ``causal``, the queries of a prompt's
    padding on the left (``p(i) < 0``) have out 0 and lse -inf. Keys are divided among the
    processors and the parts combined in a fixed order: the same lengths give the same bits.

    Args:
        q: float32 (on CPUs), float16 or bfloat16 ``(batch, seqlen_q, num_heads, head_dim)``, any
            strides; where head_dim's is not 1 a copy is made. head_dim is at most 256.
        k_cache, v_cache: of q's dtype or int8, ``(batch, capacity, num_heads_k, head_dim)``; with
            ``block_table`` pages ``(num_pages, page_size, num_heads_k, head_dim)``, page_size a
            power of two and at least 16. Any strides but head_dim's, which is 1; on CUDA, rows that
            begin at multiples of 16 bytes are read faster. num_heads_k divides num_heads.
        cache_seqlens: int32 ``(batch,)``, the tokens of each sequence, from 0 to the capacity, the
            queries' own included. What lies past them is not read. They and ``block_table`` are
            read on the device only, so that a CUDA graph may be replayed with others; there they
            are not checked.
        block_table: int32 ``(batch, max_pages)``: token t of sequence b is token ``t % page_size``
            of page ``block_table[b, t // page_size]``. Entries past a sequence's end are not read.
        k_scale, v_scale: of an int8 cache, float32 ``(batch, capacity, num_heads_k)`` or
            ``(num_pages, page_size, num_heads_k)``, any strides: multipliers as those of
            :func:`quantize_per_token`, ``k ~ k_cache * k_scale[..., None]``. Read fastest where
            those of a head's tokens lie side by side, as in ``(batch, num_heads_k, capacity)``
            transposed.
        causal: query i attends to the keys ``j <= p(i)`` only.
        softmax_scale, window, softcap, alibi_slopes: as in :func:`flash_attention`.
        return_lse: return ``(out, lse)``.
        out: like q, to write into; no overlap with an input.
        k, v: of q's dtype, ``(batch, seqlen_q, num_heads_k, head_dim)``: the new tokens, appended
            first, and the queries rotated, as by :func:`kv_append` with the rotary arguments and
            q; q itself stays. The bits are those of the two calls; a single sequence with one
            token takes one kernel on CUDA.
        rotary_cos, rotary_sin, rotary_interleaved: as in :func:`kv_append`; with k and v only.

    Returns:
        ``out`` like q, contiguous; with ``return_lse`` also ``lse`` float32
        ``(batch, num_heads, seqlen_q)``, natural logarithm.

    Raises:
        ValueError: a shape, a size, a number, an overlap, or a tensor that requires grad; on a CPU
            also a length or a page out of range.
        TypeError: a dtype, a device, or not a tensor.
        NotImplementedError: fastq has no kernel for the device and dtype.

    Source: Flash-Decoding (Dao et al., 2023); pages: PagedAttention (Kwon et al., 2023).
    """
    optional = {
        "block_table": block_table,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "alibi_slopes": alibi_slopes,
        "out": out,
        "k": k,
        "v": v,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
    }
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    cache = {"k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": cache_seqlens}
    check_tensors("flash_decode", q=q, **cache, **given)
    if ("k" in given) != ("v" in given):
        raise ValueError("flash_decode: only one of k and v is given")
    if "k" not in given and given.keys() & {"rotary_cos", "rotary_sin"}:
        raise ValueError("flash_decode: a rotary table is given, but k and v are not")
    left, right = check_window("flash_decode", window)
    arguments = (
        *with_unit_stride(q),
        *cache.values(),
        block_table,
        k_scale,
        v_scale,
        check_softmax_scale("flash_decode", softmax_scale, q),
        bool(causal),
        left,
        right,
        float(softcap),
        alibi_slopes,
    )
    direct = is_direct(q, *cache.values(), *given.values())
    op, kernel, out_op, out_kernel = _ATTEND
    if "k" in given:
        op, kernel, out_op, out_kernel = _APPEND_AND_ATTEND
        arguments += (*with_unit_stride(k, v), rotary_cos, rotary_sin, bool(rotary_interleaved))
    if out is None:
        out, lse = (kernel if direct else op)(*arguments)
    else:
        lse = (out_kernel if direct else out_op)(*arguments, out)
    return (out, lse) if return_lse else out


def kv_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    q: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """Writes new keys and values to a cache, rotated (RoPE) and quantised where that is asked for.

    Row i of sequence b becomes token ``t = cache_seqlens[b] - seqlen_new + i``. A row whose token
    is negative (padding on the left) is left out; its query is returned as it is.

    With rotary tables the first ``R = 2 * rotary_cos.shape[1]`` elements of k, and of q where it is
    given, are rotated by pairs::

        (x, y) -> (x * cos[t, i] - y * sin[t, i], y * cos[t, i] + x * sin[t, i])

    Products and sums are rounded to float32 one by one, and the result once to k's dtype. An int8
    cache quantises the float32 numbers of each token and head as :func:`quantize_per_token` does.

    Args:
        k, v: float32 (on CPUs), float16 or bfloat16 ``(batch, seqlen_new, num_heads_k, head_dim)``,
            any strides; where head_dim's is not 1 a copy is made.
        k_cache, v_cache, block_table, k_scale, v_scale: as in :func:`flash_decode`. The caches and
            scales are written, so they overlap nothing.
        cache_seqlens: int32 ``(batch,)``, the tokens of each sequence, the new ones included.
        rotary_cos, rotary_sin: ``(max_seqlen, R / 2)``, float32 or k's dtype, with a row for every
            token of a sequence (on CUDA this is not checked, and later tokens take the last row).
        rotary_interleaved: pair i is elements ``2 * i`` and ``2 * i + 1`` (GPT-J), not ``i`` and
            ``i + R / 2`` (GPT-NeoX, LLaMA).
        q: ``(batch, seqlen_new, num_heads, head_dim)``, to be rotated as k; with tables only.
        out: like q, to write the rotated q into. It may be q itself.

    Returns:
        The rotated q: ``out``, or a new contiguous tensor; None without q.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`flash_decode`.

    Source: RoFormer (Su et al., 2021).
    """
    optional = {
        "block_table": block_table,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "q": q,
        "out": out,
    }
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    cache = {"k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": cache_seqlens}
    check_tensors("kv_append", k=k, v=v, **cache, **given)
    if q is None and out is not None:
        raise ValueError("kv_append: out is given, but q is not")
    arguments = (
        *with_unit_stride(k, v),
        *cache.values(),
        block_table,
        k_scale,
        v_scale,
        rotary_cos,
        rotary_sin,
        bool(rotary_interleaved),
    )
    direct = is_direct(k, v, *cache.values(), *given.values())
    if q is None:
        (kv_append_kernel if direct else kv_append_op)(*arguments)
        return None
    if out is None:
        run = kv_append_rotate_kernel if direct else kv_append_rotate_op
        return run(*arguments, *with_unit_stride(q))
    run = kv_append_rotate_out_kernel if direct else kv_append_rotate_out_op
    run(*arguments, q if out is q else with_unit_stride(q)[0], out)
    return out
