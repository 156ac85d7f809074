"""`fastq tune`: the table it writes, and that dispatch follows one."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import c_abi
import fastq
from conftest import REPOSITORY
from fastq import _core, cli, tuning
from fastq.tuning import Device, Result, Shape

H200 = Device(torch.device("cuda", 0), "NVIDIA H200", "9.0", 132, 60 << 20)
SLOW, FAST = "sm90/64x64x256_swapped", "sm90/16x64x256_swapped_width32"


def result(M: int, N: int = 4096, K: int = 4096, *, gain: float) -> Result:
    return Result(Shape(M, N, K), SLOW, 10.0 * gain, FAST, 10.0)


# ---- shapes -------------------------------------------------------------------------------------


def test_shapes_of_a_file(tmp_path):
    file = tmp_path / "shapes.json"
    cases = [
        {"M": 16, "N": 512, "K": 256},
        {"M": [1, 16], "NK": [[512, 256], [64, 32]], "devices": ["cpu", "cuda"], "tag": "any"},
        {"M": 2, "N": 3, "K": 4, "devices": ["cpu"]},
    ]
    file.write_text(json.dumps(cases))
    assert tuning.read_shapes(file) == [(16, 512, 256), (1, 512, 256), (1, 64, 32), (16, 64, 32)]


def test_shapes_of_the_benchmark():
    shapes = tuning.read_shapes(REPOSITORY / "bench" / "shapes" / "int8_gemm.json")
    assert (16, 11008, 4096) in shapes
    assert (2048, 2048, 2048) not in shapes  # for the CPU


@pytest.mark.parametrize(
    "text",
    [
        *('{"M": 1}', "[[1, 2, 3]]", '[{"M": 0, "N": 1, "K": 1}]', '[{"M": [], "N": 1, "K": 1}]'),
        *('[{"M": true, "N": 1, "K": 1}]', '[{"M": 1, "NK": [[1, 2, 3]]}]', "7", "null", "[1"),
        *("[]", '[{"M": 1, "N": 1.5, "K": 1}]', '[{"M": 1, "N": 1, "K": 1, "devices": []}]'),
    ],
)
def test_a_file_without_shapes(text, tmp_path, capsys):
    file = tmp_path / "shapes.json"
    file.write_text(text)
    assert cli.main(["tune", "--shapes", str(file)]) == 1
    assert capsys.readouterr().err.startswith("fastq tune: ")


def test_shapes_of_the_command(monkeypatch):
    calls = []
    monkeypatch.setattr(tuning, "main", lambda **kwargs: calls.append(kwargs) or 0)
    assert cli.main(["tune", "--nk", "512x256,64x32", "--m", "1,16"]) == 0
    assert calls[0]["shapes"] == [(1, 512, 256), (16, 512, 256), (1, 64, 32), (16, 64, 32)]
    assert calls[0]["output"] == Path("fastq_tuning.txt")
    assert cli.main(["tune", "--nk", "512x256", "--output", "a/b", "--device", "cuda:1"]) == 0
    assert len(calls[1]["shapes"]) > 10
    assert (calls[1]["output"], calls[1]["device"]) == (Path("a/b"), "cuda:1")


# ---- devices ------------------------------------------------------------------------------------


def test_no_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "table.txt"
    assert cli.main(["tune", "--nk", "512x256", "--output", str(output)]) == 1
    expected = "fastq tune: there is no GPU here that fastq can use: see `fastq doctor`\n"
    assert capsys.readouterr().err == expected
    assert not output.exists()


@pytest.mark.parametrize("name", ["cpu", "gpu", "cuda:x"])
def test_no_cuda_device(name, capsys):
    assert cli.main(["tune", "--nk", "512x256", "--device", name]) == 1
    assert capsys.readouterr().err.startswith("fastq tune: ")


def test_a_device_that_is_not_there(monkeypatch):
    cuda = {"devices": [{"name": "g", "compute_capability": "9.0", "sm_count": 1, "l2_bytes": 2}]}
    monkeypatch.setattr(tuning.ops, "describe", lambda: {"cuda": cuda})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tuning.find_device("cuda:0") == (torch.device("cuda:0"), "g", "9.0", 1, 2)
    with pytest.raises(RuntimeError, match="device is cuda:1, but the last one is cuda:0"):
        tuning.find_device("cuda:1")


# ---- measuring ----------------------------------------------------------------------------------


class FakeTimer:
    def __init__(self, microseconds: float):
        self.microseconds, self.samples = microseconds, 0

    def sample(self) -> float:
        self.samples += 1
        return self.microseconds


@pytest.fixture
def problem(monkeypatch):
    """A product on the CPU, whose candidates take the times that `problem.times` says."""
    cpu = Device(torch.device("cpu"), "cpu", "0.0", 1, l2_bytes=1 << 12)
    made = tuning._Problem(Shape(3, 40, 64), cpu)
    made.times = {"heuristic's": 10.0, **{f"slow{i}": 20.0 + i for i in range(9)}, "best": 7.0}
    made.timers = {}

    def timer(name, pool):
        return made.timers.setdefault(name, FakeTimer(made.times[name]))

    monkeypatch.setattr(made, "candidates", lambda: list(made.times))
    monkeypatch.setattr(made, "timer", timer)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return made


def test_operands_rotate_over_more_than_the_cache(problem):
    bytes_each = 3 * 64 + 64 * 40 + 2 * 3 * 40
    assert len(problem.calls) == -(-4 * (1 << 12) // bytes_each)
    outs = [call() for call in problem.calls]
    assert len({out.data_ptr() for out in outs}) == len(outs)
    assert all(torch.equal(out, outs[0]) for out in outs)
    b = problem.calls[1].args[1]
    assert (b.shape, b.stride()) == ((64, 40), (1, 64))  # as nn.Linear's weight, transposed


def test_the_fastest_is_found_in_two_stages(problem):
    found = tuning._measure(problem)
    assert found == ((3, 40, 64), "heuristic's", 10.0, "best", 7.0)
    assert found.choice == "best"
    fine = {name for name, t in problem.timers.items() if t.samples > tuning.FINE_ROUNDS}
    assert fine == {"heuristic's", "best", "slow0", "slow1"}


def test_a_gain_within_the_noise_is_none(problem):
    problem.times["best"] = 9.9
    assert tuning._measure(problem).choice == "heuristic"
    problem.times = {"heuristic's": 10.0}
    problem.timers.clear()
    assert tuning._measure(problem) == ((3, 40, 64), "heuristic's", 10.0, "heuristic's", 10.0)


def test_other_bits_are_an_error(problem, monkeypatch):
    exact = problem.bits
    monkeypatch.setattr(problem, "bits", lambda name: exact(name) + (name == "best"))
    with pytest.raises(RuntimeError, match="3x40x64: best and heuristic's differ in their bits"):
        tuning._measure(problem)


@pytest.mark.parametrize("before", [None, "sm80"])
def test_forcing_leaves_the_environment_as_it_was(before, monkeypatch):
    monkeypatch.delenv("FASTQ_KERNELS", raising=False)
    if before is not None:
        monkeypatch.setenv("FASTQ_KERNELS", before)

    def fails():
        with tuning._forced("sm90"):
            assert os.environ["FASTQ_KERNELS"] == "sm90"
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert os.environ.get("FASTQ_KERNELS") == before


def test_the_cpu_has_no_candidates():
    a = torch.zeros(2, 16, dtype=torch.int8)
    scale, out = torch.ones(()), torch.zeros(2, 2)
    with pytest.raises(NotImplementedError, match="int8_gemm_candidates: a is on cpu"):
        _core.int8_gemm_candidates(a, a.t(), scale, scale, out, False)


def test_null_pointers_through_the_c_abi():
    text = ctypes.create_string_buffer(8)
    args = c_abi.with_size(c_abi.GemmArgs)
    candidates = c_abi.library.fastq_int8_gemm_candidates
    assert candidates(ctypes.byref(args), None, ctypes.c_size_t(8)) == c_abi.INVALID_VALUE
    assert c_abi.last_error() == "int8_gemm_candidates: text is a null pointer"
    assert candidates(None, text, ctypes.c_size_t(8)) == c_abi.INVALID_VALUE
    assert c_abi.last_error() == "int8_gemm_candidates: args is a null pointer"


# ---- the command --------------------------------------------------------------------------------


def run_tune(monkeypatch, results, output: Path, *arguments: str) -> int:
    """`fastq tune` on as many shapes, which gives `results`, or raises those that are errors."""

    def tune(shapes, device):
        assert device == H200
        for item in results:
            if isinstance(item, BaseException):
                raise item
            yield item

    monkeypatch.setattr(tuning, "find_device", lambda name: H200)
    monkeypatch.setattr(tuning, "tune", tune)
    batches = ",".join(str(i + 1) for i in range(len(results)))
    command = ["tune", "--nk", "4096x4096", "--m", batches, "--output", str(output)]
    return cli.main([*command, *arguments])


def lines_of(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if not line.startswith("#")]


def test_the_table_and_the_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "table.txt"
    results = [result(16, gain=1.25), result(1, gain=1.01), result(64, 512, 256, gain=1.03)]
    assert run_tune(monkeypatch, results, output) == 0
    assert lines_of(output) == [
        f"9.0 132 64 512 256 {FAST}  # 10.00 us, heuristic 10.30 us",
        "9.0 132 1 4096 4096 heuristic  # 10.00 us",
        f"9.0 132 16 4096 4096 {FAST}  # 10.00 us, heuristic 12.50 us",
    ]
    assert "fastq tune" in output.read_text().splitlines()[1]
    assert [file.name for file in tmp_path.iterdir()] == ["table.txt"]
    out = capsys.readouterr().out
    for text in (
        *("NVIDIA H200", "16 × 4096 × 4096", "12.50", "1.250", "1.010", FAST, "heuristic"),
        *("2 of 3 shapes are faster", "by 13.5 % in the mean"),
        f"FASTQ_TUNING_TABLE={output}",
    ):
        assert text in out


def test_a_table_is_added_to(monkeypatch, tmp_path):
    output = tmp_path / "table.txt"
    output.write_text(
        "# mine\n9.0 132 1 4096 4096 sm90/8x64x256_swapped # best\n"
        "9.0 132 16 4096 4096 heuristic\n8.0 108 16 4096 4096 sm80/64x64x128\n"
    )
    assert run_tune(monkeypatch, [result(16, gain=1.5)], output) == 0
    assert lines_of(output) == [
        "8.0 108 16 4096 4096 sm80/64x64x128",
        "9.0 132 1 4096 4096 sm90/8x64x256_swapped # best",
        f"9.0 132 16 4096 4096 {FAST}  # 10.00 us, heuristic 15.00 us",
    ]


@pytest.mark.parametrize("text", ["# fastq\n\nread me\n", "9.0 132 16 4096 x heuristic", "\xff\0"])
def test_another_file_is_not_overwritten(text, monkeypatch, tmp_path, capsys):
    output = tmp_path / "README.md"
    output.write_text(text, encoding="latin-1")
    assert run_tune(monkeypatch, [result(1, gain=1.5)], output) == 1
    assert output.read_text(encoding="latin-1") == text
    assert "not a line of a tuning table" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    assert run_tune(monkeypatch, [result(1, gain=1.5)], tmp_path / "no" / "table.txt") == 1
    assert "is no folder" in capsys.readouterr().err
    assert run_tune(monkeypatch, [result(1, gain=1.5)], tmp_path) == 1
    assert "fastq tune: " in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "table.txt"
    measured = [result(1, gain=1.5), result(2, gain=1.5)]
    assert run_tune(monkeypatch, [*measured, KeyboardInterrupt()], output) == 130
    assert len(lines_of(output)) == 2
    assert "Interrupted after 2 of 3 shapes" in capsys.readouterr().out
    output.unlink()
    assert run_tune(monkeypatch, [KeyboardInterrupt()], output) == 130
    assert "nothing written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    output = tmp_path / "table.txt"
    results = [result(1, gain=1.5), RuntimeError("CUDA: out of memory")]
    assert run_tune(monkeypatch, results, output) == 1
    assert "fastq tune: CUDA: out of memory" in capsys.readouterr().err
    assert len(lines_of(output)) == 1


def test_json(monkeypatch, tmp_path, capsys):
    output = tmp_path / "table.txt"
    assert run_tune(monkeypatch, [result(16, gain=1.25)], output, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "NVIDIA H200"
    assert found["table"] == str(output)
    assert found["shapes"] == [
        {
            **{"M": 16, "N": 4096, "K": 4096, "gain": 1.25, "choice": FAST},
            **{"heuristic": SLOW, "heuristic_us": 12.5, "fastest": FAST, "fastest_us": 10.0},
        }
    ]


# ---- CUDA ---------------------------------------------------------------------------------------

# Prints what is chosen for a product of sys.argv[1] rows and the sum of its output, or its error.
PROGRAM = """
import sys, torch, fastq
torch.manual_seed(0)
a = torch.randint(-127, 128, (int(sys.argv[1]), 512), dtype=torch.int8).cuda()
b = torch.randint(-127, 128, (256, 512), dtype=torch.int8).cuda().t()
for _ in range(2):
    try:
        print(fastq.describe_int8_gemm(a, b), fastq.int8_gemm(a, b, 1.0, 1.0).double().sum().item())
    except ValueError as error:
        print(error)
