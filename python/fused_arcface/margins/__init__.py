"""The margin family. Users name its members as ``fused_arcface.ArcFace`` and so on."""

from .angular import (
    SIN_FLOOR,
    ArcFace,
    Boundary,
    CombinedMargin,
    CosFace,
    GradientMode,
    Margin,
    Modulation,
    NormSoftmax,
    RowMargin,
    SphereFace,
    parameters,
)

__all__ = [
    "SIN_FLOOR",
    "ArcFace",
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
