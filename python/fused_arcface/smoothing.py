"""Label smoothing without logits: the uniform part of the loss needs only the sum of a row's cosines with all classes,
``Σ_j cos_ij = ⟨x̂_i, Σ_j ŵ_j⟩``, so it costs O((N + C)·D)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autograd import Shard
from .normalise import unit_gradient, unit_rows
from .ops import compute_dtype

# Class centres normalised at once: 16 MiB at D = 512 in fp32.
_CHUNK = 8192


class Smoothing(NamedTuple):
    """What a loss with label smoothing needs to know of its rows beside what every loss does."""

    amount: float
    """``ε``: the loss is ``1 - ε`` of the usual one and ``ε`` of its mean over all classes taken for the target."""
    num_classes: int
    """C_total."""
    cosine_sum: Tensor
    """(N,) ``Σ_j cos_ij`` over all classes, the target's without a margin among them."""

    def loss(self, loss: Tensor, target_cosine: Tensor, target_logit: Tensor, scale: float) -> Tensor:
        """Smoothed row losses (N,) from the usual ones: with z the target's logit and ``lse = loss + z``,
        ``(1 - ε)·(lse - z) + ε/C·Σ_j (lse - z_j)``."""
        negatives = scale * (self.cosine_sum - target_cosine)
        return loss + self.amount * (target_logit - (target_logit + negatives) / self.num_classes)


class _CentreSum(torch.autograd.Function):
    """``Σ_j ŵ_j`` (D,) over the classes of all shards; the loss's gradient by it is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, shard: Shard) -> Tensor:
        ctx.save_for_backward(weight)
        total = weight.new_zeros(weight.shape[1], dtype=torch.float64)
        for part in weight.split(_CHUNK):
            total += unit_rows(part.to(dtype)).sum(0, dtype=torch.float64)
        return shard.ranks.sum(total).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        d_weight = torch.empty_like(weight)
        for into, part in zip(d_weight.split(_CHUNK), weight.split(_CHUNK), strict=True):
            into.copy_(unit_gradient(d_total.expand_as(part), part.to(d_total.dtype)))
        return d_weight, None, None


def smoothing(embeddings: Tensor, weight: Tensor, amount: float, num_classes: int, shard: Shard) -> Smoothing | None:
    """For embeddings (n, D), this rank's rows, and weight (C, D), its classes; None where nothing is smoothed."""
    if amount == 0:
        return None
    dtype = compute_dtype(embeddings, weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = shard.joint(unit_rows(embeddings.to(dtype)), lambda rows: unit_rows(rows.to(dtype)))
        total: Tensor = _CentreSum.apply(weight, dtype, shard)
        return Smoothing(amount, num_classes, unit @ total)
