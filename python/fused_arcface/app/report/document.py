"""A report: sections of text, figures, tables, thumbnails and settings, as one HTML file that needs no other.

Commands fill sections, and only ``document.html`` beside this file makes HTML of them. Jinja escapes every text there,
and names of files are made printable first.
"""

from __future__ import annotations

import base64
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.table import Column, Table

from fused_arcface import __version__
from fused_arcface.base.extras import MissingExtra, pyplot
from fused_arcface.base.files import write_text
from fused_arcface.base.text import printable

from ..drawing import Drawing, as_svg
from ..measure import machine

if TYPE_CHECKING:
    from jinja2 import Environment


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
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    comparisons: Sequence[Comparison] = ()


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    summary: str
    """A sentence or two below the title."""
    sections: Sequence[Section]


def write_report(report: Report, path: Path) -> None:
    """Write a report, whole or not at all; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(report))


def render(report: Report) -> str:
    """Return a report as HTML. Without matplotlib it has no figures, and a note that gives the reason.

    >>> page = render(Report("<i>", "Nothing was found.", [Section("Figures")]))
    >>> "<h1>&lt;i&gt;</h1>" in page
    True
    """
    try:
        pyplot()
        note = ""
    except MissingExtra as missing:
        note = f"This report has no figures: {missing}"
    return _environment().get_template("document.html").render(report=report, note=note, picture=_picture, rows=rows)


def _picture(drawing: Drawing) -> str:
    return data_address(as_svg(drawing), "image/svg+xml")


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


def data_address(content: bytes, kind: str) -> str:
    """Return a ``data:`` address with this content.

    >>> data_address(b"ab", "image/png")
    'data:image/png;base64,YWI='
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", words: Sequence[int] = (0,)) -> Table:
    """Return a table.

    ``words`` are the places of its columns of text. The others are numbers: they are aligned to the right and never
    break in the report.
    """
    justify: dict[bool, Any] = {True: "left", False: "right"}
    made = Table(*(Column(name, justify=justify[place in words]) for place, name in enumerate(columns)), title=title)
    for row in rows:
        made.add_row(*row)
    return made


def rows(shown: Table) -> list[tuple[str, ...]]:
    """Return the rows of a table.

    >>> rows(table(("", "rate"), [("TAR", "0.5")]))
    [('TAR', '0.5')]
    """
    return list(zip(*(map(str, column.cells) for column in shown.columns), strict=True))


def about(options: Mapping[str, Any]) -> list[Section]:
    """Return the last sections of each report: the options of the command, and the versions and the machine.

    None is an option that was not given.
    """
    device = options.get("device") or "cpu"
    context = machine.context(torch.device("cpu" if device == "auto" else device))
    versions = [
        ("fused_arcface", f"{__version__}, {context['commit']}"),
        ("torch", context["torch"]),
        ("NumPy", np.__version__),
        ("Python", platform.python_version()),
        ("system", f"{platform.system()} {platform.release()}, {sys.platform}"),
        ("device", context["device"]),
        ("written", context["date"]),
    ]
    settings = [(name, _value(value)) for name, value in options.items()]
    return [
        Section("Settings", tables=[table(("option", "value"), settings, words=(0, 1))]),
        Section("Versions", tables=[table(("", ""), versions, words=(0, 1))]),
    ]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value in (None, "") else str(value)
