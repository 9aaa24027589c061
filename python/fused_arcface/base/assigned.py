"""The options of a head as attributes, which may be assigned anew."""

from __future__ import annotations

from typing import Any

from .options import HeadOptions


class ReplaceableOptions:
    """A mixin for heads: the options of the loss, each an attribute.

    torch's modules refuse to replace a parameter or a module by a plain value: a margin with parameters by
    ``ArcFace(0.5)``, a learned scale by ``64.0``.
    """

    margin: Any
    scale: Any
    sub_centers: int
    label_smoothing: float

    @property
    def options(self) -> HeadOptions:
        """The options of the loss, as they are now."""
        return HeadOptions(self.margin, self.scale, self.sub_centers, self.label_smoothing)

    @options.setter
    def options(self, options: HeadOptions) -> None:
        self.margin, self.scale = options.margin, options.scale
        self.sub_centers, self.label_smoothing = options.sub_centers, options.label_smoothing

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a parameter or module of that name is no longer one."""
        if name in ("margin", "scale"):
            for members in ("_parameters", "_modules"):
                self.__dict__.get(members, {}).pop(name, None)
        super().__setattr__(name, value)
