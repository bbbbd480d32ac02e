"""Progress bars: on a terminal's stderr and nowhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def terminal_bar(*columns: ProgressColumn, **options: Any) -> Progress:
    """A bar that shows itself on a terminal and goes when the work is done. No columns: rich's own."""
    console = Console(stderr=True)
    console.quiet = not console.is_terminal  # a disabled bar alone ends its line in rich 13
    return Progress(*columns, console=console, transient=True, disable=console.quiet, **options)


@contextmanager
def byte_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to report further bytes to."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with terminal_bar(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.update(task, advance=count)
