"""Heads to train beside :class:`fused_arcface.MarginHead`, called alike: the field's baseline, and the oracle as a
head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..head import MarginHead
from ..loss import MarginSoftmaxStats
from ..margin_state import in_step


class SoftmaxHead(nn.Module):
    """The plain softmax classifier: a linear layer with a bias and cross-entropy, nothing normalised.

    Args:
        embedding_dim: D.
        num_classes: C.

    >>> import torch
    >>> SoftmaxHead(8, 5)(torch.randn(4, 8), torch.tensor([0, 1, 2, 4])).shape
    torch.Size([])
    """

    def __init__(self, embedding_dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_dim, num_classes)

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """Mean loss of embeddings (N, D) with labels (N,)."""
        return F.cross_entropy(self.linear(embeddings), target)


class ReferenceHead(MarginHead):
    """:class:`fused_arcface.MarginHead` computed by :mod:`fused_arcface.reference`, logits materialised.

    >>> import torch
    >>> ReferenceHead(8, 5)(torch.randn(4, 8), torch.tensor([0, 1, 2, 4])).shape
    torch.Size([])
    """

    def forward(
        self, embeddings: Tensor, target: Tensor, *, ignore_index: int = -100, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
        """As the fused head's; ``backend`` plays no part."""
        return reference.margin_softmax_loss(
            embeddings,
            self.weight,
            target,
            margin=in_step(self.margin, embeddings, alone=False),
            scale=self.scale,
            ignore_index=ignore_index,
            return_stats=return_stats,
            sub_centers=self.sub_centers,
            label_smoothing=self.label_smoothing,
        )