"""


def dispatched(rows: int, **settings: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTQ_")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(rows)],
        capture_output=True,
        text=True,
        env={**environment, **settings},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert first == second
    return first


def candidates(rows: int) -> list[str]:
    a = torch.zeros(rows, 512, dtype=torch.int8, device="cuda")
    b = torch.zeros(256, 512, dtype=torch.int8, device="cuda").t()
    scale = torch.ones((), device="cuda")
    out = torch.zeros(rows, 256, dtype=torch.bfloat16, device="cuda")
    return _core.int8_gemm_candidates(a, b, scale, scale, out, True).splitlines()


def key() -> str:
    gpu = tuning.find_device("cuda")
    return f"{gpu.compute_capability} {gpu.sm_count}"


@pytest.mark.cuda
def test_every_candidate_can_be_forced(monkeypatch):
    a = torch.zeros(16, 512, dtype=torch.int8, device="cuda")
    b = torch.zeros(256, 512, dtype=torch.int8, device="cuda").t()
    names = candidates(16)
    assert 2 <= len(set(names)) == len(names) <= 64
    for name in names:
        monkeypatch.setenv("FASTQ_KERNELS", name)
        assert fastq.describe_int8_gemm(a, b).split(" ")[0] == f"cuda/{name}"
        assert (fastq.int8_gemm(a, b, 1.0, 1.0) == 0).all()


@pytest.mark.cuda
def test_candidates_need_room_in_c():
    tensors = [torch.zeros(16, 64, dtype=torch.int8, device="cuda") for _ in range(2)]
    one, out = torch.ones((), device="cuda"), torch.zeros(16, 16, device="cuda")

    def view(x):
        return c_abi.view(x, device_type=c_abi.CUDA)

    weight = c_abi.with_size(c_abi.Weight, data=view(tensors[1].t()), scale=view(one))
    args = c_abi.with_size(
        c_abi.GemmArgs, a=view(tensors[0]), b=ctypes.pointer(weight), scale_a=view(one)
    )
    args.out = view(out)
    entry, text = c_abi.library.fastq_int8_gemm_candidates, ctypes.create_string_buffer(8192)
    assert entry(ctypes.byref(args), text, ctypes.c_size_t(8192)) == 0
    length = len(text.value)
    assert entry(ctypes.byref(args), text, ctypes.c_size_t(length)) == c_abi.INVALID_VALUE
    assert f"text has room for {length} bytes, expected {length + 1}" in c_abi.last_error()
    assert entry(ctypes.byref(args), text, ctypes.c_size_t(length + 1)) == 0


@pytest.mark.cuda
def test_dispatch_follows_a_table(tmp_path):
    heuristic, other = candidates(16)[0], candidates(16)[1]
    file = tmp_path / "table.txt"
    file.write_text(f"{key()} 8 256 512 heuristic\n{key()} 16 256 512 {other}\n")
    without, sums = dispatched(16, FASTQ_TUNING_TABLE="none").rsplit(" ", 1)
    assert without.startswith(f"cuda/{heuristic}")
    assert dispatched(16, FASTQ_TUNING_TABLE=str(file)) == f"cuda/{other} (tuned) {sums}"
    assert "tuned" not in dispatched(8, FASTQ_TUNING_TABLE=str(file))
    assert "tuned" not in dispatched(17, FASTQ_TUNING_TABLE=str(file))
    forced = dispatched(16, FASTQ_TUNING_TABLE=str(file), FASTQ_KERNELS=heuristic)
    assert forced.startswith(f"cuda/{heuristic}")
    assert forced.endswith(f" {sums}")
    assert "tuned" not in forced


@pytest.mark.cuda
def test_a_bad_table_is_an_error_of_every_product(tmp_path):
    missing = tmp_path / "missing.txt"
    error = dispatched(16, FASTQ_TUNING_TABLE=str(missing))
    assert error.startswith(f"FASTQ_TUNING_TABLE is {missing}, which cannot be read: No such file")
    malformed = tmp_path / "malformed.txt"
    malformed.write_text(f"# a table\n{key()} 16 256 512\n")
    error = dispatched(16, FASTQ_TUNING_TABLE=str(malformed))
    assert error.startswith(f"the tuning table {malformed}, line 2: there are 5 fields; expected:")
    # The way out for whoever meets it in production.
    heuristic = candidates(16)[0]
    forced = dispatched(16, FASTQ_TUNING_TABLE=str(missing), FASTQ_KERNELS=heuristic)
    assert forced.startswith(f"cuda/{heuristic}")


@pytest.mark.cuda
def test_tune_from_end_to_end(tmp_path):
    output = tmp_path / "table.txt"
    # A table that is not there yet may be the one that the environment names.
    arguments = ["--nk", "256x512", "--m", "1,16", "--json", "--output", str(output)]
    run = subprocess.run(
        [sys.executable, "-m", "fastq", "tune", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTQ_TUNING_TABLE": str(output)},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert [(s["M"], s["N"], s["K"]) for s in found["shapes"]] == [(1, 256, 512), (16, 256, 512)]
    lines = tuning.read_table(output)
    gpu = tuning.find_device("cuda")
    for shape in found["shapes"]:
        assert 0 < shape["fastest_us"] <= shape["heuristic_us"] < 1000
        assert shape["heuristic"] == candidates(shape["M"])[0]
        assert shape["fastest"] in candidates(shape["M"])
        says = lines[(gpu.compute_capability, gpu.sm_count, 256, 512, shape["M"])]
        assert says.split()[0] == shape["choice"]
        chosen = dispatched(shape["M"], FASTQ_TUNING_TABLE=str(output))
        tuned = shape["choice"] != "heuristic"
        assert chosen.startswith(f"cuda/{shape['fastest' if tuned else 'heuristic']}")
        assert (" (tuned) " in chosen) == tuned
