"""What llm_int8_matmul says of arguments that it does not take; and nothing is written."""

from __future__ import annotations

import math
import re

import pytest
import torch

import fastq
from llm_int8_formula import llm_int8_matmul, random_kept, random_problem
from reference import assert_same
from test_bad_input import cases

SENTINEL = -77
FLOATS = "float32 or float16 or bfloat16"


def good(device):
    """A call with every argument: x (2, 4, 16), w (8, 16), three columns kept."""
    problem = random_problem(8, 8, 16, device=device, columns=2)
    kept = random_kept(problem, torch.tensor([1, 5, 15]))
    return {
        "x": problem.x.view(2, 4, 16),
        "w": problem.w,
        "sw": problem.sw,
        **kept,
        "bias": torch.ones(8, device=device),
        "out": torch.full((2, 4, 8), float(SENTINEL), device=device),
        "outlier_count": torch.full((1,), SENTINEL, dtype=torch.int32, device=device),
    }


def test_the_good_call_is_good(device):
    g = good(device)
    fastq.llm_int8_matmul(**g)
    assert g["outlier_count"].item() == 2
    out = g.pop("out")
    del g["outlier_count"]
    assert_same(out, llm_int8_matmul(**g))


TYPE_ERRORS = {
    "x is a NoneType, expected a torch.Tensor": lambda g: {"x": None},
    "x is a list, expected a torch.Tensor": lambda g: {"x": [[1.0]]},
    "w is a NoneType, expected a torch.Tensor": lambda g: {"w": None},
    "w is a str, expected a torch.Tensor": lambda g: {"w": "w"},
    "sw is a NoneType, expected a torch.Tensor": lambda g: {"sw": None},
    "sw is a list, expected a torch.Tensor": lambda g: {"sw": [1.0]},
    "bias is a float, expected a torch.Tensor": lambda g: {"bias": 1.0},
    "outlier_columns is a list, expected a torch.Tensor": lambda g: {"outlier_columns": [1, 2, 3]},
    "outlier_weight is a float, expected a torch.Tensor": lambda g: {"outlier_weight": 1.0},
    "outlier_count is a int, expected a torch.Tensor": lambda g: {"outlier_count": 0},
    "out is a str, expected a torch.Tensor": lambda g: {"out": "x"},
    "threshold is a NoneType, expected a number": lambda g: {"threshold": None},
    "threshold is a str, expected a number": lambda g: {"threshold": "6"},
    "threshold is a Tensor, expected a number": lambda g: {"threshold": g["bias"][0]},
    f"x has dtype int8, expected {FLOATS}": lambda g: {"x": g["x"].char()},
    "x has dtype float64, expected": lambda g: {"x": g["x"].double()},
    "w has dtype uint8, expected int8": lambda g: {"w": g["w"].view(torch.uint8)},
    "w has dtype float32, expected int8": lambda g: {"w": g["w"].float()},
    "w has dtype int64, expected int8": lambda g: {"w": g["w"].long()},
    "sw has dtype float16, expected float32": lambda g: {"sw": g["sw"].half()},
    "sw has dtype float64, expected float32": lambda g: {"sw": g["sw"].double()},
    "bias has dtype bfloat16, expected float32": lambda g: {"bias": g["bias"].bfloat16()},
    "outlier_columns has dtype int64, expected": lambda g: {
        "outlier_columns": g["outlier_columns"].long()
    },
    "outlier_columns has dtype float32, expected int32": lambda g: {
        "outlier_columns": g["outlier_columns"].float()
    },
    f"outlier_weight has dtype int8, expected {FLOATS}": lambda g: {
        "outlier_weight": g["outlier_weight"].char()
    },
    "outlier_count has dtype int64, expected": lambda g: {
        "outlier_count": g["outlier_count"].long()
    },
    "outlier_count has dtype float32, expected int32": lambda g: {
        "outlier_count": g["outlier_count"].view(torch.float32)
    },
    f"out has dtype int32, expected {FLOATS}": lambda g: {"out": g["out"].int()},
    "out has dtype torch.float32, expected out_dtype = torch.float16": lambda g: {
        "out_dtype": torch.float16
    },
    "out_dtype is torch.int32, expected one of float32, float16, bfloat16": lambda g: {
        "out": None,
        "out_dtype": torch.int32,
    },
    "out_dtype is torch.float64, expected one of": lambda g: {
        "out": None,
        "out_dtype": torch.float64,
    },
}
VALUE_ERRORS = {
    "x has shape (16,), expected (..., M, K)": lambda g: {"x": g["x"][0, 0], "out": None},
    "x has shape (), expected (..., M, K)": lambda g: {"x": g["x"][0, 0, 0]},
    "x has rank 9, expected": lambda g: {
        "x": g["x"].view(1, 1, 1, 1, 1, 1, 2, 4, 16),
        "out": None,
    },
    "w has shape (16,), expected (N, K)": lambda g: {"w": g["w"][0]},
    "w has shape (), expected (N, K)": lambda g: {"w": g["w"][0, 0], "out": None},
    "w has shape (8, 16, 1), expected (N, K)": lambda g: {"w": g["w"][..., None]},
    "x has shape (2, 4, 16) and w (16, 8); expected x (..., M, K) and w (N, K)": lambda g: {
        "w": g["w"].t(),
        "out": None,
    },
    "x has shape (2, 4, 15) and w (8, 16)": lambda g: {"x": g["x"][..., 1:]},
    "K = 131072, expected at most 131071": lambda g: {
        "x": torch.zeros(2, 131072, device=g["x"].device),
        "w": torch.zeros(8, 131072, dtype=torch.int8, device=g["x"].device),
        "out": None,
    },
    "sw has shape (7,), expected a scalar, (8,) or (1, 8) with N = 8": lambda g: {
        "sw": g["sw"][1:]
    },
    "sw has shape (8, 1), expected": lambda g: {"sw": g["sw"][:, None]},
    "bias has shape (9,), expected (8,) or (1, 8)": lambda g: {
        "bias": torch.ones(9, device=g["x"].device)
    },
    "bias has shape (), expected (8,)": lambda g: {"bias": g["bias"][0]},
    "only one of outlier_columns and outlier_weight is given": lambda g: {"outlier_columns": None},
    "only one of outlier_columns and outlier_weight is": lambda g: {"outlier_weight": None},
    "outlier_columns has shape (1, 3) (rank 2), expected rank 1": lambda g: {
        "outlier_columns": g["outlier_columns"][None]
    },
    "outlier_weight has shape (8, 2), expected (8, 3), (N, C)": lambda g: {
        "outlier_weight": g["outlier_weight"][:, 1:]
    },
    "outlier_weight has shape (3, 8), expected (8, 3)": lambda g: {
        "outlier_weight": g["outlier_weight"].t()
    },
    "outlier_weight has shape (8,), expected (8, 3)": lambda g: {
        "outlier_weight": g["outlier_weight"][:, 0]
    },
    "outlier_columns holds 17 columns, expected at most K = 16": lambda g: {
        "outlier_columns": torch.arange(17, dtype=torch.int32, device=g["x"].device),
        "outlier_weight": torch.ones(8, 17, device=g["x"].device),
    },
    "threshold is -1.0": lambda g: {"threshold": -1.0},
    "threshold is nan": lambda g: {"threshold": math.nan},
    "outlier_count has shape (2,), expected one element": lambda g: {
        "outlier_count": torch.zeros(2, dtype=torch.int32, device=g["x"].device)
    },
    "outlier_count has shape (0,), expected one element": lambda g: {
        "outlier_count": g["outlier_count"][:0]
    },
    "out has shape (2, 4, 7), expected (2, 4, 8)": lambda g: {"out": g["out"][..., :7]},
    "out has shape (8, 8), expected (2, 4, 8)": lambda g: {"out": g["out"].view(8, 8)},
    "the rows of x or of out have no stride in common": lambda g: {
        "out": torch.empty(4, 2, 8, device=g["x"].device).transpose(0, 1)
    },
    "out overlaps x in memory": lambda g: {
        "x": torch.ones(2, 4, 8, device=g["x"].device),
        "w": g["w"][:, :8].contiguous(),
        "outlier_columns": None,
        "outlier_weight": None,
        "overlap": "x",
    },
    "out overlaps bias in memory": lambda g: {"bias": g["out"][0, 0]},
    "out overlaps outlier_weight in memory": lambda g: {
        "outlier_weight": g["out"].view(-1)[:24].view(8, 3)
    },
    "out of shape (2, 4, 8) overlaps itself": lambda g: {
        "out": torch.zeros(1, 1, 8, device=g["x"].device).expand(2, 4, 8)
    },
    "outlier_count overlaps outlier_columns in memory": lambda g: {
        "outlier_count": g["outlier_columns"][:1]
    },
    "out overlaps outlier_count in memory": lambda g: {
        "outlier_count": g["out"].view(torch.int32)[0, 0, :1]
    },
}


