"""The ops as torch ops: opcheck, torch.compile, fake and meta tensors, modes, streams, devices."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastq
import reference
from kv_caches import Kind, make_cache, random
from operands import (
    FLOAT_DTYPES,
    OUT_DTYPES,
    random_floats,
    random_gemm,
    random_scales,
    random_zero_points,
)

OPS = torch.ops.fastq


def gemm_samples(device):
    a, b, sa, sb = random_gemm(6, 8, 16, device=device)
    bias = random_scales(8, device=device)
    yield a, b, sa, sb, None, torch.bfloat16, None, False
    yield a, b.contiguous(), sa, sb, bias, torch.float32, None, True
    yield a.view(2, 3, 16), b, sa.view(2, 3, 1), sb, bias.half(), torch.float16, None, False
    yield a, b, None, None, None, torch.int32, None, False
    residual, points = random_floats(6, 8, device=device), random_zero_points(6, device=device)
    sums, out_scale = b.sum(0, dtype=torch.int32), torch.tensor([9.0], device=device)
    options = (residual, "gelu", points, sums)
    yield a, b, sa, sb, bias, torch.float32, None, False, *options, None
    yield a, b, sa, sb, bias, torch.int8, None, False, *options, out_scale
    yield a, b, sa, sb, None, torch.bfloat16, None, True, None, "relu"
    if device.type == "cpu":
        packed = fastq.pack_weight(b)
        yield a, packed.data, sa, sb, bias, torch.float32, packed.shape, False


def test_opcheck_int8_gemm(device):
    for sample in gemm_samples(device):
        torch.library.opcheck(OPS.int8_gemm.default, sample)


def test_opcheck_int8_gemm_out(device):
    for sample in gemm_samples(device):
        a, b, sa, sb, bias, out_dtype, packed_shape, b_is_constant, *options = sample
        out = torch.zeros(*a.shape[:-1], 8, dtype=out_dtype, device=device)
        arguments = (a, b, sa, sb, bias, packed_shape, b_is_constant, out, *options)
        torch.library.opcheck(OPS.int8_gemm.out, arguments)


def test_opcheck_flash_attention(device):
    q, k, v = (
        torch.randn(2, *shape, 16).to(device, torch.bfloat16) for shape in ((5, 4), (7, 2), (7, 2))
    )
    options = (0.25, True, -1, -1, 0.0, torch.rand(4, device=device), None, None, 0, 0)
    torch.library.opcheck(OPS.flash_attention.default, (q, k, v, *options))
    torch.library.opcheck(OPS.flash_attention.out, (q, k, v, *options, torch.zeros_like(q)))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    packed = (q[0], k[0, :5], v[0, :5], 0.25, False, 2, 3, 9.0, None, cu, cu, 3, 3)
    torch.library.opcheck(OPS.flash_attention.default, packed)


def decode_arguments(device, is_int8, page_size):
    """q, k, v, the cache by name in the order of the schemas, and rotary tables."""
    kind = Kind(device.type, torch.bfloat16)
    q, k, v = (random(2, 3, heads, 16, kind=kind, seed=heads) for heads in (4, 2, 2))
    cache = make_cache((20, 7), 2, 16, kind, capacity=32, page_size=page_size, is_int8=is_int8)
    for name in cache.keys() & {"k_cache", "v_cache", "k_scale", "v_scale"}:
        cache[name] = cache[name].nan_to_num()  # opcheck compares what is past the lengths too
    names = ("k_cache", "v_cache", "cache_seqlens", "block_table", "k_scale", "v_scale")
    tables = [random(32, 4, kind=kind, seed=seed) for seed in (5, 6)]
    return q, k, v, {name: cache.get(name) for name in names}, tables


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
def test_opcheck_flash_decode_and_kv_append(device, is_int8, page_size):
    q, k, v, cache, tables = decode_arguments(device, is_int8, page_size)
    cache = tuple(cache.values())
    options = (0.25, True, 9, -1, 3.0, torch.rand(4, device=device))
    torch.library.opcheck(OPS.flash_decode.default, (q, *cache, *options))
    torch.library.opcheck(OPS.flash_decode.out, (q, *cache, *options, torch.zeros_like(q)))
    for new in ((k, v, None, None, False), (k, v, *tables, True)):
        torch.library.opcheck(OPS.flash_decode.append, (q, *cache, *options, *new))
        arguments = (q, *cache, *options, *new, torch.zeros_like(q))
        torch.library.opcheck(OPS.flash_decode.append_out, arguments)
    torch.library.opcheck(OPS.kv_append.default, (k, v, *cache, None, None, False))
    torch.library.opcheck(OPS.kv_append.default, (k, v, *cache, *tables, True))
    torch.library.opcheck(OPS.kv_append.rotate, (k, v, *cache, *tables, False, q))
    out = torch.zeros_like(q)
    torch.library.opcheck(OPS.kv_append.rotate_out, (k, v, *cache, *tables, False, q, out))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck_quantize_and_dequantize(device, dtype):
    x = torch.randn(3, 4, 16, device=device).to(dtype)
    torch.library.opcheck(OPS.quantize_per_token.default, (x,))
    torch.library.opcheck(OPS.quantize_per_token.default, (x.transpose(0, 1),))
    torch.library.opcheck(OPS.quantize_per_channel.default, (x[0],))
    for rotation in (2, 16):
        torch.library.opcheck(OPS.quantize_per_token.default, (x, rotation))
        torch.library.opcheck(OPS.quantize_per_channel.default, (x[0], rotation))
    q, s = fastq.quantize_per_token(x)
    torch.library.opcheck(OPS.dequantize.default, (q, s, dtype))
    torch.library.opcheck(OPS.dequantize.out, (q, s), {"out": torch.empty_like(x)})


def linear(x, qw, sw, bias):
    """What an INT8 linear layer does, everything through the public functions."""
    q, s = fastq.quantize_per_token(x)
    y = fastq.int8_gemm(q, qw.t(), s, sw, bias=bias, out_dtype=x.dtype)
    return torch.relu(y) + fastq.dequantize(q, s, out_dtype=x.dtype).mean()


def rotated_linear(x, qw, sw, bias):
    """What an INT8 linear layer with a rotation does."""
    q, s = fastq.quantize_per_token(x, rotation=32)
    return fastq.int8_gemm(q, qw.t(), s, sw / 32, bias=bias, out_dtype=x.dtype)


@pytest.fixture
def compiler():
    """torch.compile without a code generator: tracing, functionalisation and autograd are real."""
    torch._dynamo.reset()
    yield lambda function, **kwargs: torch.compile(
        function, backend="aot_eager", fullgraph=True, **kwargs
    )
    torch._dynamo.reset()


def skip_without_inductor(device):
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        pytest.skip("torch's inductor needs a C++ compiler, and this machine has none")
    if device.type == "cuda":
        pytest.importorskip("triton")


def linear_inputs(device, rows):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 32, generator=generator).to(device)
    qw, sw = fastq.quantize_per_channel(torch.randn(24, 32, generator=generator).to(device))
    return x, qw, sw, random_scales(24, device=device)


def test_compile_fullgraph(device, compiler):
    compiled = compiler(linear)
    for rows in (5, 5, 9):
        inputs = linear_inputs(device, rows)
        assert torch.equal(compiled(*inputs), linear(*inputs))


def test_compile_with_dynamic_shapes(device, compiler):
    compiled = compiler(linear, dynamic=True)
    for rows in (4, 5, 17):
        inputs = linear_inputs(device, rows)
        assert torch.equal(compiled(*inputs), linear(*inputs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_rotation(device, compiler, dynamic):
    compiled = compiler(rotated_linear, dynamic=dynamic)
    for rows in (4, 5, 17):
        inputs = linear_inputs(device, rows)
        assert torch.equal(compiled(*inputs), rotated_linear(*inputs))


def test_compile_writes_to_out(device, compiler):
    def product(a, b, sa, sb, out):
        fastq.int8_gemm(a, b, sa, sb, out=out)
        return out + 1

    problem = random_gemm(6, 8, 16, device=device)
    expected = fastq.int8_gemm(*problem, out_dtype=torch.float32)
    out = torch.zeros(6, 8, device=device)
    got = compiler(product)(*problem, out)
    assert torch.equal(out, expected)
    assert torch.equal(got, expected + 1)


def layer_with_options(q, qw, s, sw, residual):
    """Every option of the product, once with its output quantised."""
    h = fastq.int8_gemm(q, qw.t(), s, sw, zero_point=3, activation="gelu", out_scale=0.5)
    y = fastq.int8_gemm(
        q, qw.t(), s, sw, activation="silu", residual=residual, out_dtype=torch.float32
    )
    return y + h


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_options(device, compiler, dynamic):
    compiled = compiler(layer_with_options, dynamic=dynamic)
    for rows in (4, 5, 17):
        x, qw, sw, _ = linear_inputs(device, rows)
        inputs = (*fastq.quantize_per_token(x), random_floats(rows, 24, device=device))
        inputs = (inputs[0], qw, inputs[1], sw, inputs[2])
        assert torch.equal(compiled(*inputs), layer_with_options(*inputs))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_accumulates_in_place(device, backend):
    """residual and out are one tensor, which the compiler may give other memory."""
    if backend == "inductor":
        skip_without_inductor(device)

    def accumulate(a, b, sa, sb, x):
        y = x * 2
        fastq.int8_gemm(a, b, sa, sb, residual=y, out=y)
        fastq.int8_gemm(a, b, sa, sb, residual=x, out=x, activation="relu")
        return y + x

    torch._dynamo.reset()
    problem, x = random_gemm(6, 8, 16, device=device), random_floats(6, 8, device=device)
    expected_x = x.clone()
    expected = accumulate(*problem, expected_x)
    got = torch.compile(accumulate, backend=backend, fullgraph=True)(*problem, x)
    torch.testing.assert_close(got, expected)
    assert torch.equal(x, expected_x)
    torch._dynamo.reset()


def test_compile_takes_python_scales_and_packed_weights(compiler):
    a, b, _, _ = random_gemm(6, 8, 16, device=torch.device("cpu"))
    packed = fastq.pack_weight(b)

    def product(a, packed):
        return fastq.int8_gemm(a, packed, 0.5, 0.25, out_dtype=torch.float32)

    assert torch.equal(compiler(product)(a, packed), product(a, packed))


def test_compile_with_inductor(device):
    """The default backend; on a GPU with CUDA graphs."""
    skip_without_inductor(device)
    torch._dynamo.reset()
    inputs = linear_inputs(device, 7)
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    compiled = torch.compile(linear, fullgraph=True, mode=mode)
    expected = linear(*inputs)
    for _ in range(3):
        torch.testing.assert_close(compiled(*inputs), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
def test_compile_a_step_of_generation(device, is_int8, in_place, backend):
    """Appends to a cache, which the compiled step must change in place, and attends to it."""
    if backend == "inductor":
        skip_without_inductor(device)

    def step(q, k, v, cache, cos, sin):
        options = {"rotary_cos": cos, "rotary_sin": sin, "q": q}
        if in_place:
            fastq.kv_append(k, v, out=q, **cache, **options)
        else:
            q = fastq.kv_append(k, v, **cache, **options)
        fastq.kv_append(k[:, 1:], v[:, 1:], **cache)  # without rotary tables
        out, lse = fastq.flash_decode(q + 0, window=(12, -1), return_lse=True, **cache)
        more = fastq.flash_decode(q, k=k * 2, v=v * 2, rotary_cos=cos, rotary_sin=sin, **cache)
        return out * 2 + more, lse

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for page_size in (0, 16):
        plain = decode_arguments(device, is_int8, page_size)
        traced = decode_arguments(device, is_int8, page_size)
        expected = step(*plain[:4], *plain[4])
        got = compiled(*traced[:4], *traced[4])
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        assert torch.equal(plain[0], traced[0])
        for name, tensor in plain[3].items():
            assert tensor is None or torch.equal(tensor, traced[3][name])
    torch._dynamo.reset()


@pytest.mark.parametrize("fake", ["fake", "meta"])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_shapes_without_data(fake, out_dtype):
    def check():
        device = torch.device("meta" if fake == "meta" else "cpu")
        a = torch.empty(2, 5, 16, dtype=torch.int8, device=device)
        b = torch.empty(16, 24, dtype=torch.int8, device=device)
        x = torch.empty(2, 5, 16, dtype=torch.float16, device=device)
        scale = None if out_dtype == torch.int32 else torch.empty((), device=device)
        y = fastq.int8_gemm(a, b, scale, scale, out_dtype=out_dtype)
        assert (y.shape, y.dtype, y.device) == ((2, 5, 24), out_dtype, device)
        y = fastq.int8_gemm(a, b, 0.5, 0.5, zero_point=7, activation="silu", out_scale=0.5)
        assert (y.shape, y.dtype, y.device) == ((2, 5, 24), torch.int8, device)
        q, s = fastq.quantize_per_token(x)
        assert (q.shape, q.dtype, s.shape, s.dtype) == (
            x.shape,
            torch.int8,
            (2, 5, 1),
            torch.float32,
        )
        for rotation in (0, 16):
            q, s = fastq.quantize_per_channel(x[0], rotation=rotation)
            assert (q.shape, s.shape, q.device, s.device) == ((5, 16), (5,), device, device)
        z = fastq.dequantize(a, 0.5, out_dtype=torch.float16)
        assert (z.shape, z.dtype) == (a.shape, torch.float16)
        with pytest.raises(ValueError, match="int8_gemm: a has shape"):
            fastq.int8_gemm(a, b[1:], 1.0, 1.0)
        q = torch.empty(2, 3, 4, 16, dtype=torch.float16, device=device)
        k = torch.empty(2, 3, 2, 16, dtype=torch.float16, device=device)
        cache = torch.empty(2, 9, 2, 16, dtype=torch.float16, device=device)
        lengths = torch.empty(2, dtype=torch.int32, device=device)
        out, lse = fastq.flash_decode(q, cache, cache, lengths, return_lse=True)
        assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, device)
        assert (lse.shape, lse.dtype, lse.device) == ((2, 4, 3), torch.float32, device)
        out = fastq.flash_decode(q, cache, cache, lengths, k=k, v=k)
        assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, device)
        with pytest.raises(ValueError, match="flash_decode: q has shape"):
            fastq.flash_decode(q[0], cache, cache, lengths)
        rotated = fastq.kv_append(k, k, cache, cache, lengths, q=q, rotary_cos=k, rotary_sin=k)
        assert (rotated.shape, rotated.dtype, rotated.device) == (q.shape, q.dtype, device)

    if fake == "fake":
        with FakeTensorMode():
            check()
    else:
        check()


def test_inference_mode(device):
    x, qw, sw, bias = linear_inputs(device, 6)
    expected = linear(x, qw, sw, bias)
    x.requires_grad_()
    with torch.inference_mode():
        got = linear(x, qw, sw, bias)
        assert got.is_inference()
        out = torch.zeros(6, 24, device=device)
        q, s = fastq.quantize_per_token(x)
        fastq.int8_gemm(q, qw.t(), s, sw, out=out)
    assert torch.equal(got, expected)


class Recorder(TorchDispatchMode):
    """Notes the ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_and_the_profiler_see_the_ops(device):
    """A plain call goes past the dispatcher; one that somebody watches does not."""
    a, b, sa, sb = random_gemm(6, 8, 16, device=device)
    expected = fastq.int8_gemm(a, b, sa, sb)
    with Recorder() as mode:
        got = fastq.int8_gemm(a, b, sa, sb)
        fastq.int8_gemm(a, b, sa, sb, out=got)
    assert [name for name in mode.seen if "fastq" in name] == [
        "fastq.int8_gemm.default",
        "fastq.int8_gemm.out",
    ]
    assert torch.equal(got, expected)
    with torch.autograd.profiler.profile() as profile:
        fastq.int8_gemm(a, b, sa, sb)
    assert "fastq::int8_gemm" in [event.name for event in profile.function_events]


