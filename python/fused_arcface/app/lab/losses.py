"""Losses that are compared with the margins, each a module ``head(embeddings, target) -> loss``.

Center loss is this package's; those of pairs and triplets are pytorch-metric-learning's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_arcface.base.extras import require

from .heads import SoftmaxHead


class CenterLossHead(SoftmaxHead):
    """Softmax cross-entropy and ``λ/2·‖f - c_y‖²``, both the mean over the batch (Wen et al., 2016, eq. 5).

    The optimizer learns the centers c, one for each class, as other parameters; in the paper they have their own rate.

    Args:
        embedding_dim: D, the length of an embedding.
        num_classes: C, the number of classes.
        pull: λ.

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


def contrastive(margin: float) -> nn.Module:
    """Return contrastive loss, ``Y·D² + max(0, m - D²)·(1 - Y)`` over all pairs of the batch.

    D is the distance of normalized embeddings, and Y is 1 for a pair of one identity (Chopra, Hadsell and LeCun,
    2005). Each kind of pairs contributes the mean of its terms that are not 0.

    Raises:
        MissingExtra: if pytorch-metric-learning is not installed.
    """
    losses = require("pytorch_metric_learning.losses", "compare")
    return losses.ContrastiveLoss(pos_margin=0, neg_margin=margin, distance=_squared_distance())


class _MinedTriplets(nn.Module):
    """``max(0, D²(a, p) - D²(a, n) + m)`` over the triplets that a miner chooses."""

    def __init__(self, margin: float, miner: nn.Module) -> None:
        super().__init__()
        losses = require("pytorch_metric_learning.losses", "compare")
        self.loss, self.miner = losses.TripletMarginLoss(margin, distance=_squared_distance()), miner

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        return self.loss(embeddings, target, self.miner(embeddings.detach(), target))


def triplet_semi_hard(margin: float) -> nn.Module:
    """Return FaceNet's loss (Schroff et al., 2015): negatives farther than the positive, by less than the margin.

    Raises:
        MissingExtra: if pytorch-metric-learning is not installed.
    """
    miners = require("pytorch_metric_learning.miners", "compare")
    return _MinedTriplets(margin, miners.TripletMarginMiner(margin, "semihard", distance=_squared_distance()))


def triplet_batch_hard(margin: float) -> nn.Module:
    """Return the loss of each image's farthest positive and nearest negative in the batch (Hermans et al., 2017).

    Raises:
        MissingExtra: if pytorch-metric-learning is not installed.
    """
    miners = require("pytorch_metric_learning.miners", "compare")
    return _MinedTriplets(margin, miners.BatchHardMiner(distance=_squared_distance()))


def _squared_distance() -> object:
    return require("pytorch_metric_learning.distances", "compare").LpDistance(p=2, power=2, normalize_embeddings=True)
