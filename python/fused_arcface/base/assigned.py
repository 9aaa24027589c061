"""Heads whose margin and scale may be assigned anew, whatever kind of value they had before."""

from __future__ import annotations

from typing import Any


class ReplaceableOptions:
    """A mixin for modules with a ``margin`` and a ``scale``.

    torch's modules refuse a plain value in the place of a parameter or a module: ``head.margin = ArcFace(0.5)`` after a
    margin with parameters, ``head.scale = 64.0`` after a learned scale.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a parameter or module of that name is no longer one."""
        if name in ("margin", "scale"):
            for members in ("_parameters", "_modules"):
                self.__dict__.get(members, {}).pop(name, None)
        super().__setattr__(name, value)
