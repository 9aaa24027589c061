"""Optional libraries, imported where they are used. The error for a missing one names the extra that brings it."""

from __future__ import annotations

import importlib
from typing import Any

# Modules whose distribution has another name.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
}


class MissingExtra(ImportError):
    """A library of an optional extra is not installed; the message says how to install it."""


def require(module: str, extra: str = "demo") -> Any:
    """Import a module of an optional library.

    Args:
        module: dotted name, for example ``"sklearn.metrics"``.
        extra: the extra of this package that brings it.

    Raises:
        MissingExtra: if it is not installed.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != library:
            raise  # the library is installed but broken: its own error says more
        name = _DISTRIBUTIONS.get(library, library.replace("_", "-"))
        raise MissingExtra(f'{name} is not installed; it comes with: pip install "fused_arcface[{extra}]"') from None


def pyplot() -> Any:
    """Return matplotlib's pyplot, set to draw to files: no display is needed."""
    require("matplotlib").use("Agg")
    return require("matplotlib.pyplot")
