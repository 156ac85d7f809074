"""llm_int8_matmul against the oracle, bit by bit, on every backend."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import fastq
import reference
from llm_int8_formula import (
    Problem,
    count_columns,
    fma,
    llm_int8_matmul,
    plant,
    random_kept,
    random_problem,
)
from operands import FLOAT_DTYPES, LAYOUTS, generator, in_layout, random_floats, random_int8
from quantizations import ISAS

# (M, N, K): at, below and above vectors, tiles and K blocks; odd ones; several tiles and threads.
SHAPES = [
    *((1, 1, 1), (1, 17, 64), (1, 256, 130), (1, 515, 1000), (2, 3, 7), (7, 33, 31)),
    *((16, 64, 257), (33, 65, 129), (64, 64, 128), (130, 129, 255), (257, 40, 96)),
    *((64, 90, 5140), (1, 90, 5140), (300, 70, 200)),
]
dtypes = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def check(problem, *, out=None, w_is_constant=False, **options):
    count = torch.full((1,), -7, dtype=torch.int32, device=problem.x.device)
    got = fastq.llm_int8_matmul(
        *problem, outlier_count=count, out=out, w_is_constant=w_is_constant, **options
    )
    if out is not None:
        options["out_dtype"] = out.dtype
    reference.assert_same(got, llm_int8_matmul(*problem, **options))
    assert got.device == problem.x.device
    assert got.dtype == options.get("out_dtype", problem.x.dtype)
    assert count.item() == count_columns(problem.x, options.get("threshold", 6.0))
    return got


def test_the_fma_of_the_oracle_is_rounded_once():
    """Against exact fractions: ties, cancellation and subnormal results among them."""
    draw = np.random.default_rng(0)
    x, y, z = draw.standard_normal((3, 3000)).astype(np.float32)
    z[:1000] *= np.exp2(draw.integers(-60, 60, 1000)).astype(np.float32)
    z[1000:1500] = -(x * y)[1000:1500]
    x[1500:1800] *= np.float32(2.0**-100)
    y[1500:1800] *= np.float32(2.0**-45)
    z[1500:1800] *= np.float32(2.0**-140)
    # x * y is a hair less than half of z's last place: the sum looks like a tie to float64.
    x[1800:2400] = np.float32(2.0**-12) * draw.choice(np.float32([-1, 1]), 600)
    x[1800:2400] *= 1 + np.float32(2.0**-23)
    y[1800:2400] = np.float32(2.0**-12) * (1 - np.float32(2.0**-23))
    z[1800:2400] = 1 + draw.integers(0, 4, 600) * np.float32(2.0**-23)
    special = np.float32([[1, 0, 1e30, np.nan], [np.inf, np.inf, 1e30, 1], [1, 1, 1, 1]])
    with np.errstate(all="ignore"):
        got, special = fma(x, y, z), fma(*special)
    assert np.array_equal(special, np.float32([np.inf, np.nan, np.inf, np.nan]), equal_nan=True)
    twice = 0
    for i in range(len(x)):
        exact = Fraction(float(x[i])) * Fraction(float(y[i])) + Fraction(float(z[i]))
        distance = abs(Fraction(float(got[i])) - exact)
        for other in np.nextafter(got[i], np.float32([-np.inf, np.inf])):
            theirs = abs(Fraction(float(other)) - exact)
            is_even = int(got[i : i + 1].view(np.uint32)[0]) % 2 == 0
            assert distance < theirs or (distance == theirs and is_even)
        plain = np.float32(np.float64(x[i]) * np.float64(y[i]) + np.float64(z[i]))
        twice += plain != got[i]
    assert twice > 100  # float64 rounds these twice


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(device, shape, dtype):
    """Without outliers, with a few, and with more columns of them than CUDA gathers."""
    for columns in (0, 1, 6, 64, 65, 150):
        if columns > shape[2]:
            continue
        problem = random_problem(*shape, device=device, dtype=dtype, columns=columns, seed=columns)
        check(problem)


@dtypes
@pytest.mark.parametrize("shape", [(1, 9, 5), (7, 40, 64), (33, 65, 65), (130, 70, 200)], ids=str)
def test_all_elements_are_outliers(device, shape, dtype):
    problem = random_problem(*shape, device=device, dtype=dtype)
    x = problem.x.sign() * (problem.x.abs() + 6)
    check(problem._replace(x=x))
    check(problem._replace(x=x[:, :1].expand(-1, shape[2])))
    check(problem, threshold=torch.finfo(torch.float32).tiny)  # but for zeros


@dtypes
def test_one_row_holds_many_outliers(device, dtype):
    """As a first token does, with a hundred columns that are plain in all other rows."""
    problem = random_problem(70, 50, 300, device=device, dtype=dtype)
    problem.x[31, 50:150] *= 100
    check(problem)
    problem = random_problem(70, 50, 300, device=device, dtype=dtype, columns=5)
    problem.x[0] = 50
    problem.x[69] = -70
    check(problem)


@pytest.mark.parametrize("threshold", [1e-30, 0.5, 1, 2.7, 3.5, 1e30, math.inf])
@dtypes
def test_thresholds(device, dtype, threshold):
    for M in (1, 40):
        problem = random_problem(M, 33, 100, device=device, dtype=dtype, columns=3)
        check(problem, threshold=threshold)


@dtypes
def test_the_threshold_itself_is_an_outlier(device, dtype):
    x = torch.ones(3, 40, device=device, dtype=dtype)
    x[0, 5], x[1, 6], x[2, 7] = 6.0, -6.0, 5.96875
    problem = random_problem(1, 20, 40, device=device)._replace(x=x)
    check(problem)
    assert count_columns(x) == 2
    # The number that is compared is the float32 next to 0.7: above it in float64.
    problem = problem._replace(x=torch.full((3, 40), 0.7, device=device))
    check(problem, threshold=0.7)
    assert count_columns(problem.x, 0.7) == 40


@dtypes
@pytest.mark.parametrize("shape", [(1, 130, 200), (33, 65, 129), (200, 96, 512)], ids=str)
def test_without_outliers_it_is_the_plain_product(device, shape, dtype):
    for columns, threshold in ((6, 0), (6, 0.0), (6, 1e9), (0, 6.0)):
        problem = random_problem(*shape, device=device, dtype=dtype, columns=columns)
        x, w, sw = problem
        bias = random_floats(shape[1], device=device)
        q, s = fastq.quantize_per_token(x)
        for out_dtype in FLOAT_DTYPES:
            expected = fastq.int8_gemm(q, w.t(), s, sw, bias=bias, out_dtype=out_dtype)
            options = {"bias": bias, "out_dtype": out_dtype, "threshold": threshold}
            assert torch.equal(check(problem, **options), expected)


@dtypes
def test_inf_is_an_outlier(device, dtype):
    for columns in (0, 3, 100):
        problem = random_problem(20, 30, 150, device=device, dtype=dtype, columns=columns)
        problem.x[2, 7], problem.x[3, 8] = math.inf, -math.inf
        problem.x[5, 9], problem.x[5, 10] = math.inf, math.inf
        problem.w[4, 7] = 0  # Inf * 0
        got = check(problem)
        affected = torch.zeros(20, dtype=torch.bool, device=device)
        affected[[2, 3, 5]] = True
        assert torch.equal(~got.isfinite(), affected[:, None].expand(20, 30))
        assert got[2, 4].isnan()
        check(problem, threshold=math.inf)
        assert check(problem, threshold=0.0)[[2, 3, 5]].isnan().all()


@dtypes
def test_a_nan_makes_its_row_nan(device, dtype):
    for columns in (0, 3, 100):
        problem = random_problem(70, 30, 150, device=device, dtype=dtype, columns=columns)
        clean = check(problem)
        problem.x[2, 7] = problem.x[33, 149] = problem.x[69, 0] = math.nan
        problem.x[33, 3] = math.inf
        got = check(problem)
        affected = torch.zeros(70, dtype=torch.bool, device=device)
        affected[[2, 33, 69]] = True
        assert got[affected].isnan().all()
        assert torch.equal(got[~affected], clean[~affected])
        check(problem, threshold=0.0)


def test_non_finite_scales_and_weights(device):
    problem = random_problem(20, 30, 150, device=device, columns=6)
    kept = random_kept(problem, torch.arange(150))
    problem.sw[3], problem.sw[4] = math.nan, math.inf
    kept["outlier_weight"][5] = math.nan
    kept["outlier_weight"][6] = -math.inf
    check(problem)
    check(problem, **kept)


@dtypes
@pytest.mark.parametrize("kept_dtype", FLOAT_DTYPES, ids=str)
def test_kept_weights(device, dtype, kept_dtype):
    """Columns that hold outliers and are kept, that hold none, and that are not kept."""
    for (M, N, K), columns in itertools.product(((1, 40, 100), (33, 65, 129)), (4, 80)):
        problem = random_problem(M, N, K, device=device, dtype=dtype, columns=columns)
        found = (problem.x.abs() >= 6).any(dim=0).nonzero().flatten().cpu()
        order = torch.randperm(K, generator=generator(1))
        for kept in (found, found[::2], order[:10], torch.cat((found[::2], order)).unique()[:70]):
            check(problem, **random_kept(problem, kept, dtype=kept_dtype))


def test_the_first_and_last_columns_are_kept(device):
    for K in (1, 2, 64, 100):
        problem = random_problem(9, 20, K, device=device, columns=K)
        for columns in ([0], [K - 1], [0, K - 1], range(K)):
            check(problem, **random_kept(problem, torch.tensor(sorted(set(columns)))))


def test_no_column_is_kept(device):
    problem = random_problem(9, 20, 50, device=device, columns=6)
    kept = random_kept(problem, torch.zeros(0, dtype=torch.int64))
    assert torch.equal(check(problem, **kept), check(problem))


def test_any_layout_of_the_kept_weights(device):
    problem = random_problem(9, 40, 50, device=device, columns=8)
    kept = random_kept(problem, torch.arange(3, 33), dtype=torch.float16)
    columns = in_layout(kept["outlier_columns"][None], "stepped")[0]
    expected = check(problem, **kept)
    for layout in LAYOUTS:
        weight = in_layout(kept["outlier_weight"], layout)
        got = check(problem, outlier_columns=columns, outlier_weight=weight)
        assert torch.equal(got, expected)
    check(
        problem,
        outlier_columns=columns,
        outlier_weight=kept["outlier_weight"][:, :1].expand(40, 30),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_x_and_w(device, layout):
    for (M, N, K), dtype in itertools.product(
        ((1, 70, 130), (5, 33, 48), (67, 130, 80)), FLOAT_DTYPES
    ):
        x, w, sw = random_problem(M, N, K, device=device, dtype=dtype, columns=5)
        check(Problem(in_layout(x, layout), w, sw))
        check(Problem(x, in_layout(w, layout), sw), w_is_constant=True)
        check(Problem(in_layout(x, layout), in_layout(w, layout), sw), bias=sw)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
def test_any_layout_of_out(device, layout, out_dtype):
    for M, N, K in ((1, 40, 33), (18, 40, 64), (130, 200, 96)):
        problem = random_problem(M, N, K, device=device, dtype=torch.float16, columns=5)
        out = in_layout(torch.full((M, N), math.nan, dtype=out_dtype, device=device), layout)
        assert check(problem, out=out) is out


def test_expanded_operands(device):
    x, w, sw = random_problem(20, 30, 40, device=device, columns=5)
    check(Problem(x[:1].expand(20, 40), w, sw))
    check(Problem(x[:, :1].expand(20, 40), w[:1].expand(30, 40), sw[:1].expand(30)))
    check(Problem(x, w[:, :1].expand(30, 40), random_floats(90, device=device)[::3].abs()))


def test_what_lies_behind_a_row_is_not_read(device):
    for K in (1, 65, 79):
        x = torch.full((33, 80), math.nan, device=device)
        x[:, :K] = random_problem(33, 1, K, device=device, columns=3).x
        w = random_int8(64, 80, device=device)[:, :K]
        for dtype in FLOAT_DTYPES:
            check(Problem(x.to(dtype)[:, :K], w, torch.tensor(0.1, device=device)))


@dtypes
@pytest.mark.parametrize("shape", [(1, 67, 65), (7, 50, 30), (70, 140, 64)], ids=str)
def test_writes_all_of_out_and_nothing_else(device, shape, dtype):
    M, N, _ = shape
    problem = random_problem(*shape, device=device, dtype=dtype, columns=5)
    for pad in (1, 8):
        canvas = torch.full((M + 2, N + 2 * pad), math.nan, dtype=dtype, device=device)
        view = canvas[1 : 1 + M, pad : pad + N]
        check(problem, out=view)
        view.fill_(math.nan)
        assert canvas.isnan().all()


@pytest.mark.parametrize("leading", [(1,), (5,), (2, 3), (4, 1, 3), (1, 2, 1, 2, 1, 3)], ids=str)
def test_batched(device, leading):
    _, w, sw = random_problem(1, 24, 40, device=device)
    x = plant(torch.randn(*leading, 6, 40, generator=generator()).clamp(-5, 5), 4).to(device)
    assert check(Problem(x, w, sw)).shape == (*leading, 6, 24)


def test_leading_dimensions_that_do_not_fold(device):
    _, w, sw = random_problem(1, 24, 40, device=device)
    base = torch.randn(5, 3, 7, 2, 40, generator=generator()).clamp(-5, 5)
    base = plant(base, 4).to(device)
    for order in ((1, 0, 2, 3, 4), (3, 1, 0, 2, 4), (2, 3, 1, 0, 4), (4, 1, 2, 3, 0)):
        x = base.permute(order)
        check(Problem(x, w if x.shape[-1] == 40 else w[:, :5], sw))
    check(Problem(base[:, ::2, 1:6], w, sw))
    check(Problem(base[:1].expand(4, 3, 7, 2, 40), w, sw))
    check(Problem(base[:, :, :, 0], w, sw), out=torch.empty(5, 3, 7, 26, device=device)[..., :24])


@pytest.mark.parametrize("bias_shape", [(24,), (1, 24)], ids=str)
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
def test_bias_and_out_dtype(device, out_dtype, bias_shape):
    bias = random_floats(*bias_shape, device=device)
    for dtype, columns in itertools.product(FLOAT_DTYPES, (0, 6)):
        problem = random_problem(9, 24, 40, device=device, dtype=dtype, columns=columns)
        check(problem, bias=bias, out_dtype=out_dtype)
        check(problem, bias=bias.to(out_dtype), out_dtype=out_dtype)
        check(problem, bias=bias.to(out_dtype)[..., :1].expand(bias_shape), out_dtype=out_dtype)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24,), (1, 24)], ids=str)
def test_shapes_of_sw(device, shape):
    x, w, _ = random_problem(9, 24, 40, device=device, columns=6)
    check(Problem(x, w, 0.01 + random_floats(*shape, device=device).abs()))
    for number in (0.3, 2):
        check(Problem(x, w, number))


def test_out_of_several_kinds(device):
    x, w, sw = random_problem(3, 5, 16, device=device, dtype=torch.bfloat16, columns=2)
    assert fastq.llm_int8_matmul(x, w, sw).dtype == torch.bfloat16
    assert fastq.llm_int8_matmul(x.half(), w, sw).dtype == torch.float16
    out = torch.empty(3, 5, dtype=torch.float16, device=device)
    assert fastq.llm_int8_matmul(x, w, sw, out=out) is out
    assert fastq.llm_int8_matmul(x, w, sw, out=out, out_dtype=torch.float16) is out
    with torch.no_grad():
        x.requires_grad_()
        assert torch.equal(fastq.llm_int8_matmul(x, w, sw, out_dtype=torch.float16), out)


@dtypes
def test_results_beyond_the_range(device, dtype):
    x, w, sw = random_problem(16, 24, 32, device=device, dtype=dtype, columns=3)
    check(Problem(x, w, sw * 1e37))
    check(Problem(x, w, sw * 1e3))  # over 65504 for float16
    check(Problem(x, w, sw * 1e-38))
    check(Problem(x, w, sw * 1e-5))  # float16 subnormals
    check(Problem(x * 1e-37 if dtype != torch.float16 else x * 1e-7, w, sw), threshold=1e-38)


@dtypes
@pytest.mark.parametrize(
    "shape",
    [(0, 5, 7), (4, 0, 7), (0, 0, 7), (0, 0, 0), (0, 5, 0), (4, 5, 0), (1, 130, 0)],
    ids=str,
)
def test_empty_operands(device, shape, dtype):
    """K of 0 gives the bias; the number of columns with an outlier is counted even then."""
    M, N, K = shape
    problem = random_problem(*shape, device=device, dtype=dtype, columns=3)
    out = torch.full((M, N), math.nan, dtype=dtype, device=device)
    check(problem, out=out)
    check(problem, bias=random_floats(N, device=device))
    batched = problem._replace(x=problem.x.view(M, 1, K).transpose(0, 1))
    assert check(batched).shape == (1, M, N)
    assert fastq.llm_int8_matmul(*problem).shape == (M, N)


@dtypes
def test_a_row_has_the_same_bits_in_every_batch(device, dtype):
    """Whatever the outliers of the rows around it."""
    problem = random_problem(300, 200, 352, device=device, dtype=dtype, columns=6)
    problem.x[150:160, 20:120] += 30  # more columns than CUDA gathers
    kept = random_kept(problem, torch.arange(0, 352, 3), dtype=torch.bfloat16)
    bias = random_floats(200, device=device)

    def product(rows):
        moved = problem._replace(x=problem.x[rows])
        return fastq.llm_int8_matmul(*moved, bias=bias, **kept)

    whole = product(slice(None))
    for row, count in itertools.product((0, 1, 63, 150, 165, 299), (1, 2, 16, 65, 130)):
        rows = slice(max(0, row + 1 - count), row + 1)
        assert torch.equal(product(rows)[-1], whole[row])


@pytest.mark.parametrize("columns", [0, 6, 100])
def test_equal_bits_in_every_run(device, columns):
    problem = random_problem(130, 260, 520, device=device, dtype=torch.bfloat16, columns=columns)
    first = check(problem)
    for _ in range(20):
        assert torch.equal(fastq.llm_int8_matmul(*problem), first)


@pytest.mark.parametrize("shape", [(1,), (), (1, 1)], ids=str)
def test_shapes_of_outlier_count(device, shape):
    x, w, sw = random_problem(9, 24, 40, device=device, columns=6)
    for columns in (0, 3, 40):
        x.clamp_(-5, 5)
        x[4, :columns] = 9
        count = torch.full(shape, -1, dtype=torch.int32, device=device)
        fastq.llm_int8_matmul(x, w, sw, outlier_count=count)
        assert count.item() == columns


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FASTQ_CPU_ISA", isa)
    for M, N, K in ((1, 77, 200), (3, 515, 129), (33, 65, 64), (130, 40, 515)):
        for dtype, columns in itertools.product(FLOAT_DTYPES, (0, 5, 70)):
            columns = min(columns, K)
            problem = random_problem(M, N, K, device="cpu", dtype=dtype, columns=columns)
            problem.x[0, 1], problem.x[-1, 2] = math.inf, math.nan
            check(problem)
            check(problem, **random_kept(problem, torch.arange(1, K, 3)), bias=problem.sw)
            check(problem._replace(w=in_layout(problem.w, "transposed")), threshold=2.0)


@dtypes
def test_it_is_accurate_where_there_are_outliers(device, dtype):
    """Six columns with outliers of 20 to 60 times the median size cost nothing where 16 bits of
    their weights are kept, and little where they are not; a plain product they would ruin."""
    M, N, K = 100, 300, 1024
    draw = generator(3)
    plain, w = torch.randn(M, K, generator=draw), torch.randn(N, K, generator=draw)
    columns = torch.tensor([5, 77, 300, 301, 640, 1023])
    size = plain.abs().median() * (20 + 40 * torch.rand(M, 6, generator=draw))
    planted = plain.clone()
    planted[:, columns] = size * (torch.randint(0, 2, (M, 6), generator=draw) * 2 - 1)
    qw, sw = (t.to(device) for t in fastq.quantize_per_channel(w))
    kept = {
        "outlier_columns": columns.int().to(device),
        "outlier_weight": w[:, columns].to(device, torch.bfloat16),
    }

    def error(x, **options):
        """Root mean square, and relative to the exact product's."""
        x = x.to(dtype)
        exact = x.double() @ w.double().t()
        y = fastq.llm_int8_matmul(x.to(device), qw, sw, out_dtype=torch.float32, **options)
        rms = (y.cpu() - exact).square().mean().sqrt()
        return rms, rms / exact.square().mean().sqrt()

    without, relative_without = error(plain)
    with_kept, relative_with_kept = error(planted, **kept)
    in_int8, relative_in_int8 = error(planted)
    ruined, _ = error(planted, threshold=0.0)
    assert relative_without < 0.02
    assert with_kept <= 1.2 * without
    assert relative_with_kept <= 1.2 * relative_without
    assert with_kept < in_int8 <= 3 * without
    assert relative_in_int8 <= 1.5 * relative_without
    assert ruined > 2 * in_int8


@pytest.mark.cuda
@dtypes
@pytest.mark.parametrize("shape", [(1, 256, 128), (16, 512, 256), (100, 130, 257), (300, 256, 512)])
def test_replay_of_a_cuda_graph_with_other_outliers(shape, dtype):
    device = torch.device("cuda")
    problem = random_problem(*shape, device=device, dtype=dtype)
    kept = random_kept(problem, torch.arange(0, shape[2], 5))
    count = torch.zeros(1, dtype=torch.int32, device=device)

    def call():
        return fastq.llm_int8_matmul(*problem, outlier_count=count, w_is_constant=True, **kept)

    call()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = call()
    for columns in (0, 6, 100, 64, 65, 0):
        other = random_problem(*shape, device=device, dtype=dtype, columns=columns, seed=columns)
        problem.x.copy_(other.x)
        got.fill_(math.nan)
        graph.replay()
        reference.assert_same(got, llm_int8_matmul(*problem, **kept))
        assert count.item() == count_columns(problem.x)
