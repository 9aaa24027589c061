"""The terminal that every command prints to. It shows control characters in a file's name and does not act on them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from fused_arcface.base.text import printable

_MOST = 20
"""Number of problems in the data that a command prints one by one."""


class _Terminal(Console):
    def __init__(self, optional: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._is_optional = optional

    def on_broken_pipe(self) -> None:
        """Print nothing from now on, as after ``| head``. The command goes on: it may write files as well."""
        self._silence()

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does. An optional console is silent after an error, such as that of a full disk."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            if not self._is_optional:
                raise
            self._silence()
            if not self.stderr:
                reason = f"The output cannot be written any more: {error.strerror}. The command goes on."
                terminal(stderr=True, soft_wrap=True, optional=True).print(reason, style="yellow", markup=False)

    def _silence(self) -> None:
        self.quiet = True
        # What the stream still holds would fail again at the end of the process.
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does. Rich's own control codes are kept."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def terminal(**options: Any) -> Console:
    """Make a console that prints control characters in a text as escapes.

    Args:
        options: those of rich, and ``optional=True`` for output without which the command goes on.
    """
    return _Terminal(**options)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a text as it is: without markup, colored numbers or added line breaks."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class Problems:
    """Prints the first problems one by one, and in the end the number of the others.

    Args:
        console: the console to write to.
        ending: words that follow each problem.
        kind: the noun for the others.
    """

    def __init__(self, console: Console, ending: str, kind: str = "problems") -> None:
        self._console, self._ending, self._kind = console, ending, kind
        self._told = 0

    def __call__(self, problem: str) -> None:
        """Print a problem, if it is one of the first."""
        self._told += 1
        if self._told <= _MOST:
            say(self._console, f"{problem}{self._ending}", "yellow")

    def end(self) -> None:
        """Print the number of the other problems."""
        if self._told > _MOST:
            say(self._console, f"and {self._told - _MOST} more such {self._kind}{self._ending}", "yellow")
