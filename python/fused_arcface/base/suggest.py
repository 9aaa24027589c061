"""Suggestions for names and paths that do not exist."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


def did_you_mean(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """Return "; did you mean X?" for the known name that is most like ``name``, or an empty text if none is.

    ``likeness`` is the least ratio of :mod:`difflib`, from 0 to 1.

    >>> did_you_mean("iresent50", ["iresnet18", "iresnet50", "small"])
    '; did you mean iresnet50?'
    >>> did_you_mean("abacus", ["small"])
    ''
    """
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower, 1, likeness)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


def missing_path(path: str | os.PathLike[str]) -> str:
    """Return the message for a path that does not exist, with a similar path if there is one beside it.

    A path that does exist is of a kind that holds no data: a named pipe, say.

    >>> missing_path("/nowhere/at/all")
    '/nowhere/at/all does not exist: there is no folder /nowhere'
    """
    wanted = Path(path)
    if os.path.exists(wanted):
        return f"{path} must be a regular file or a folder; it is something else"
    for parent in reversed(wanted.parents):
        if not parent.exists():
            return f"{path} does not exist: there is no folder {parent}"
    try:
        beside = [each.name for each in wanted.parent.iterdir()]
    except OSError:
        beside = []
    # Two short names with the same suffix are alike to 0.6.
    return f"{path} does not exist{did_you_mean(wanted.name, beside, 0.65)}"
