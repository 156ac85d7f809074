"""A folder that appears whole or not at all."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

# What a folder of Hugging Face may hold; only such a folder is replaced.
_KNOWN = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "*token*",
    "*.model",
    "*.jinja",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "README.md",
    "LICENSE*",
    ".gitattributes",
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """Gives an empty folder beside `folder`; at the end of the block it takes its place.

    Everything in it is on the disk before it is renamed. Where the block raises, it is deleted, and
    `folder` is as it was. On Linux the two change places in one step; where the system or the file
    system cannot, the old one is renamed first.

    Raises FileExistsError where `folder` holds something else than a checkpoint, and
    FileNotFoundError where its parent is absent.
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    fresh = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.iterdir():
            _flush(file)
        _flush(fresh)
        _check_replaceable(folder)
        if not folder.exists():
            fresh.rename(folder)
        elif not _exchange(fresh, folder):
            _rename_aside(fresh, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # the unfinished one, or the old


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file, expected a folder")
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() or not any(fnmatchcase(entry.name, known) for known in _KNOWN):
            raise FileExistsError(
                f"{folder}: holds {entry.name}; expected a new folder, or one with a checkpoint "
                "and nothing else, to replace"
            )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where that cannot be done here."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    paths = (os.fsencode(one), os.fsencode(other))
    return rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def _rename_aside(fresh: Path, folder: Path) -> None:
    old = fresh.with_name(f"{fresh.name}.old")
    folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
