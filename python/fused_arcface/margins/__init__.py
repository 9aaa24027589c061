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
from .protocol import BinaryLosses, Margin, Modulation, RowMargin

__all__ = [
    "SIN_FLOOR",
    "ArcFace",
    "BinaryLosses",
    "Boundary",
    "CombinedMargin",
    "CosFace",
    "GradientMode",
    "Margin",
    "Modulation",
    "NormSoftmax",
    "RowMargin",
    "SphereFace",
    "parameters",
]
