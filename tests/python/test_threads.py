"""Threads of the CPU backend: how many, callers side by side, and life after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastq
import reference
from llm_int8_formula import llm_int8_matmul, random_problem
from operands import random_gemm

CPU = torch.device("cpu")


@pytest.fixture
def num_threads():
    """Restores the number of threads."""
    before = fastq.get_num_threads()
    yield fastq.set_num_threads
    fastq.set_num_threads(before)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {"FASTQ_NUM_THREADS": "", **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


def test_set_and_get(num_threads):
    for count in (1, 3, 2):
        num_threads(count)
        assert fastq.get_num_threads() == count
        assert fastq.describe()["cpu"]["threads"] == count


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_bad_counts(num_threads, count):
    before = fastq.get_num_threads()
    with pytest.raises(ValueError, match=rf"set_num_threads: .*{count}"):
        num_threads(count)
    assert fastq.get_num_threads() == before


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_results_do_not_depend_on_the_number(num_threads, count):
    num_threads(count)
    for shape in ((1, 4000, 512), (16, 600, 256), (300, 200, 300)):
        for contiguous in (False, True):
            a, b, sa, sb = random_gemm(*shape, device=CPU)
            b = b.contiguous() if contiguous else b
            reference.assert_same(fastq.int8_gemm(a, b, sa, sb), reference.int8_gemm(a, b, sa, sb))
    x = torch.randn(500, 700)
    expected_q, expected_s = reference.quantize(x)
    q, s = fastq.quantize_per_token(x)
    reference.assert_same(q, expected_q)
    reference.assert_same(s[:, 0], expected_s)
    for shape in ((1, 4000, 512), (40, 600, 256), (300, 200, 300)):
        problem = random_problem(*shape, device=CPU, columns=70)
        reference.assert_same(fastq.llm_int8_matmul(*problem), llm_int8_matmul(*problem))


def test_callers_side_by_side(num_threads):
    num_threads(3)
    problems = [random_gemm(40 + i, 300, 200 + i, device=CPU, seed=i) for i in range(4)]
    expected = [reference.int8_gemm(*p) for p in problems]
    x = torch.randn(400, 300)
    expected_q, _ = reference.quantize(x)

    def caller(i):
        for _ in range(50):
            reference.assert_same(fastq.int8_gemm(*problems[i]), expected[i])
            reference.assert_same(fastq.quantize_per_token(x)[0], expected_q)
        return True

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(caller, range(4)))


def test_errors_stay_with_their_thread():
    def caller(i):
        bad = torch.ones(2, 3 + i, dtype=torch.int8)
        for _ in range(200):
            with pytest.raises(ValueError, match=rf"a has shape \(2, {3 + i}\)"):
                fastq.int8_gemm(bad, torch.ones(1, 2, dtype=torch.int8), 1.0, 1.0)
        return True

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(caller, range(4)))


# torch's own thread pool does not survive a fork: the children compare without it.
FORK_PRELUDE = """
import os, threading, torch, fastq
fastq.set_num_threads(4)
a = torch.randint(-128, 128, (200, 300), dtype=torch.int8)
w = torch.randint(-128, 128, (400, 300), dtype=torch.int8)
def product():
    return fastq.int8_gemm(a, w.t(), 0.5, 0.25, out_dtype=torch.float32).numpy().tobytes()
def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
expected = product()
"""


def test_fork_after_use():
    """The pool of the parent does not exist in the child: both must go on, and give the same."""
    result = run_python(
        FORK_PRELUDE
        + """
for _ in range(3):
    child = os.fork()
    if child == 0:
        same = all(product() == expected for _ in range(20))
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if product() == expected else 1)
        same = same and exit_code(grandchild) == 0 and fastq.get_num_threads() == 4
        os._exit(0 if same else 1)
    assert product() == expected
    assert exit_code(child) == 0
print("same")
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "same"


def test_fork_while_another_thread_multiplies():
    result = run_python(
        FORK_PRELUDE
        + """
stop = threading.Event()
def multiply():
    while not stop.is_set():
        product()
thread = threading.Thread(target=multiply)
thread.start()
codes = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if product() == expected else 1)
    codes.append(exit_code(child))
stop.set()
thread.join()
assert codes == [0] * 20, codes
print("same")
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "same"


def test_environment_variable():
    say = "import fastq; print(fastq.get_num_threads())"
    assert run_python(say, FASTQ_NUM_THREADS="3").stdout.strip() == "3"
    expected = str(len(os.sched_getaffinity(0)))
    assert run_python(say, FASTQ_NUM_THREADS="").stdout.strip() == expected


def test_bad_environment_variable():
    """It stays an error until it is mended, and is never taken for a number."""
    result = run_python(
        """
import os, torch, fastq
a = torch.ones(300, 300, dtype=torch.int8)
for value in ("0", "many", "-2", "3x"):
    os.environ["FASTQ_NUM_THREADS"] = value
    try:
        fastq.int8_gemm(a, a.t(), 1.0, 1.0)
    except ValueError as error:
        print(error)
os.environ["FASTQ_NUM_THREADS"] = "2"
fastq.int8_gemm(a, a.t(), 1.0, 1.0)
print(fastq.get_num_threads())
"""
    )
    assert result.returncode == 0, result.stderr
    *errors, count = result.stdout.splitlines()
    assert count == "2"
    for error, value in zip(errors, ("0", "many", "-2", "3x"), strict=True):
        assert "FASTQ_NUM_THREADS: expected a number from 1" in error
        assert f"got '{value}'" in error
