"""A report: sections of text, figures, tables, thumbnails and settings, as one HTML file that needs no other.

Commands fill sections, and only ``document.html`` beside this file makes HTML of them. Jinja escapes every text there,
and names of files are made printable first.
"""

from __future__ import annotations

import base64
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.table import Table as TerminalTable

from fused_arcface import __version__
from fused_arcface.base.extras import MissingExtra, pyplot
from fused_arcface.base.files import write_text
from fused_arcface.base.text import printable

from ..drawing import Drawing, as_svg
from ..measure import machine

if TYPE_CHECKING:
    from jinja2 import Environment


class Table(NamedTuple):
    """A table."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: Sequence[int] = (0,)
    """Places of the columns of text. The others are numbers: they are aligned to the right and never break."""


class Figure(NamedTuple):
    """A picture."""

    source: str
    """A ``data:`` address, which holds the picture itself."""
    caption: str


class Thumbnail(NamedTuple):
    """A small image and its name."""

    name: str
    source: str
    """A ``data:`` address, or "" if the image is not at hand."""


class Comparison(NamedTuple):
    """Two images that were compared, side by side."""

    first: Thumbnail
    second: Thumbnail
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a report. Its contents are shown in the order of the fields."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    comparisons: Sequence[Comparison] = ()


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    summary: str
    """A sentence or two below the title."""
    sections: Sequence[Section]
    notes: Sequence[str] = field(default_factory=tuple)
    """Notes for the reader, shown before all sections."""


def write_report(report: Report, path: Path) -> None:
    """Write a report, whole or not at all; its folder is made if it is missing.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(report))


def render(report: Report) -> str:
    """Return a report as HTML.

    >>> page = render(Report("<i>", "Nothing was found.", [Section("Figures")]))
    >>> "<h1>&lt;i&gt;</h1>" in page
    True
    """
    return _environment().get_template("document.html").render(report=report)


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        autoescape=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        loader=FileSystemLoader(Path(__file__).parent),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )


def figures(drawings: Iterable[Drawing]) -> list[Figure]:
    """Draw figures. Without matplotlib there are none, and :func:`no_figures` gives the reason."""
    try:
        return [Figure(data_address(as_svg(each), "image/svg+xml"), each.caption) for each in drawings]
    except MissingExtra:
        return []


def no_figures() -> list[str]:
    """Return a note for the report if figures cannot be drawn here."""
    try:
        pyplot()
    except MissingExtra as missing:
        return [f"This report has no figures: {missing}"]
    return []


def data_address(content: bytes, kind: str) -> str:
    """Return a ``data:`` address with this content.

    >>> data_address(b"ab", "image/png")
    'data:image/png;base64,YWI='
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def as_table(shown: TerminalTable) -> Table:
    """Return a table that was printed on the terminal.

    >>> shown = TerminalTable("", "rate", title="Rates")
    >>> shown.add_row("TAR", "0.5")
    >>> as_table(shown)
    Table(columns=['', 'rate'], rows=[['TAR', '0.5']], caption='Rates', words=[0, 1])
    """
    columns = [[str(cell) for cell in column.cells] for column in shown.columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    words = [place for place, column in enumerate(shown.columns) if column.justify != "right"]
    return Table([str(column.header) for column in shown.columns], rows, str(shown.title or "").strip(), words)


def settings(options: Mapping[str, Any], title: str = "Settings") -> Section:
    """Return a section with the options of a command. None is an option that was not given."""
    rows = [(name, _value(value)) for name, value in options.items()]
    return Section(title, tables=[Table(("option", "value"), rows, words=(0, 1))])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value in (None, "") else str(value)


def versions(device: str | torch.device = "cpu") -> Section:
    """Return a section with the versions and the machine that a report was made with."""
    context = machine.context(torch.device(device))
    rows = [
        ("fused_arcface", f"{__version__}, {context['commit']}"),
        ("torch", context["torch"]),
        ("NumPy", np.__version__),
        ("Python", platform.python_version()),
        ("system", f"{platform.system()} {platform.release()}, {sys.platform}"),
        ("device", context["device"]),
        ("written", context["date"]),
    ]
    return Section("Versions", tables=[Table(("", ""), rows, words=(0, 1))])
