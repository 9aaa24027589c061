"""Drop-in replacements with other projects' names, signatures and conventions.

``compat.pytorch_metric_learning`` needs the package of that name, so it is not imported here: write
``from fused_arcface.compat.pytorch_metric_learning import ArcFaceLoss``.
"""

from . import insightface

__all__ = ["insightface"]
