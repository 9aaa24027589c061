"""The margins. Users name them as ``fused_arcface.ArcFace`` and so on; :mod:`.registry` lists them.

The names here are for margins of users' own: the protocol that the heads know, and the parts of the angular margins.
"""

from .angular import (
    SIN_FLOOR,
    ArcFace,
    Boundary,
    CombinedMargin,
    CosFace,
    GradientMode,
    NormSoftmax,
    SphereFace,
    parameters,
)
from .by_label import LabelMargin
from .protocol import BinaryLosses, Margin, Modulation, RowMargin
from .schedule import Rise, at_strength

__all__ = [
    "SIN_FLOOR",
    "ArcFace",
    "BinaryLosses",
    "Boundary",
    "CombinedMargin",
    "CosFace",
    "GradientMode",
    "LabelMargin",
    "Margin",
    "Modulation",
    "NormSoftmax",
    "Rise",
    "RowMargin",
    "SphereFace",
    "at_strength",
    "parameters",
]
