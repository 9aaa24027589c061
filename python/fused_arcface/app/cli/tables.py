"""What the commands' tables share."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text


def plain_table(title: str, *columns: str) -> Table:
    """A table without lines, its first column for names, the others for numbers."""
    # A title may have a file's name in it, whose brackets are no markup.
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def spread(values: Sequence[float]) -> str:
    """Mean and population deviation."""
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.pstdev(values):.3f}" if len(values) > 1 else mean
