"""The terminal that every command prints to. Names from files are shown, never obeyed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

MOST_PROBLEMS = 20
"""Number of problems in the data that a command tells one by one."""

# Control characters but the line feed, and those that change the direction of text; surrogates stand for bytes of a
# file's name that are no UTF-8.
_UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return ``text`` with the characters that a terminal would obey, or could not encode, as Python writes them.

    >>> print(printable("evil\x1b[2Jname.png"))
    evil\x1b[2Jname.png
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


class _Terminal(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does; what rich itself sends to the terminal is kept."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def terminal(**options: Any) -> Console:
    """Make a console that prints whatever text it is given without obeying it; ``options`` are those of rich."""
    return _Terminal(**options)
