"""llm_int8_matmul as a torch op: opcheck, torch.compile, fake and meta tensors, modes, streams."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastq
from llm_int8_formula import llm_int8_matmul, random_kept, random_problem
from operands import FLOAT_DTYPES, random_floats
from reference import assert_same
from test_torch_ops import OPS, Recorder, skip_without_inductor


def samples(device, dtype):
    """The arguments before out_dtype."""
    x, w, sw = problem = random_problem(6, 8, 16, device=device, dtype=dtype, columns=3)
    kept = random_kept(problem, torch.tensor([1, 5]), dtype=torch.bfloat16).values()
    bias = random_floats(8, device=device)
    yield x, w, sw, 6.0, None, None, None, False
    yield x.view(2, 3, 16), w, sw, 6.0, bias, *kept, True
    yield x.view(2, 3, 16).transpose(0, 1), w, sw[:1], 2.5, bias, *kept, False
    yield x, w.t().contiguous().t(), sw[None], 0.0, bias[None], None, None, False


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(device, dtype):
    for sample in samples(device, dtype):
        torch.library.opcheck(OPS.llm_int8_matmul.default, (*sample, dtype))
        out = torch.zeros(*sample[0].shape[:-1], 8, device=device)
        count = torch.zeros(1, dtype=torch.int32, device=device)
        torch.library.opcheck(OPS.llm_int8_matmul.out, (*sample, out, None))
        torch.library.opcheck(OPS.llm_int8_matmul.out, (*sample, out, count))


def layers(x, w, sw, kept, out, count):
    """Every kind of call, the last two of which write into tensors of the caller."""
    y = fastq.llm_int8_matmul(x, w, sw, bias=sw, **kept)
    z = fastq.llm_int8_matmul(x * 2, w, sw, threshold=3.0, out_dtype=torch.float16)
    fastq.llm_int8_matmul(y, w, 0.01, outlier_count=count)
    fastq.llm_int8_matmul(x, w, sw, out=out)
    return torch.relu(y) + z, out + 1, count * 2


def inputs(device, rows):
    problem = random_problem(rows, 32, 32, device=device, columns=3, seed=rows)
    out = torch.zeros(rows, 32, device=device)
    kept = random_kept(problem, torch.arange(3, 9))
    return *problem, kept, out, torch.zeros(1, dtype=torch.int32, device=device)


def compare(compiled, device, rows):
    expected_in, got_in = inputs(device, rows), inputs(device, rows)
    expected, got = layers(*expected_in), compiled(*got_in)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(got_in[-2:], expected_in[-2:], strict=True):
        assert torch.equal(a, b)
    assert_same(got_in[-2], llm_int8_matmul(*got_in[:3]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (4, 5, 17):
        compare(compiled, device, rows)
    torch._dynamo.reset()


def test_compile_with_a_threshold_that_changes(device):
    """Another number may compile again, but gives its own result."""

    def product(x, w, sw, threshold):
        return fastq.llm_int8_matmul(x, w, sw, threshold=threshold)

    torch._dynamo.reset()
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    problem = random_problem(6, 8, 16, device=device, columns=3)
    for threshold in (6.0, 2.5, 0.0, 3, 1.25):
        assert torch.equal(compiled(*problem, threshold), product(*problem, threshold))
    torch._dynamo.reset()


def test_compile_with_inductor(device):
    """The default backend; on a GPU with CUDA graphs."""
    skip_without_inductor(device)
    torch._dynamo.reset()
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    compiled = torch.compile(layers, fullgraph=True, mode=mode)
    for _ in range(3):
        compare(compiled, device, 7)
    torch._dynamo.reset()


@pytest.mark.parametrize("fake", ["fake", "meta"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_shapes_without_data(fake, dtype):
    device = torch.device("meta" if fake == "meta" else "cpu")

    def check():
        x = torch.empty(2, 5, 16, dtype=dtype, device=device)
        w = torch.empty(24, 16, dtype=torch.int8, device=device)
        sw = torch.empty(24, device=device)
        columns = torch.empty(3, dtype=torch.int32, device=device)
        kept = {"outlier_columns": columns, "outlier_weight": sw[:, None].expand(24, 3)}
        y = fastq.llm_int8_matmul(x, w, sw, bias=sw, **kept)
        assert (y.shape, y.dtype, y.device) == ((2, 5, 24), dtype, device)
        y = fastq.llm_int8_matmul(x.transpose(0, 1), w, 0.5, out_dtype=torch.float16)
        assert (y.shape, y.dtype, y.device) == ((5, 2, 24), torch.float16, device)
        assert fastq.llm_int8_matmul(x, w, sw, out=y.transpose(0, 1)).shape == (2, 5, 24)
        assert fastq.llm_int8_matmul(x, w, sw, outlier_count=columns[:1]).dtype == dtype
        with pytest.raises(ValueError, match="llm_int8_matmul: x has shape"):
            fastq.llm_int8_matmul(x, w[:, 1:], sw)
        with pytest.raises(TypeError, match="llm_int8_matmul: w has dtype float32, expected int8"):
            fastq.llm_int8_matmul(x, w.float(), sw)

    if fake == "fake":
        with FakeTensorMode():
            check()
    else:
        check()


def test_modes_see_the_op(device):
    """A plain call goes past the dispatcher; one that somebody watches does not."""
    x, w, sw = random_problem(6, 8, 16, device=device, columns=3)
    expected = fastq.llm_int8_matmul(x, w, sw)
    with Recorder() as mode:
        got = fastq.llm_int8_matmul(x, w, sw)
        fastq.llm_int8_matmul(x, w, sw, out=got)
    assert torch.equal(got, expected)
    assert [name for name in mode.seen if "fastq" in name] == [
        "fastq.llm_int8_matmul.default",
        "fastq.llm_int8_matmul.out",
    ]


def test_inference_mode_and_parameters(device):
    x, w, sw = random_problem(6, 8, 16, device=device, columns=3)
    expected = fastq.llm_int8_matmul(x, w, sw, bias=sw)
    frozen = [torch.nn.Parameter(t, requires_grad=False) for t in (w, sw)]
    assert torch.equal(fastq.llm_int8_matmul(x, *frozen, bias=frozen[1]), expected)
    with torch.inference_mode():
        got = fastq.llm_int8_matmul(x.requires_grad_(), w, sw, bias=torch.nn.Parameter(sw))
        assert got.is_inference()
        assert torch.equal(got, expected)
    assert not expected.requires_grad


@pytest.mark.cuda
def test_workspaces_of_two_streams_do_not_mix():
    device = torch.device("cuda")
    problems = [
        random_problem(300, 260, 500, device=device, columns=columns, seed=columns)
        for columns in (6, 100)
    ]
    expected = [llm_int8_matmul(*problem) for problem in problems]
    torch.cuda.synchronize()
    results = []
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(20):
        for stream, problem, right in zip(streams, problems, expected, strict=True):
            with torch.cuda.stream(stream):
                results.append((fastq.llm_int8_matmul(*problem), right))
    torch.cuda.synchronize()
    for got, right in results:
        assert_same(got, right)


@pytest.mark.cuda
@pytest.mark.multi_gpu
def test_selects_the_device_of_its_tensors():
    """cuda:0 is current, the tensors lie on cuda:1; and afterwards cuda:0 is current again."""
    problem = random_problem(70, 80, 96, device=torch.device("cuda:1"), columns=5)
    with torch.cuda.device(0):
        assert_same(fastq.llm_int8_matmul(*problem), llm_int8_matmul(*problem))
        assert torch.cuda.current_device() == 0
