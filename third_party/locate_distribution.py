"""Prints where an installed package and its licence file lie, as JSON, without importing it.

Usage: locate_distribution.py DISTRIBUTION PACKAGE
"""

import importlib.metadata
import importlib.util
import json
import os
import sys


def locate(distribution: str, package: str) -> dict[str, str]:
    """Raises LookupError when the package or its licence file is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise LookupError(f"{package} is not installed")
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise LookupError(f"{distribution} is not installed") from error
    for file in files:
        if file.name.upper().startswith("LICENSE") and ".dist-info" in file.parts[0]:
            return {"package": os.path.dirname(spec.origin), "license": str(file.locate())}
    raise LookupError(f"{distribution} carries no licence file")


if __name__ == "__main__":
    try:
        print(json.dumps(locate(*sys.argv[1:])))
    except LookupError as error:
        sys.exit(str(error))
