"""What long work tells of its progress, and the bar that shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

# Called with what is being done, how much of it is done, and of how much in all (0: unknown).
OnProgress = Callable[[str, int, int], None]


@contextlib.contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A bar on stderr, where that is a terminal; what it gives is an `on_progress` of
    :func:`fastq.quantize`."""
    # Here: `fastq --help` must stay light.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description:<36}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("loading", total=None)

        def report(label: str, done: int, total: int) -> None:
            progress.update(task, description=label, completed=done, total=total or None)

        yield report


def counter(report: OnProgress, label: str, total: int) -> Callable[[int], None]:
    """A function that is told how much more is done and reports the sum."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        report(label, done, total)

    return count
