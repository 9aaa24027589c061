"""The list of the margins. Everything that lists margins follows from it.

The command line's margin text, gradcheck, the tests, the table in ``docs/margins.md`` and the API reference are made of
it. A new margin is a row in ``ENTRIES`` of its own module. Only margins with a number for each class
(:mod:`.by_label`) are left out: each fits one number of classes, and none can be written as text.
"""

from __future__ import annotations

from typing import Any

from . import angular, binary, hard_negatives, per_row
from .entry import Entry
from .entry import trained as trained  # the tests take it from here

REGISTRY: tuple[Entry, ...] = (*angular.ENTRIES, *per_row.ENTRIES, *hard_negatives.ENTRIES, *binary.ENTRIES)
"""Every margin of this package, angular ones first."""


def examples(kind: str | None = None) -> list[Any]:
    """Return the examples of all margins, or of one :attr:`.Entry.kind`."""
    return [margin for entry in REGISTRY if kind in (None, entry.kind) for margin in entry.examples()]


def as_markdown() -> str:
    """Return the table of the margins in ``docs/margins.md``."""
    lines = ["| Margin | Logit, without the scale | Source | Default |", "|---|---|---|---|"]
    for entry in REGISTRY:
        call = f"`{entry.name}({entry.options()})`"
        lines.append(f"| {call} | {entry.formula} | {entry.source} | {entry.default} |")
    return "\n".join(lines) + "\n"
