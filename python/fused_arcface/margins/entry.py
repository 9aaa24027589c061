"""A row of the list of margins. Each module of margins has the rows of its own; :mod:`.registry` collects them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .protocol import Margin


@dataclass(frozen=True)
class Entry:
    """One margin."""

    margin: type
    formula: str
    """The logit without the scale."""
    source: str
    """The paper, with its number at arXiv; ``"none"`` for a margin without a paper."""
    examples: Callable[[], list[Any]]
    """Instances that cover the options, for gradcheck and the tests.

    They are made anew in each call, since a margin may have a state. Embeddings have norms from 0.5 to 7.
    """
    default: str = ""
    """The difference between our default and a paper's, or another code's."""

    @property
    def name(self) -> str:
        """The class's name."""
        return self.margin.__name__

    @property
    def kind(self) -> str:
        """``"angular"``, ``"row"``, ``"negatives"`` or ``"binary"``: what the margin depends on or changes."""
        if hasattr(self.margin, "binary"):
            return "binary"
        if hasattr(self.margin, "modulate"):
            return "negatives"
        return "row" if hasattr(self.margin, "for_rows") else "angular"

    def options(self) -> str:
        """Return the constructor's arguments with their defaults, as in a call."""
        signature = inspect.signature(self.margin)
        return ", ".join(f"{each.name}={each.default!r}" for each in signature.parameters.values())


def trained(margin: nn.Module, **buffers: float) -> Margin:
    """Return a margin with a state, set to these values as training would."""
    for name, value in buffers.items():
        margin.get_buffer(name).fill_(value)
    return margin
