"""The demo's text: the source of the Python standard library, and the modules held out of it.

Every Python carries this text, so the demo needs no network. Training reads all of it but the
held-out modules and their tests; the demo measures perplexity on the held-out modules alone.
"""

from __future__ import annotations

import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Pure-Python modules, of varied kinds, that every Python from 3.10 to 3.14 has.
HELD_OUT = (
    "calendar",
    "cmd",
    "colorsys",
    "csv",
    "filecmp",
    "fnmatch",
    "graphlib",
    "gzip",
    "heapq",
    "netrc",
    "queue",
    "sched",
    "shelve",
    "textwrap",
)

# Installed packages, compiled files, and folders of tables or of this machine's own settings.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
    "encodings",
    "cjkencodings",
    "lib-dynload",
}
_SKIPPED_FILES = {"html/entities.py", "stringprep.py", "idlelib/help.py"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_MAX_NON_ASCII = 0.02


def stdlib_folder() -> Path:
    """Where the running Python keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_source(path: Path) -> str | None:
    """A source file's text in its declared encoding; None for one that does not decode.

    Some of Python's own tests are files with a broken encoding.
    """
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def is_held_out(relative: Path) -> bool:
    """Whether a file belongs to a held-out module: the module, its tests, a folder of either."""
    names = {part.removesuffix(".py").lstrip("_") for part in relative.parts}
    names |= {name.removeprefix("test_") for name in names}
    return not names.isdisjoint(HELD_OUT)


def training_texts(stdlib: Path) -> Iterator[tuple[str, str]]:
    """(relative path, text) of every file to train on, ordered by path."""
    files = {path.relative_to(stdlib).as_posix(): path for path in stdlib.rglob("*.py")}
    seen = set()
    for name in sorted(files):
        relative = Path(name)
        if is_held_out(relative) or _is_skipped(relative):
            continue
        text = read_source(files[name])
        if not text or text in seen or _non_ascii(text) > _MAX_NON_ASCII:
            continue
        seen.add(text)
        yield name, text


def held_out_texts(stdlib: Path | None = None) -> dict[str, str]:
    """The held-out modules' source by module name, read from `stdlib` or the running Python.

    Raises FileNotFoundError where the Python ships its library without source.
    """
    folder = stdlib or stdlib_folder()
    texts = {}
    for name in HELD_OUT:
        path = folder / f"{name}.py"
        text = read_source(path)
        if text is None:
            raise ValueError(f"{path}: not readable as Python source")
        texts[name] = text
    return texts


def _is_skipped(relative: Path) -> bool:
    if not _SKIPPED_FOLDERS.isdisjoint(relative.parts):
        return True
    return relative.as_posix() in _SKIPPED_FILES or relative.parts[0].startswith(_SKIPPED_PREFIXES)


def _non_ascii(text: str) -> float:
    return 1 - len(text.encode("ascii", "ignore")) / len(text)
