"""Label smoothing without logits, at a cost of O((N + C)·D).

The uniform part of the loss needs only the sum of a row's cosines with all classes,
``Σ_j cos_ij = ⟨x̂_i, Σ_j ŵ_j⟩``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.dtypes import compute_dtype
from ..base.normalize import stored_gradient, unit_gradient, unit_rows, without_autocast
from ..base.once_differentiable import once_differentiable
from .shard import Shard

# Class centers worked on at once: 2 MiB at D = 512 in fp32, which stays in a core's cache (16 MiB took ten times as
# long); on a GPU, where each chunk is some launches, 64 times as many.
_CPU_CHUNK, _GPU_CHUNK = 1024, 65536


def _chunks(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(_CPU_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK)


class Smoothing(NamedTuple):
    """The numbers that only a loss with label smoothing needs."""

    amount: float
    """``ε``: the loss is ``1 - ε`` of the usual one and ``ε`` of its mean over all classes taken for the target."""
    num_classes: int
    """C_total."""
    cosine_sum: Tensor
    """(N,) ``Σ_j cos_ij`` over all classes, the target's without a margin among them."""

    def loss(self, loss: Tensor, target_cosine: Tensor, target_logit: Tensor, scale: float | Tensor) -> Tensor:
        """Return smoothed row losses (N,) from the usual ones.

        With z the target's logit and ``lse = loss + z`` they are ``(1 - ε)·(lse - z) + ε/C·Σ_j (lse - z_j)``.
        """
        negatives = scale * (self.cosine_sum - target_cosine)
        return loss + self.amount * (target_logit - (target_logit + negatives) / self.num_classes)


class _CenterSum(torch.autograd.Function):
    """``Σ_j ŵ_j`` (D,) over the classes of all shards; the loss's gradient by it is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, shard: Shard) -> Tensor:
        ctx.save_for_backward(weight)
        total = weight.new_zeros(weight.shape[1], dtype=torch.float64)
        for part in _chunks(weight):
            total += unit_rows(part.to(dtype)).sum(0)
        return shard.ranks.sum(total).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], d_total: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = saved
        d_weight = torch.empty_like(weight)
        for into, part in zip(_chunks(d_weight), _chunks(weight), strict=True):
            into.copy_(stored_gradient(unit_gradient(d_total, part.to(d_total.dtype)), part))
        return d_weight, None, None


class _TwoUses(torch.autograd.Function):
    """See :func:`two_uses`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return rows.view_as(rows), rows.float()

    @staticmethod
    def backward(ctx: Any, usual: Tensor, smoothed: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return stored_gradient(usual.float() + smoothed, rows)


def two_uses(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (R, D) for the usual loss and for its smoothing.

    Their gradients are added, and fp16 has no range for that: two that saturate would make an infinity, and two
    infinities a NaN.
    """
    result: tuple[Tensor, Tensor] = _TwoUses.apply(rows) if rows.dtype == torch.float16 else (rows, rows)
    return result


def smoothing(embeddings: Tensor, weight: Tensor, amount: float, num_classes: int, shard: Shard) -> Smoothing | None:
    """Return the smoothing of embeddings (n, D), this rank's rows, and weight (C, D), its classes; None without any."""
    if amount == 0:
        return None
    dtype = compute_dtype(embeddings, weight)
    with without_autocast(embeddings.device):
        unit = shard.joint(unit_rows(embeddings.to(dtype)), lambda rows: unit_rows(rows.to(dtype)))
        total: Tensor = _CenterSum.apply(weight, dtype, shard)
        return Smoothing(amount, num_classes, unit @ total)