def test_results_need_no_gradient(device):
    x, qw, sw, bias = linear_inputs(device, 6)
    assert torch.is_grad_enabled()
    assert not linear(x, qw, sw, bias).requires_grad
    with torch.no_grad():
        assert not linear(x.requires_grad_(), qw, sw, bias).requires_grad


def test_parameters_are_tensors_too(device):
    """Weights and scales of a module are Parameters and buffers, a subclass of Tensor."""
    a, b, sa, sb = random_gemm(5, 8, 16, device=device)
    frozen = [torch.nn.Parameter(t, requires_grad=False) for t in (b.t().contiguous(), sb)]
    got = fastq.int8_gemm(a, frozen[0].t(), sa, frozen[1])
    assert torch.equal(got, fastq.int8_gemm(a, b, sa, sb))
    scale = torch.nn.Parameter(sa, requires_grad=False)
    assert torch.equal(fastq.int8_gemm(a, b, scale, sb), got)


@pytest.mark.cuda
def test_runs_on_the_current_stream():
    """Work queued before and after on a side stream is seen in order."""
    a, b, sa, sb = random_gemm(512, 512, 512, device=torch.device("cuda"))
    expected = reference.int8_gemm(a, b, sa, sb, out_dtype=torch.float32)
    big = torch.randn(4096, 4096, device="cuda")
    stale = torch.zeros_like(a)
    out = torch.zeros(512, 512, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(10):
            big = (big @ big).clamp(-1, 1)  # keeps the stream busy while the rest is queued
        stale.copy_(a)
        fastq.int8_gemm(stale, b.contiguous(), sa, sb, out=out)  # with a workspace too
        stale.zero_()
        copied = out.clone()
        q, s = fastq.quantize_per_token(copied)
        back = fastq.dequantize(q, s, out_dtype=torch.float32)
    stream.synchronize()
    reference.assert_same(copied, expected)
    expected_q, expected_s = reference.quantize(copied)
    reference.assert_same(q, expected_q)
    reference.assert_same(s[:, 0], expected_s)
    reference.assert_same(back, reference.dequantize(q, s, torch.float32))


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_kernels_that_start_early_wait_for_each_other(rows):
    """On Hopper a kernel may start before the one ahead of it has finished. Each layer reads what
    the one before wrote, and the memory of every second one is used again."""
    device = torch.device("cuda")
    weights = []
    for rotation in (0, 32) * 4:
        w = torch.randn(2048, 2048, device=device)
        qw, sw = fastq.quantize_per_channel(w, rotation=rotation)
        weights.append((rotation, qw.t(), sw * 0.02 / max(rotation, 1)))

    def layers(after_each):
        x = torch.randn(rows, 2048, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
        buffers = torch.empty(2, rows, 2048, dtype=torch.bfloat16, device=device)
        for i, (rotation, b, sb) in enumerate(weights):
            q, s = fastq.quantize_per_token(x, rotation=rotation)
            after_each()
            x = fastq.int8_gemm(q, b, s, sb, out=buffers[i % 2])
            after_each()
        return x.clone()

    expected = layers(torch.cuda.synchronize)
    for _ in range(20):
        assert torch.equal(layers(lambda: None), expected)


@pytest.mark.cuda
def test_workspaces_of_two_streams_do_not_mix():
    """A (K, N) contiguous b goes through a workspace."""
    device = torch.device("cuda")
    problems = [random_gemm(300, 260, 500 + i, device=device, seed=i) for i in range(2)]
    problems = [p._replace(b=p.b.contiguous()) for p in problems]
    expected = [reference.int8_gemm(*p, out_dtype=torch.float32) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results = [[], []]
    for _ in range(20):
        for stream, problem, result in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(fastq.int8_gemm(*problem, out_dtype=torch.float32))
    torch.cuda.synchronize()
    for result, right in zip(results, expected, strict=True):
        for got in result:
            reference.assert_same(got, right)


@pytest.mark.cuda
@pytest.mark.multi_gpu
def test_selects_the_device_of_its_tensors():
    """cuda:0 is current, the tensors lie on cuda:1; and afterwards cuda:0 is current again."""
    device = torch.device("cuda:1")
    with torch.cuda.device(0):
        for b_contiguous in (False, True):
            a, b, sa, sb = random_gemm(70, 80, 96, device=device)
            b = b.contiguous() if b_contiguous else b
            got = fastq.int8_gemm(a, b, sa, sb)
            assert got.device == device
            reference.assert_same(got, reference.int8_gemm(a, b, sa, sb))
        x = torch.randn(40, 100, device=device)
        q, s = fastq.quantize_per_token(x)
        expected_q, expected_s = reference.quantize(x)
        reference.assert_same(q, expected_q)
        reference.assert_same(s[:, 0], expected_s)
        back = fastq.dequantize(q, s)
        reference.assert_same(back, reference.dequantize(q, s))
        assert torch.cuda.current_device() == 0
        with pytest.raises(TypeError, match="int8_gemm: b is on cuda:0, expected cuda:1 as a is"):
            fastq.int8_gemm(a, b.to("cuda:0"), sa, sb)
