"""Finds another distribution that installs a package called ``fastq``.

The name on the package index belongs to someone else; this package is ``fastq-kernels``. Installed
together, the two overwrite each other's files.
"""

from __future__ import annotations

import importlib.metadata
import warnings

OURS = "fastq-kernels"
THEIRS = "fastq"


def clashing_distributions() -> list[str]:
    """Names and versions of the other installed distributions that own the import name."""
    try:
        other = importlib.metadata.distribution(THEIRS)
    except importlib.metadata.PackageNotFoundError:
        return []
    return [f"{other.metadata['Name']} {other.version}"]


def warn_of_clash() -> None:
    """Warns once at import. One look-up by name: listing every distribution would take 0.1 s."""
    for name in clashing_distributions():
        warnings.warn(
            f"{name} is installed and has the same import name as {OURS}: files of the two may be "
            f"mixed. Mend it with: pip uninstall -y {THEIRS} && pip install --force-reinstall "
            f"--no-deps {OURS}",
            RuntimeWarning,
            stacklevel=3,
        )
