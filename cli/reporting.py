"""What commands print of long work: a progress bar, rejected samples, sizes and times."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import rich_click as click

REJECTED = 3
LISTED = 20


@contextmanager
def progress_bar(description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a bar with rate and time left on stderr; nothing where stderr is not a terminal. Yields its `advance`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.1f} {unit}/s" if task.speed else "")

    console = Console(stderr=True)
    with Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


def list_rejected(rejected: Mapping[str, str]) -> None:
    """Name the samples that were rejected on stderr, and why."""
    if not rejected:
        return
    click.echo(f"{len(rejected)} samples were rejected:", err=True)
    for sample, reason in list(rejected.items())[:LISTED]:
        click.echo(f"  {printable(sample)}: {printable(reason)}", err=True)
    if len(rejected) > LISTED:
        click.echo(f"  … and {len(rejected) - LISTED} more", err=True)


def printable(text: str) -> str:
    """Return text that cannot steer a terminal: control characters come out escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def exit_code(rejected: Mapping[str, str]) -> int:
    """Return 3 if samples were rejected, else 0."""
    return REJECTED if rejected else 0


def size(n_bytes: float) -> str:
    """Return bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def note(text: str) -> None:
    """Say something on stderr."""
    print(text, file=sys.stderr)
