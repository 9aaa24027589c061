"""The fused margin-softmax head for face recognition and metric learning: ArcFace and its family without N×C logits.

Each name is imported from its module when it is first used, so that importing the package, and ``fused-arcface
--help``, do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names again, for type checkers and editors; a test compares the two lists
    from . import backends as backends
    from . import checkpoint as checkpoint
    from . import compat as compat
    from . import evaluation as evaluation
    from . import margins as margins
    from . import reference as reference
    from . import sub_centers as sub_centers
    from .app.embedder import load_embedder as load_embedder
    from .base.statistics import MarginSoftmaxStats as MarginSoftmaxStats
    from .center_sgd import CenterSGD as CenterSGD
    from .center_update import CenterUpdateError as CenterUpdateError
    from .distillation import distillation_loss as distillation_loss
    from .functional import margin_softmax_loss as margin_softmax_loss
    from .head import MarginHead as MarginHead
    from .margins.angular import ArcFace as ArcFace
    from .margins.angular import CombinedMargin as CombinedMargin
    from .margins.angular import CosFace as CosFace
    from .margins.angular import NormSoftmax as NormSoftmax
    from .margins.angular import SphereFace as SphereFace
    from .margins.binary import SphereFace2 as SphereFace2
    from .margins.binary import UniFace as UniFace
    from .margins.by_label import ClassMargin as ClassMargin
    from .margins.hard_negatives import CurricularFace as CurricularFace
    from .margins.hard_negatives import InterclassFilter as InterclassFilter
    from .margins.hard_negatives import InterTopK as InterTopK
    from .margins.hard_negatives import MVSoftmax as MVSoftmax
    from .margins.per_row import AdaFace as AdaFace
    from .margins.per_row import ElasticFace as ElasticFace
    from .margins.per_row import MagFace as MagFace
    from .margins.scale import AdaCos as AdaCos
    from .partial_fc import PartialFC as PartialFC

__version__ = "0.1.0"

_MODULES = ("backends", "checkpoint", "compat", "evaluation", "margins", "reference", "sub_centers")
"""The public modules of the package."""

_MOVED = {"data": "app.data", "safetensors": "checkpoint.safetensors", "training": "app.training"}
"""Modules that ``from fused_arcface import NAME`` still finds under their earlier names."""

_NAMES = {
    "app.embedder": ("load_embedder",),
    "base.statistics": ("MarginSoftmaxStats",),
    "center_sgd": ("CenterSGD",),
    "center_update": ("CenterUpdateError",),
    "distillation": ("distillation_loss",),
    "functional": ("margin_softmax_loss",),
    "head": ("MarginHead",),
    "margins.angular": ("ArcFace", "CombinedMargin", "CosFace", "NormSoftmax", "SphereFace"),
    "margins.binary": ("SphereFace2", "UniFace"),
    "margins.by_label": ("ClassMargin",),
    "margins.hard_negatives": ("CurricularFace", "InterTopK", "InterclassFilter", "MVSoftmax"),
    "margins.scale": ("AdaCos",),
    "margins.per_row": ("AdaFace", "ElasticFace", "MagFace"),
    "partial_fc": ("PartialFC",),
}
"""The public names of the package, by the module that defines them."""

_SOURCES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted((*_MODULES, *_SOURCES))  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # a checker that saw it would take any name for one of the package

    def __getattr__(name: str) -> Any:
        """Import a public name or module when it is first used (PEP 562)."""
        if name in _MODULES or name in _MOVED:
            return importlib.import_module(f".{_MOVED.get(name, name)}", __name__)
        if name not in _SOURCES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f".{_SOURCES[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    """Return the public names and what is imported already."""
    return sorted({*globals(), *__all__})
