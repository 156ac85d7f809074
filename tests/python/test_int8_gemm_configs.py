"""Every CUDA configuration of int8_gemm, forced by name: sums, bits, graphs, streams."""

from __future__ import annotations

import pytest
import torch

import fastq
import reference
from operands import random_gemm, random_int8, random_scales

pytestmark = pytest.mark.cuda

# Tokens and channels are no multiples of any tile, K none of a stage.
# In the last one a block of every instance has several tiles.
SHAPES = [(1, 72, 16), (7, 200, 400), (70, 328, 1168), (300, 1000, 272), (131, 136, 2048)]
SHAPES += [(1030, 3080, 400)]


def configurations() -> list[str]:
    """The instances, and for those that have options some of each."""
    names = fastq.describe()["cuda"]["int8_gemm"]
    found = []
    for name in names:
        found.append(name)
        if name.startswith("sm80/"):
            found += [f"{name}_split2", f"{name}_split5"]
        if name.endswith("_swapped_pingpong"):
            found += [f"{name}_width80", f"{name}_cluster_n", f"{name}_width80_cluster_n"]
        if name.endswith("_swapped"):
            tile_m, tile_n = (int(x) for x in name.split("/")[1].split("x")[:2])
            found += [f"{name}_width{tile_n - 24}", f"{name}_split2", f"{name}_width40_split5"]
            if tile_m * tile_n <= 64 * 64:
                found += [f"{name}_blocks2", f"{name}_width24_split8_blocks2"]
    return found


def runs_here(name: str) -> bool:
    return name.startswith("sm80/") or torch.cuda.get_device_capability()[0] == 9


def fits(name: str, shape: tuple[int, int, int], *, plain: bool = True) -> bool:
    """Whether the configuration takes a contiguous problem of this shape."""
    if "_split" in name:
        tile_k = int(name.split("x")[2].split("_")[0])
        parts = int(name.split("_split")[1].split("_")[0])
        if -(-shape[2] // tile_k) < parts or (name.startswith("sm80/") and shape[0] > 512):
            return False
    needs_tma_store = name.startswith("sm90/") and not name.count("_swapped")
    return not needs_tma_store or (plain and shape[1] % 8 == 0)


def test_every_configuration_gives_the_exact_sums_and_bits(monkeypatch):
    tried = 0
    for shape in SHAPES:
        for out_dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32):
            a, b, sa, sb = random_gemm(*shape, device=torch.device("cuda"), out_dtype=out_dtype)
            bias = None if sa is None else random_scales(shape[1], device=a.device)
            expected = reference.int8_gemm(a, b, sa, sb, bias=bias, out_dtype=out_dtype)
            plain = out_dtype in (torch.bfloat16, torch.float16)
            for name in configurations():
                if not runs_here(name) or not fits(name, shape, plain=plain):
                    continue
                monkeypatch.setenv("FASTQ_KERNELS", name)
                # The surroundings of a padded, poisoned output must stay as they are.
                held = torch.full((shape[0] + 2, shape[1] + 16), 77, dtype=out_dtype, device="cuda")
                out = held[1:-1, 8:-8]
                fastq.int8_gemm(a, b, sa, sb, bias=bias, out=out)
                reference.assert_same(out, expected)
                held[1:-1, 8:-8] = 77
                assert (held == 77).all(), name
                tried += 1
    assert tried > 100


def test_every_configuration_takes_padded_and_odd_operands(monkeypatch):
    M, N, K = 37, 88, 333
    cuda = torch.device("cuda")
    a = torch.randint(-128, 128, (M, K + 51), dtype=torch.int8, device=cuda)[:, 16 : 16 + K]
    b = torch.randint(-128, 128, (N, K + 51), dtype=torch.int8, device=cuda)[:, 32 : 32 + K].t()
    expected = reference.int8_gemm(a, b, None, None, out_dtype=torch.int32)
    for name in configurations():
        if runs_here(name) and fits(name, (M, N, K), plain=False):
            monkeypatch.setenv("FASTQ_KERNELS", name)
            got = fastq.int8_gemm(a, b, None, None, out_dtype=torch.int32)
            reference.assert_same(got, expected)


def test_every_configuration_adds_to_the_residual_in_place(monkeypatch):
    """Tiles overlap at the edges: what two of them compute, one writes."""
    for M, N, K in ((5, 40, 400), (70, 200, 1168), (131, 264, 272)):
        a, b, sa, sb = random_gemm(M, N, K, device=torch.device("cuda"), out_dtype=torch.float32)
        residual = torch.randn(M, N, device="cuda")
        cpu = [t.cpu() for t in (a, b, sa, sb)]
        expected = fastq.int8_gemm(*cpu, residual=residual.cpu(), out_dtype=torch.float32)
        for name in configurations():
            if runs_here(name) and fits(name, (M, N, K), plain=False):
                monkeypatch.setenv("FASTQ_KERNELS", name)
                out = residual.clone()
                fastq.int8_gemm(a, b, sa, sb, residual=out, out=out)
                assert torch.equal(out.cpu(), expected), name


