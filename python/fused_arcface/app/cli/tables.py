"""The parts of printed results that commands share."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from .terminal import say


def plain_table(title: str, *columns: str, room: int = 2) -> Table:
    """Make a table without lines, with some room between columns. The first is for names, the others for numbers."""
    return titled(title, Column(no_wrap=True), *numbers(*columns), box=None, padding=(0, room, 0, 0))


def titled(title: str, *columns: Column | str, **look: Any) -> Table:
    """Make a table with a bold title on the left, and rich's options of its look."""
    # A title may have a file's name in it, so its brackets are not markup.
    return Table(*columns, title=Text(title), title_justify="left", title_style="bold", **look)


def numbers(*headings: str, no_wrap: bool = False) -> list[Column]:
    """Return columns for numbers."""
    # Rich would leave out digits that a narrow terminal has no room for; folded, they go to the next line.
    return [Column(heading, justify="right", no_wrap=no_wrap, overflow="fold") for heading in headings]


def add_rates(table: Table, eer: float, tar: Mapping[float, float], others: int) -> None:
    """Add the equal error rate, and the true accept rates of a set with ``others`` pairs of two people."""
    table.add_row("equal error rate", f"{eer:.4f}")
    for far, rate in tar.items():
        table.add_row(f"TAR at FAR {far:g}", f"{rate:.4f}{'  no false accept' if far < 1 / others else ''}")


def spread(values: Sequence[float]) -> str:
    """Return mean and population standard deviation as text; a single value without a deviation."""
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.pstdev(values):.3f}" if len(values) > 1 else mean


def digits(value: float) -> str:
    """Return three digits of a positive number, or its whole part.

    >>> digits(1.2345), digits(12345.6)
    ('1.23', '12346')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def say_written(console: Console, folder: Path, paths: Sequence[Path], seconds: float | None = None) -> None:
    """Print which files were written where, and how long all took."""
    took = "" if seconds is None else f"Took {seconds:.0f} s. "
    names = ", ".join(path.name if path.parent == folder else str(path) for path in paths)
    say(console, f"\n{took}Written to {folder.resolve()}: {names}")
