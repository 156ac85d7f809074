"""fastq.settled_weights: whose promise it is; work that starts early waits all the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastq
import reference
from fastq import _core


def is_promised() -> bool:
    before = _core.set_settled_weights(False)
    _core.set_settled_weights(before)
    return before


def test_the_promise_ends_with_its_scope():
    assert not is_promised()
    with fastq.settled_weights():
        assert is_promised()
        with fastq.settled_weights():
            assert is_promised()
        assert is_promised()
    assert not is_promised()


def test_an_error_ends_the_scope():
    with pytest.raises(ValueError, match="from within"), fastq.settled_weights():
        raise ValueError("from within")
    assert not is_promised()


def test_another_thread_has_promised_nothing():
    with fastq.settled_weights(), ThreadPoolExecutor(1) as threads:
        assert not threads.submit(is_promised).result()
        assert is_promised()


def test_the_bits_are_the_same(device):
    torch.manual_seed(0)
    w, sw = fastq.quantize_per_channel(torch.randn(96, 64, device=device))
    x = torch.randn(5, 64, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()

    def product() -> torch.Tensor:
        q, s = fastq.quantize_per_token(x)
        return fastq.int8_gemm(q, w.t(), s, sw, b_is_constant=True)

    expected = reference.to_numpy(product())
    with fastq.settled_weights():
        reference.assert_same(product(), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("M", [1, 16, 200])
def test_every_kernel_of_a_chain_sees_what_came_before(M):
    """What a kernel reads is the work of one that it may have started before: norm, product,
    quantisation, product, and so on, each from the last; with and without a graph."""
    cuda = torch.device("cuda")
    torch.manual_seed(0)
    hidden, inner, layers = 1024, 2816, 12
    weights = [
        (
            fastq.quantize_per_channel(torch.randn(2 * inner, hidden, device=cuda) / 32),
            fastq.quantize_per_channel(torch.randn(hidden, inner, device=cuda) / 53),
        )
        for _ in range(layers)
    ]
    gain = torch.ones(hidden, device=cuda, dtype=torch.float16)
    x = torch.randn(M, hidden, device=cuda, dtype=torch.float16)

    def wait() -> None:
        torch.cuda.synchronize()

    def chain(between=lambda: None) -> torch.Tensor:
        delta = x.clone()
        h = x
        for (up, up_scale), (down, down_scale) in weights:
            q, s, h = fastq.rms_norm_quant(h, gain, residual=delta)
            between()
            both = fastq.int8_gemm(
                q, up.t(), s, up_scale, b_is_constant=True, out_dtype=torch.float16
            )
            between()
            gate, other = both.split(inner, -1)
            q, s = fastq.silu_mul_quant(gate, other)
            between()
            delta = fastq.int8_gemm(
                q, down.t(), s, down_scale, b_is_constant=True, out_dtype=torch.float16
            )
            between()
        return h + delta

    wait()
    expected = reference.to_numpy(chain(wait))
    with fastq.settled_weights():
        for _ in range(20):
            reference.assert_same(chain(), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = chain()
    for _ in range(20):
        replayed.fill_(torch.nan)
        graph.replay()
        reference.assert_same(replayed, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("cache", ["float16", "int8", "paged", "strided"])
@pytest.mark.parametrize("lengths", [[1], [600], [63, 64, 65, 200], [40, 512, 3, 0] * 10])
@pytest.mark.parametrize("seqlen", [1, 3])
def test_attention_sees_the_tokens_just_appended(cache, lengths, seqlen):
    """Of several layers: product, tokens to the cache, attention to it, product, and so on. What is
    read before it was appended is another token."""
    cuda = torch.device("cuda")
    torch.manual_seed(0)
    heads, heads_k, head_dim, capacity, layers = 8, 4, 128, 640, 6
    batch, width, page_size = len(lengths), (heads + 2 * heads_k) * head_dim, 64
    ups, downs = (
        [fastq.quantize_per_channel(torch.randn(n, k, device=cuda) / k**0.5) for _ in range(layers)]
        for n, k in ((width, heads * head_dim), (heads * head_dim, heads * head_dim))
    )
    x = torch.randn(batch * seqlen, heads * head_dim, device=cuda, dtype=torch.float16)
    angles = torch.rand(capacity, head_dim // 2, device=cuda) * 6
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    options = {}
    shape = (batch, capacity, heads_k, head_dim + 8 * (cache == "strided"))
    if cache == "paged":
        pages = capacity // page_size
        table = torch.randperm(batch * pages, device=cuda).int()
        options["block_table"] = table.reshape(batch, pages)
        shape = (batch * pages, page_size, heads_k, head_dim)
    old = torch.randn(2, layers, *shape, device=cuda).half()
    if cache == "int8":
        old = (old * 30).round().clamp(-127, 127).to(torch.int8)
    keys, values = torch.empty_like(old)[..., :head_dim]
    scales = torch.empty(2, layers, batch, capacity, heads_k, device=cuda)
    seqlens = torch.empty(batch, dtype=torch.int32, device=cuda)

    def rewind() -> None:
        keys.copy_(old[0, ..., :head_dim])
        values.copy_(old[1, ..., :head_dim])
        scales.fill_(1 / 30)
        seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        torch.cuda.synchronize()

    def step(between=lambda: None) -> torch.Tensor:
        seqlens.add_(seqlen)
        h = x + 0
        for layer, ((up, up_scale), (down, down_scale)) in enumerate(zip(ups, downs, strict=True)):
            its = dict(options)
            if cache == "int8":
                its.update(k_scale=scales[0, layer], v_scale=scales[1, layer])
            qx, sx = fastq.quantize_per_token(h)
            between()
            qkv = fastq.int8_gemm(
                qx, up.t(), sx, up_scale, b_is_constant=True, out_dtype=torch.float16
            ).view(batch, seqlen, heads + 2 * heads_k, head_dim)
            between()
            q, k, v = qkv.split([heads, heads_k, heads_k], 2)
            store = (keys[layer], values[layer], seqlens)
            q = fastq.kv_append(k, v, *store, **its, **tables, q=q)
            between()
            attended = fastq.flash_decode(q, *store, **its).view(batch * seqlen, -1)
            between()
            qx, sx = fastq.quantize_per_token(attended)
            h = fastq.int8_gemm(
                qx, down.t(), sx, down_scale, b_is_constant=True, out_dtype=torch.float16
            )
            between()
        return h

    def settled_step() -> torch.Tensor:
        with fastq.settled_weights():
            return step()

    rewind()
    expected = [reference.to_numpy(step(torch.cuda.synchronize)) for _ in range(3)]
    rewind()
    for out, its in zip([settled_step() for _ in range(3)], expected, strict=True):
        reference.assert_same(out, its)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = settled_step()
    for _ in range(10):
        rewind()
        for its in expected:
            graph.replay()
            reference.assert_same(replayed, its)
