"""Heads to train beside :class:`fused_arcface.MarginHead` and called like it: plain softmax, and the oracle."""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from fused_arcface import reference
from fused_arcface.base.statistics import MarginSoftmaxStats
from fused_arcface.engine.margin_step import in_step
from fused_arcface.engine.targets import Labels
from fused_arcface.head import MarginHead


class SoftmaxHead(nn.Module):
    """The plain softmax classifier: a linear layer with a bias and cross-entropy, nothing normalized.

    Args:
        embedding_dim: D, the length of an embedding.
        num_classes: C, the number of classes.

    >>> import torch
    >>> SoftmaxHead(8, 5)(torch.randn(4, 8), torch.tensor([0, 1, 2, 4])).shape
    torch.Size([])
    """

    def __init__(self, embedding_dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_dim, num_classes)

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of embeddings (N, D) with labels (N,)."""
        return F.cross_entropy(self.linear(embeddings), target)


class ReferenceHead(MarginHead):
    """:class:`fused_arcface.MarginHead` computed by :mod:`fused_arcface.reference`, logits materialized.

    >>> import torch
    >>> ReferenceHead(8, 5)(torch.randn(4, 8), torch.tensor([0, 1, 2, 4])).shape
    torch.Size([])
    """

    def forward(
        self,
        embeddings: Tensor,
        target: Labels,
        *,
        ignore_index: int = -100,
        return_stats: bool = False,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
        """Compute what the fused head computes; ``backend`` is ignored."""
        options = dataclasses.replace(self.options, margin=in_step(self.margin, embeddings, alone=False))
        return reference.loss_with(
            options, embeddings, self.weight, target, reduction, ignore_index, return_stats, sample_weight
        )
