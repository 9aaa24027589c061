"""The fused margin-softmax head for face recognition and metric learning: ArcFace and its family without N×C logits."""

from . import backends, checkpoint, compat, reference
from .base.statistics import MarginSoftmaxStats
from .center_sgd import CenterSGD, CenterUpdateError
from .functional import margin_softmax_loss
from .head import MarginHead
from .margins.angular import ArcFace, CombinedMargin, CosFace, NormSoftmax, SphereFace
from .margins.hard_negatives import CurricularFace, InterclassFilter, MVSoftmax
from .margins.per_row import AdaFace, ElasticFace, MagFace
from .partial_fc import PartialFC

__version__ = "0.1.0"
__all__ = [
    "AdaFace",
    "ArcFace",
    "CenterSGD",
    "CenterUpdateError",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "InterclassFilter",
    "MVSoftmax",
    "MagFace",
    "MarginHead",
    "MarginSoftmaxStats",
    "NormSoftmax",
    "PartialFC",
    "SphereFace",
    "backends",
    "checkpoint",
    "compat",
    "margin_softmax_loss",
    "reference",
]
