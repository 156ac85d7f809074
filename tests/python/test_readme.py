"""The examples of README.md run as they stand there; the C one is in test_embedding.py."""

from __future__ import annotations

import os
import re
import sys

from conftest import REPOSITORY, run_tool
from test_embedding import readme_block


def test_python_example(capsys) -> None:
    names: dict = {}
    exec(compile(readme_block("python"), "README.md", "exec"), names)
    assert names["y"].shape == (4, 512)
    assert names["error"] < 0.02
    assert "largest error" in capsys.readouterr().out


def test_commands_stand_under_their_marks() -> None:
    """`.ci/run` takes the test command from README.md by this mark."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for mark, program in (("demo-command", "fastq demo"), ("test-command", "pytest")):
        (command,) = re.findall(rf"^<!-- {mark} -->\n```sh\n(.+)\n```$", text, re.MULTILINE)
        assert command.startswith("python3 -m venv .venv && ")
        assert command.endswith(f"/bin/{program}")
        assert "-c constraints.txt" in command


def test_tables_are_those_of_the_results() -> None:
    tree = {**os.environ, "PYTHONPATH": os.pathsep.join((str(REPOSITORY), *sys.path))}
    run_tool(sys.executable, "-m", "bench.readme_table", "--check", env=tree)
