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
