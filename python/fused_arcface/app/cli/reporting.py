"""The options of the commands that write a report, the place of the report, and the words about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..training.events import Checkpointed, Event
from .errors import check_file
from .terminal import say, terminal

if TYPE_CHECKING:
    from ..report.document import Report

_WHAT = "HTML file for the report: tables, curves, the hardest images, settings and versions on one page."
ReportInOutput = Annotated[
    Path | None, typer.Option(rich_help_panel="Results"), f"{_WHAT} Default: report.html in --output."
]
ReportBeside = Annotated[
    Path | None,
    f"{_WHAT} Default: beside --json under its name, otherwise report.html in the folder of --pictures, "
    "otherwise in the folder of this command in runs.",
]
NoReport = Annotated[
    bool,
    typer.Option("--no-report", envvar="FUSED_ARCFACE_NO_REPORT", rich_help_panel="Results"),
    "Write no report, unless --report names a file.",
]

NAME = "report.html"
"""Name of the report in a command's folder."""

_SECONDS = 600.0


class ReportFile:
    """The place of a command's report: the file that the user asked for, or the default one unless none is wanted.

    Raises:
        WrongOption: if a named file cannot be written. The error comes before anything is computed.
    """

    def __init__(self, asked: Path | None, unwanted: bool, default: Path) -> None:
        self.path = asked or (None if unwanted else default)
        self._asked = asked is not None
        check_file("--report", asked)

    def write(self, make: Callable[[], Report]) -> list[Path]:
        """Make and write the report; return its path, nothing if none is wanted.

        A default place that cannot be written is a note, not an error: the user may have wanted the figures alone.

        Raises:
            OSError: if a named file cannot be written.
        """
        if self.path is None:
            return []
        from ..report.document import write_report

        try:
            write_report(make(), self.path)
        except OSError as error:
            if self._asked:
                raise
            _note(f"No report: {self.path} cannot be written: {error.strerror or error}")
            return []
        return [self.path]

    def write_or_note(self, make: Callable[[], Report]) -> list[Path]:
        """Write as :meth:`write` does, but never raise: a fault in a report must not end a training."""
        try:
            return self.write(make)
        except Exception as error:
            _note(f"No report: {str(error) or type(error).__name__}")
            return []


class Refresh:
    """Writes the report of a training anew while it runs: after a checkpoint, at most every ten minutes.

    In a run of millions of steps it takes no more than a twentieth of the time. ``write`` never raises.
    """

    def __init__(self, write: Callable[[], object]) -> None:
        self._write = write
        self._due = time.monotonic() + _SECONDS

    def __call__(self, event: Event) -> None:
        start = time.monotonic()
        if isinstance(event, Checkpointed) and start >= self._due:
            self._write()
            end = time.monotonic()
            self._due = end + max(_SECONDS, 20 * (end - start))


def beside(name: str, json: Path | None, pictures: Path | None) -> Path:
    """Return the default place of the report of ``verify`` and ``identify``.

    >>> str(beside("verify", Path("out/lfw.json"), None)), str(beside("verify", None, None))
    ('out/lfw.html', 'runs/verify/report.html')
    """
    if json is not None and (json.is_file() or not json.exists()):
        return json.with_suffix(".html")
    return (pictures or Path("runs", name)) / NAME


def say_report(console: Console, written: list[Path]) -> None:
    """Print where the report is."""
    for path in written:
        say(console, f"report: {path}")


def _note(text: str) -> None:
    say(terminal(stderr=True), text, "yellow")
