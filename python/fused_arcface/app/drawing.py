"""Drawing: the style of all pictures, and the way from a drawing to a file or to a report.

Every picture is as wide as the page of a phone, so that its text can be read there. A drawing makes a figure of
matplotlib, which only this module imports.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fused_arcface.base.extras import pyplot, require
from fused_arcface.base.files import replacing
from fused_arcface.base.text import printable

WIDTH = 4.8
"""Inches of a picture's width. A phone of 390 pixels then shows text of 10 points at about 11 pixels."""

ONE, TWO = "#0072B2", "#D55E00"
"""Colors of two kinds that are compared: one person and two people, right and wrong."""

COLORS = (ONE, TWO, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
"""Okabe and Ito's colors, which stay apart for color-blind readers. More things than colors repeat them."""

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: the reader's own fonts know every script
    "svg.hashsalt": "fused_arcface",  # the same drawing is the same file
}
# Names of files may be in any script, and matplotlib's own font knows few.
_WIDE_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "PingFang SC", "Microsoft YaHei", "Yu Gothic")
_DOTS = 180
"""Dots an inch of a picture in a file."""


class Drawing(NamedTuple):
    """A picture that is not drawn yet."""

    name: str
    """File name, without its suffix."""
    caption: str
    """Sentences that describe the picture: its caption in a report, and its text for a reader who cannot see it."""
    draw: Callable[[Any], Any]
    """Return a figure, given pyplot."""


def write_pictures(drawings: Iterable[Drawing], folder: Path) -> list[Path]:
    """Draw pictures into ``FOLDER/NAME.png``; return their paths. The folder is made if it is missing.

    Raises:
        MissingExtra: if matplotlib is not installed.
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for drawing in drawings:
        paths.append(folder / f"{drawing.name}.png")
        with _drawn(drawing) as figure, replacing(paths[-1]) as file:
            figure.savefig(file, format="png", dpi=_DOTS)
    return paths


def as_svg(drawing: Drawing) -> bytes:
    """Return a picture as an ``<svg>`` element without links and without a date.

    Raises:
        MissingExtra: if matplotlib is not installed.
    """
    file = io.BytesIO()
    with _drawn(drawing) as figure:
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    content = file.getvalue()
    return content[content.index(b"<svg") :]


@contextmanager
def _drawn(drawing: Drawing) -> Iterator[Any]:
    plt = pyplot()
    with plt.rc_context({**_STYLE, "font.family": _families()}), warnings.catch_warnings():
        # A name in a script of no installed font is shown as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure = drawing.draw(plt)
        try:
            yield figure
        finally:
            plt.close(figure)


def _families() -> list[str]:
    """Return the fonts of the text: matplotlib's own, then installed ones for other scripts."""
    installed = set(require("matplotlib.font_manager").fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in _WIDE_FONTS if name in installed)]


def panel(plt: Any, height: float, title: str = "", **settings: Any) -> tuple[Any, Any]:
    """Return a figure of one panel with a light grid, and its axes.

    ``height`` is in inches; ``settings`` are those of matplotlib's ``Axes.set``.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    axis.set(**settings)
    axis.grid(alpha=0.3)
    set_title(axis, title)
    return figure, axis


def set_title(axis: Any, name: str) -> None:
    """Set a title that may have a file's name in it: its dollars are not formulas."""
    axis.set_title(printable(name), parse_math=False)


def plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis, ``axes.xaxis`` for example, by plain numbers: 20 and 100, not powers.

    If it spans less than two decades, the 2 and the 5 of each have a label as well.
    """
    ticker = require("matplotlib.ticker")
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(ticker.LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
