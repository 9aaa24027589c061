"""The style of both experiments' pictures, and the function that writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fused_arcface.base.extras import pyplot, save_figure

_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}

Found = TypeVar("Found")


def write_pictures(pictures: Mapping[str, Callable[[Any, Found], Any]], found: Found, folder: Path) -> list[Path]:
    """Draw pictures into a folder; return their paths.

    Args:
        pictures: by file name, a function that draws a figure, given pyplot and ``found``.
        found: what an experiment found.
        folder: an existing one.

    Raises:
        MissingExtra: if matplotlib is not installed.
    """
    plt = pyplot()
    paths = []
    for name, draw in pictures.items():
        with plt.rc_context(_STYLE):
            figure = draw(plt, found)
            paths.append(folder / name)
            save_figure(figure, paths[-1], dpi=120)
            plt.close(figure)
    return paths


def over_seeds(count: int) -> str:
    """Return a phrase for a title.

    >>> over_seeds(1), over_seeds(3)
    ('1 seed', '3 seeds')
    """
    return f"{count} seed{'s' if count > 1 else ''}"
