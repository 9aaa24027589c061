"""Heads whose margin and scale can be replaced by a value of another kind."""

from __future__ import annotations

from typing import Any


class ReplaceableOptions:
    """A mixin for modules with a ``margin`` and a ``scale``.

    torch's modules refuse to replace a parameter or a module by a plain value: a margin with parameters by
    ``ArcFace(0.5)``, a learned scale by ``64.0``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a parameter or module of that name is no longer one."""
        if name in ("margin", "scale"):
            for members in ("_parameters", "_modules"):
                self.__dict__.get(members, {}).pop(name, None)
        super().__setattr__(name, value)
