"""The fused margin-softmax head for face recognition and metric learning: ArcFace and its family without N×C logits."""

from typing import TYPE_CHECKING

from . import backends, checkpoint, compat, reference
from .center_sgd import CenterSGD, CenterUpdateError
from .engine.tail import MarginSoftmaxStats
from .functional import margin_softmax_loss
from .head import MarginHead
from .margins.angular import ArcFace, CombinedMargin, CosFace, NormSoftmax, SphereFace
from .margins.hard_negatives import CurricularFace, InterclassFilter, MVSoftmax
from .margins.per_row import AdaFace, ElasticFace, MagFace
from .partial_fc import PartialFC

if TYPE_CHECKING:
    from .app.embedder import load_embedder

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
    "load_embedder",
    "margin_softmax_loss",
    "reference",
]


def __getattr__(name: str) -> object:
    """Import what belongs to the applications when it is first asked for: the library does without them."""
    if name == "load_embedder":
        from .app.embedder import load_embedder

        return load_embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
