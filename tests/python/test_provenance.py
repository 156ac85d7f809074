"""Which commit and machine a stored figure says it is from."""

from __future__ import annotations

import platform
import subprocess

import pytest
import torch

import fastq
from fastq import provenance
from fastq.provenance import find_commit


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, and no word of the environment on the matter."""
    monkeypatch.delenv("FASTQ_COMMIT", raising=False)
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for path in ("file", "bench/results/old.json"):
        (tmp_path / path).write_text("1")
    try:
        for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
            subprocess.run(["git", "-C", tmp_path, *command], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    return tmp_path


def test_commit_and_changes(repository):
    head = ["git", "-C", repository, "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True).stdout.strip()
    assert len(commit) == 40
    assert find_commit(repository) == (commit, False)
    (repository / "bench" / "results" / "new.json").write_text("2")  # what a run writes
    assert find_commit(repository) == (commit, False)
    (repository / "file").write_text("2")
    assert find_commit(repository) == (commit, True)


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTQ_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert find_commit(tmp_path) == ("unknown", None)


@pytest.mark.parametrize(("dirty", "expected"), [(None, None), ("0", False), ("1", True)])
def test_the_environment_knows_better(repository, monkeypatch, dirty, expected):
    monkeypatch.setenv("FASTQ_COMMIT", "abc")
    monkeypatch.delenv("FASTQ_DIRTY", raising=False)
    if dirty is not None:
        monkeypatch.setenv("FASTQ_DIRTY", dirty)
    assert find_commit(repository) == ("abc", expected)


def test_an_installed_package_has_no_commit(repository, monkeypatch):
    """Files that git does not know, in a checkout of something else."""
    monkeypatch.setattr(provenance, "__file__", str(repository / "venv.py"))
    (repository / "venv.py").write_text("")
    assert find_commit() == ("unknown", None)


def test_machine_and_versions(device):
    found = provenance.provenance(device)
    assert found["torch"] == torch.__version__
    assert found["fastq"] == fastq.__version__
    assert found["python"] == platform.python_version()
    if device.type == "cuda":
        assert found["device"] == torch.cuda.get_device_name(device)
    else:
        assert found["threads"] == fastq.get_num_threads()
        assert found["isa"] == fastq.describe()["cpu"]["isa"]
