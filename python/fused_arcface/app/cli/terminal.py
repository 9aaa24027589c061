"""The terminal that every command prints to. Names from files are shown, never obeyed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from fused_arcface.base.text import printable

MOST_PROBLEMS = 20
"""Number of problems in the data that a command tells one by one."""


class _Terminal(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does; what rich itself sends to the terminal is kept."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def terminal(**options: Any) -> Console:
    """Make a console that prints whatever text it is given without obeying it; ``options`` are those of rich."""
    return _Terminal(**options)