def test_a_rows_bits_do_not_depend_on_its_batch(monkeypatch):
    """Alone, among 512 rows, and under every configuration."""
    M, N, K = 512, 264, 1040
    a, b, sa, sb = random_gemm(M, N, K, device=torch.device("cuda"), out_dtype=torch.bfloat16)
    bias = random_scales(N, device=a.device)
    monkeypatch.delenv("FASTQ_KERNELS", raising=False)
    whole = fastq.int8_gemm(a, b, sa, sb, bias=bias)
    for rows in (1, 2, 8, 9, 16, 33, 64, 65, 128, 200):
        part = fastq.int8_gemm(a[-rows:], b, sa[-rows:], sb, bias=bias)
        assert torch.equal(part, whole[-rows:]), rows
    for name in configurations():
        if runs_here(name) and fits(name, (M, N, K)):
            monkeypatch.setenv("FASTQ_KERNELS", name)
            assert torch.equal(fastq.int8_gemm(a, b, sa, sb, bias=bias), whole), name


@pytest.mark.parametrize("name", ["sm80/16x128x128_split8", "sm90/16x64x256_swapped_split8"])
def test_split_k_is_deterministic(monkeypatch, name):
    a, b, sa, sb = random_gemm(16, 512, 4096, device=torch.device("cuda"), out_dtype=torch.float32)
    if not runs_here(name):
        pytest.skip("not a Hopper GPU")
    monkeypatch.setenv("FASTQ_KERNELS", name)
    first = fastq.int8_gemm(a, b, sa, sb, out_dtype=torch.float32)
    for _ in range(100):
        assert torch.equal(fastq.int8_gemm(a, b, sa, sb, out_dtype=torch.float32), first)


def test_every_configuration_in_a_graph_and_on_two_streams(monkeypatch):
    M, N, K = 40, 256, 2048
    cuda = torch.device("cuda")
    problems = [random_gemm(M, N, K, device=cuda, out_dtype=torch.bfloat16) for _ in range(2)]
    expected = [reference.int8_gemm(*p) for p in problems]
    outs = [torch.empty(M, N, dtype=torch.bfloat16, device=cuda) for _ in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    for name in configurations():
        if not runs_here(name) or not fits(name, (M, N, K)):
            continue
        monkeypatch.setenv("FASTQ_KERNELS", name)
        torch.cuda.synchronize()
        for _ in range(3):
            for p, out, stream in zip(problems, outs, streams, strict=True):
                with torch.cuda.stream(stream):
                    out.fill_(torch.nan)
                    fastq.int8_gemm(*p, out=out)
        torch.cuda.synchronize()
        for out, want in zip(outs, expected, strict=True):
            reference.assert_same(out, want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for p, out in zip(problems, outs, strict=True):
                fastq.int8_gemm(*p, out=out)
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for out, want in zip(outs, expected, strict=True):
            reference.assert_same(out, want)


@pytest.mark.parametrize("M", [16, 256, 300])
def test_a_chain_in_one_stream_sees_what_came_before(M):
    """Kernels that start early wait for what they read: each product's output feeds the next."""
    cuda = torch.device("cuda")
    w, sw = fastq.quantize_per_channel(torch.randn(512, 512, device=cuda))
    x = torch.randn(M, 512, device=cuda)

    def chain() -> torch.Tensor:
        y = x.clone()
        for _ in range(12):
            q, s = fastq.quantize_per_token(y)
            y = fastq.int8_gemm(q, w.t(), s, sw / 22, out_dtype=torch.float32)
        return y

    expected = x.clone()
    for _ in range(12):
        q, s = fastq.quantize_per_token(expected)
        torch.cuda.synchronize()
        expected = fastq.int8_gemm(q, w.t(), s, sw / 22, out_dtype=torch.float32)
        torch.cuda.synchronize()
    for _ in range(20):
        assert torch.equal(chain(), expected)


@pytest.mark.parametrize("M", [1, 16, 64, 300])
def test_a_constant_weight_may_change_before_another_call(M):
    """b_is_constant: what wrote b has finished by then, as a call of fastq lies between."""
    cuda = torch.device("cuda")
    weights = [random_int8(2048, 1024, device=cuda, seed=seed) for seed in range(8)]
    w = torch.empty_like(weights[0])
    x = torch.randn(M, 1024, device=cuda)

    def products() -> list[torch.Tensor]:
        found = []
        for weight in weights:
            w.copy_(weight)
            q, s = fastq.quantize_per_token(x)
            product = fastq.int8_gemm(q, w.t(), s, 1.0, b_is_constant=True, out_dtype=torch.float32)
            found.append(product)
        return found

    q, s = fastq.quantize_per_token(x)
    torch.cuda.synchronize()
    expected = [reference.int8_gemm(q, v.t(), s, 1.0, None, torch.float32) for v in weights]
    for _ in range(3):
        for got, want in zip(products(), expected, strict=True):
            reference.assert_same(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = products()
    for _ in range(3):
        for out in replayed:
            out.fill_(torch.nan)
        graph.replay()
        for got, want in zip(replayed, expected, strict=True):
            reference.assert_same(got, want)


def test_a_configuration_that_cannot_run_says_why(monkeypatch):
    a = torch.ones(4, 128, dtype=torch.int8, device="cuda")
    b = torch.ones(16, 128, dtype=torch.int8, device="cuda")
    for name, why in (
        ("sm80/1x1x1", "no such instance"),
        ("sm80/128x128x64_width64", "only swapped tiles have such options"),
    ):
        monkeypatch.setenv("FASTQ_KERNELS", name)
        with pytest.raises(NotImplementedError, match=why):
            fastq.int8_gemm(a, b.t(), 1.0, 1.0)
    monkeypatch.setenv("FASTQ_KERNELS", "fast please")
    with pytest.raises(ValueError, match="FASTQ_KERNELS is fast please, expected sm80, sm90 or a"):
        fastq.int8_gemm(a, b.t(), 1.0, 1.0)
