"""Tables as the README has them."""

from __future__ import annotations


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown and an empty one; the first column is aligned left, the others right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]
