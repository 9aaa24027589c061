"""The thresholds that ``verify`` finds: their tables, and their file in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fused_arcface.evaluation.thresholds import OperatingPoint

from ..thresholds import KeptThresholds, as_json, as_text
from .tables import plain_table
from .terminal import say


def threshold_tables(points: list[OperatingPoint], cosine: bool) -> list[Table]:
    """Return a table of the points, if there are any."""
    if not points:
        return []
    table = plain_table("Thresholds", "cosine >=" if cosine else "score >=", "accuracy", "FAR", "TAR")
    for row in as_text(points):
        table.add_row(*row)
    return [table]


def threshold_figures(points: list[OperatingPoint], cosine: bool) -> dict[str, Any]:
    """Return the points for the file of figures; a threshold that accepts nobody is null."""
    if not points:
        return {}
    return {"thresholds": {"of": "cosine" if cosine else "score", "points": as_json(points)}}


def keep_thresholds(console: Console, checkpoint: Path, kept: KeptThresholds) -> None:
    """Write thresholds into a run's folder, and say so. A folder that cannot be written is not an error."""
    from ..training.runs import RunError, RunFolder

    folder = RunFolder(checkpoint)
    if not folder.config.is_file():
        return
    try:
        folder.check_files()
        kept.save(folder.thresholds)
    except RunError as error:
        said = f"{error}; the thresholds of this verification are not kept"
    except OSError as error:
        said = f"{folder.thresholds} cannot be written: {error.strerror}; the run keeps its thresholds"
    else:
        said = f"similarity uses these thresholds from now on: {folder.thresholds}"
    say(console, said)