@pytest.mark.parametrize(("change", "error", "message"), cases(TYPE_ERRORS, VALUE_ERRORS))
def test_bad_input(device, change, error, message):
    g = good(device)
    written = [g["out"], g["outlier_count"]]
    g |= change(g)
    if g.pop("overlap", None):
        g["out"] = g["x"]
    kept = g["outlier_columns"].clone() if isinstance(g["outlier_columns"], torch.Tensor) else None
    with pytest.raises(error, match=re.escape(message)) as caught:
        fastq.llm_int8_matmul(**g)
    assert str(caught.value).startswith("llm_int8_matmul: ")
    assert all((t == SENTINEL).all() for t in written)
    assert kept is None or torch.equal(kept, g["outlier_columns"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([1, 5, 5], "outlier_columns[2] is 5, expected ascending columns from 0 to 15"),
        ([5, 1, 7], "outlier_columns[1] is 1, expected ascending columns"),
        ([-1, 1, 7], "outlier_columns[0] is -1, expected ascending columns"),
        ([1, 5, 16], "outlier_columns[2] is 16, expected ascending columns"),
    ],
)
def test_columns_are_checked_on_a_cpu(columns, message):
    g = good(torch.device("cpu"))
    g["outlier_columns"] = torch.tensor(columns, dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape(message)):
        fastq.llm_int8_matmul(**g)
    assert (g["out"] == SENTINEL).all()


def test_requires_grad_is_refused_while_grad_is_enabled(device):
    g = good(device)
    for name in ("x", "sw", "bias", "outlier_weight", "out"):
        change = {name: g[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"^llm_int8_matmul: {name} requires grad"):
            fastq.llm_int8_matmul(**g | change)
        with torch.no_grad():
            fastq.llm_int8_matmul(**g | change)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "name", ["w", "sw", "bias", "outlier_columns", "outlier_weight", "out", "outlier_count"]
)
def test_one_device(name):
    g = good(torch.device("cuda"))
    with pytest.raises(TypeError, match=f"{name} is on cpu, expected cuda:0 as x is"):
        fastq.llm_int8_matmul(**g | {name: g[name].cpu()})
    g = good(torch.device("cpu"))
    with pytest.raises(TypeError, match=f"{name} is on cuda:0, expected cpu as x is"):
        fastq.llm_int8_matmul(**g | {name: g[name].cuda()})
