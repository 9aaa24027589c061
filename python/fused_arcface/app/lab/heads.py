"""Heads that are compared with :class:`fused_arcface.MarginHead` and called like it, with embeddings and target.

Softmax, center loss and the oracle are this package's; losses of pairs and triplets are pytorch-metric-learning's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_arcface import reference
from fused_arcface.base.extras import require
from fused_arcface.base.statistics import MarginSoftmaxStats
from fused_arcface.engine.margin_step import in_step
from fused_arcface.engine.targets import Labels
from fused_arcface.head import MarginHead


class SoftmaxHead(nn.Module):
    """The plain softmax classifier: a linear layer (C, D) with a bias and cross-entropy, nothing normalized."""

    def __init__(self, embedding_dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_dim, num_classes)

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of embeddings (N, D) with labels (N,)."""
        return F.cross_entropy(self.linear(embeddings), target)


class CenterLossHead(SoftmaxHead):
    """Softmax cross-entropy and ``λ/2·‖f - c_y‖²``, both the mean over the batch (Wen et al., 2016, eq. 5).

    ``pull`` is λ. The optimizer learns the centers c, one for each class, as other parameters; in the paper they have
    their own rate.

    >>> head = CenterLossHead(2, 3, pull=0.5)
    >>> head.pull_to_centers(torch.tensor([[3.0, 4.0]]), torch.tensor([0])).item()  # the centers begin at 0
    6.25
    """

    def __init__(self, embedding_dim: int, num_classes: int, pull: float) -> None:
        super().__init__(embedding_dim, num_classes)
        self.pull = pull
        self.centers = nn.Parameter(torch.zeros(num_classes, embedding_dim))

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of embeddings (N, D) with labels (N,)."""
        return super().forward(embeddings, target) + self.pull_to_centers(embeddings, target)

    def pull_to_centers(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """Return the second term alone."""
        return self.pull / 2 * (embeddings - self.centers[target]).square().sum(1).mean()


class ReferenceHead(MarginHead):
    """:class:`fused_arcface.MarginHead` computed by :mod:`fused_arcface.reference`, logits materialized."""

    def forward(self, embeddings: Tensor, target: Labels, **how: Any) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
        """Compute what the fused head computes, with the same arguments; ``backend`` is ignored."""
        options = dataclasses.replace(self.options, margin=in_step(self.margin, embeddings, alone=False))
        return reference.loss_with(options, embeddings, self.weight, target, **how)


def contrastive(margin: float) -> nn.Module:
    """Return contrastive loss, ``Y·D² + max(0, m - D²)·(1 - Y)`` over all pairs of the batch.

    D is the distance of normalized embeddings, and Y is 1 for a pair of one identity (Chopra, Hadsell and LeCun,
    2005). Each kind of pairs contributes the mean of its terms that are not 0.

    Raises:
        MissingExtra: if pytorch-metric-learning is not installed. The losses of triplets raise it too.
    """
    return _library("losses").ContrastiveLoss(pos_margin=0, neg_margin=margin, distance=_squared_distance())


def triplet_semi_hard(margin: float) -> nn.Module:
    """Return FaceNet's loss (Schroff et al., 2015) of negatives farther than the positive by less than the margin."""
    miner = _library("miners").TripletMarginMiner(margin, "semihard", distance=_squared_distance())
    return _MinedTriplets(margin, miner)


def triplet_batch_hard(margin: float) -> nn.Module:
    """Return the loss of each image's farthest positive and nearest negative in the batch (Hermans et al., 2017)."""
    return _MinedTriplets(margin, _library("miners").BatchHardMiner(distance=_squared_distance()))


class _MinedTriplets(nn.Module):
    """``max(0, D²(a, p) - D²(a, n) + m)`` over the triplets that a miner chooses."""

    def __init__(self, margin: float, miner: nn.Module) -> None:
        super().__init__()
        self.loss = _library("losses").TripletMarginLoss(margin, distance=_squared_distance())
        self.miner = miner

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        return self.loss(embeddings, target, self.miner(embeddings.detach(), target))


def _squared_distance() -> object:
    return _library("distances").LpDistance(p=2, power=2, normalize_embeddings=True)


def _library(part: str) -> Any:
    return require(f"pytorch_metric_learning.{part}", "compare")
