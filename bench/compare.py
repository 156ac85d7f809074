"""Two results side by side; fails when one of our cases became slower.

``python -m bench.compare OLD.jsonl NEW.jsonl`` pairs the newest lines of the same op, shape, dtype
and implementation. A case of ours regresses when its speed falls below ``--at-least`` (0.95) of the
old one; torch's cases are shown to tell a slower machine from a slower kernel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .results import newest, shape_text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compare")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--at-least", type=float, default=0.95, help="speed, as a part of the old")
    options = parser.parse_args()
    old, new = newest(options.old), newest(options.new)
    common = [key for key in new if key in old]
    regressions = []
    for key in common:
        before, after = old[key], new[key]
        if before["device"] != after["device"]:
            sys.exit(f"the results come from {before['device']} and {after['device']}")
        speed = before["p50_us"] / after["p50_us"]
        regressed = after["implementation"].startswith("fastq") and speed < options.at_least
        name = f"{after['op']} {shape_text(after['shape'])} {after['implementation']}"
        if regressed:
            regressions.append(name)
        print(
            f"{name:64} {before['p50_us']:11.2f} -> {after['p50_us']:11.2f} us {speed:6.3f}x"
            f"{'  REGRESSION' if regressed else ''}"
        )
    for missing in (key for key in old if key not in new):
        print(f"{missing[0]} {missing[1]} {missing[3]}: not in {options.new}")
    if not common:
        sys.exit("the two results have no case in common")
    if regressions:
        sys.exit(f"{len(regressions)} of {len(common)} cases became slower")


if __name__ == "__main__":
    main()
