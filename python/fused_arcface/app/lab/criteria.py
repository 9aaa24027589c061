"""Every loss that is compared, by its name in tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from fused_arcface.head import MarginHead
from fused_arcface.margins.angular import ArcFace, CosFace, NormSoftmax, SphereFace
from fused_arcface.margins.per_row import AdaFace
from fused_arcface.margins.protocol import Margin

from ..data import LabeledImages
from .batches import identity_batches, shuffled_batches, two_view_batches
from .heads import CenterLossHead, SoftmaxHead, contrastive, triplet_batch_hard, triplet_semi_hard

SOFTMAX, ARCFACE = "softmax", "ArcFace"

MARGIN = ArcFace(0.5)
"""The ArcFace paper's margin."""

SCALE = 16.0
"""Scale of the margin heads. The papers' 64 suits 10⁵ identities; with some hundred a softmax is sharp enough at 16,
and learns faster."""

Batches = Callable[[LabeledImages, int, int, int], Iterator[LabeledImages]]
"""Yields batches, given images, batch size, steps and seed."""


@dataclass(frozen=True)
class Criterion:
    """A way to train an embedding net."""

    name: str
    source: str
    """Year or origin."""
    make_head: Callable[[int, int], nn.Module]
    """Makes a module ``head(embeddings, target) -> loss``, given D and C."""
    batches: Batches = shuffled_batches
    color: str = "#555555"
    line: str = "-"


def criteria() -> dict[str, Criterion]:
    """Return every criterion by name, in the order of the field's history.

    The margins are the papers'; the scale is :data:`SCALE`. The margins of contrastive and triplet loss are in squared
    distances of unit embeddings, from 0 to 4; FaceNet's is 0.2.

    >>> criteria()["ArcFace"].make_head(8, 100)
    MarginHead(8, 100, margin=ArcFace(margin=0.5, boundary='hard', gradient='exact'), scale=16.0, backend='auto')
    """
    pairs, semi_hard, batch_hard = (
        lambda dim, classes: contrastive(1.0),
        lambda dim, classes: triplet_semi_hard(0.2),
        lambda dim, classes: triplet_batch_hard(0.2),
    )
    two_views = "self-supervised: two views of an image are the similar pair"
    found = [
        Criterion(SOFTMAX, "the baseline", SoftmaxHead, color="#D55E00"),
        Criterion("contrastive", "2005", pairs, identity_batches, "#999999", "--"),
        Criterion("contrastive, two views", two_views, pairs, two_view_batches, "#999999", ":"),
        Criterion("triplet, semi-hard", "FaceNet, 2015", semi_hard, identity_batches, "#CC79A7"),
        Criterion("triplet, batch-hard", "2017", batch_hard, identity_batches, "#CC79A7", "--"),
        Criterion("center loss", "2016", lambda dim, classes: CenterLossHead(dim, classes, pull=0.01), color="#E69F00"),
        _margin("NormSoftmax", "2017", NormSoftmax, "#000000"),
        _margin("SphereFace", "2017", lambda: SphereFace(1.7), "#56B4E9"),
        _margin("CosFace", "2018", lambda: CosFace(0.35), "#009E73"),
        _margin(ARCFACE, "2019", lambda: MARGIN, "#0072B2"),
        # The paper's rate of 0.01 is for long trainings. In a short one the norms' mean would be known only at its end.
        _margin("AdaFace", "2022", lambda: AdaFace(0.4, rate=0.1), "#8C6D00"),
    ]
    return {criterion.name: criterion for criterion in found}


MARGINS = ("SphereFace", "CosFace", ARCFACE, "AdaFace")
"""The criteria with a margin; they are expected above softmax on people never seen in training."""


def _margin(name: str, source: str, make_margin: Callable[[], Margin], color: str) -> Criterion:
    def make_head(dim: int, classes: int) -> nn.Module:
        return MarginHead(dim, classes, margin=make_margin(), scale=SCALE)

    return Criterion(name, source, make_head, color=color)
