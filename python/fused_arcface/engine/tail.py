"""The O(N) end of the head: from each row's negative log-sum-exp and target cosine to the reduced loss.

Plain PyTorch, so autograd carries any margin through it; every backend, and one shard or many, end here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..base.checks import check_margin_output, check_margin_rows
from ..base.once_differentiable import once_differentiable
from ..base.statistics import MarginSoftmaxStats
from ..margins.angular import parameters
from ..margins.protocol import Margin
from .direct import stages
from .ops import for_numbers
from .smoothing import Smoothing
from .targets import Rows, counted_rows
from .terms import IGNORED


class _FusedMarginLoss(torch.autograd.Function):
    """Compute the reduced loss, differentiable, and the rows' losses and full log-sum-exps by a backend's margin_loss.

    One node in the graph stands for all of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        negative_lse: Tensor,
        target_cosine: Tensor,
        ignored: Tensor | None,
        sample_weight: Tensor | None,
        reduction: str,
        scale: float,
        m1: float,
        m2: float,
        m3: float,
        boundary: str,
        gradient: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        stage = stages(negative_lse, target_cosine)
        margin_loss, numbers = for_numbers(stage.margin_loss, scale, m1, m2, m3)
        loss, lse, d_lse, d_cosine = margin_loss(negative_lse, target_cosine, *numbers, boundary, gradient, backend)
        if ignored is not None:
            loss = loss.masked_fill_(ignored, 0)
        counted = None if ignored is None else ~ignored
        reduced, divisor = reduce_loss(loss, counted, reduction, sample_weight)
        if reduced is loss:
            reduced = loss.clone()
        ctx.number_of_rows = divisor if isinstance(divisor, int) else None
        of_rows = None if isinstance(divisor, int) else divisor
        ctx.save_for_backward(d_lse, d_cosine, ignored, sample_weight, of_rows)
        ctx.mark_non_differentiable(loss, lse)
        ctx.set_materialize_grads(False)
        return reduced, loss, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Any, ...], d_reduced: Tensor | None, _loss: None, _lse: None
    ) -> tuple[Tensor | None, ...]:
        if d_reduced is None:
            return (None,) * 12
        d_lse, d_cosine, ignored, sample_weight, divisor = saved
        divisor = ctx.number_of_rows if divisor is None else divisor
        d_loss = d_reduced if divisor is None else d_reduced / divisor
        if ignored is not None:
            d_loss = d_loss.expand_as(d_lse).masked_fill(ignored, 0)
        if sample_weight is not None:
            d_loss = d_loss * sample_weight
        return d_loss * d_lse, d_loss * d_cosine, *(None for _ in range(10))


def reduce_loss(
    loss: Tensor, counted: Tensor | None, reduction: str, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor | int | None]:
    """Reduce row losses ``(N,)``, 0 where ignored, as ``cross_entropy(weight=...)`` does.

    Args:
        loss: (N,).
        counted: (N,) true for rows that are not ignored, or the part of the row that is not; None: all rows count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        sample_weight: (N,) or None.

    Returns:
        The reduced loss, and for a mean the number that it is divided by: the number of rows that count, or the sum of
        their weights.
    """
    factors = counted
    if sample_weight is not None:
        loss = loss * sample_weight
        factors = sample_weight if counted is None else sample_weight * counted
    if reduction == "none":
        return loss, None
    if reduction == "sum":
        return loss.sum(), None
    if factors is None:
        return loss.mean(), len(loss)
    divisor = factors.sum()
    return loss.sum() / divisor, divisor


def row_losses(
    negative_lse: Tensor, target_cosine: Tensor, margin: Margin, scale: float | Tensor, smoothed: Smoothing | None
) -> tuple[Tensor, Tensor]:
    """Return the rows' losses (N,), differentiable, and their full log-sum-exps (N,), for any margin.

    A margin with binary losses computes them from its negatives' sum; there the log-sum-exp is that sum's logarithm.
    """
    own = getattr(margin, "row_losses", None)
    if own is not None:
        loss = own(target_cosine.clone(), negative_lse.exp(), scale)
        check_margin_rows("loss", loss, target_cosine)
        return loss, negative_lse.detach()
    modified = margin(target_cosine.clone())  # a copy: a user's margin may work in place
    check_margin_output(modified, target_cosine)
    target_logit = (scale.to(modified.dtype) if isinstance(scale, Tensor) else scale) * modified
    # softplus, not log(exp + exp) - z, which cancels for well-classified rows; past 40 it is linear to fp64's last bit.
    loss = F.softplus(negative_lse - target_logit, threshold=40)
    if smoothed is not None:
        loss = smoothed.loss(loss, target_cosine, target_logit, scale)
    return loss, torch.logaddexp(negative_lse.detach(), target_logit.detach())


def loss_of_rows(
    negative_lse: Tensor,
    target_cosine: Tensor,
    negative_max: Tensor,
    ignored: Tensor | None,
    margin: Margin,
    scale: float | Tensor,
    reduction: str,
    backend: str = "torch",
    penalty: Tensor | None = None,
    smoothed: Smoothing | None = None,
    sample_weight: Tensor | None = None,
    with_stats: bool = True,
) -> tuple[Tensor, MarginSoftmaxStats | None]:
    """Return the reduced loss, differentiable, and the rows' statistics.

    Args:
        negative_lse: (N,) log-sum-exp of the row's negative logits over all shards.
        target_cosine: (N,).
        negative_max: (N,) greatest cosine among the row's negatives.
        ignored: (N,) bool, or None if all rows count.
        margin: The map of target cosines to modified cosines.
        scale: The factor of the logits.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: The backend of the other stages. With the feature ``fused_margin`` it computes the losses of angular
            margins as well.
        penalty: (N,) added to the rows' losses.
        smoothed: label smoothing.
        sample_weight: (N,) factors of the rows' losses, or None. The statistics' losses are without them.
        with_stats: If false, return None for the statistics.
    """
    feature = "fused_margin_fp64" if negative_lse.dtype == torch.float64 else "fused_margin"
    plain = isinstance(scale, Tensor) or smoothed is not None or penalty is not None
    fuses = backends.has(backend, feature) and not plain
    numbers = parameters(margin) if fuses else None
    if numbers is not None:
        reduced, loss, lse = _FusedMarginLoss.apply(
            negative_lse, target_cosine, ignored, sample_weight, reduction, scale, *numbers, backend
        )
    else:
        loss, lse = row_losses(negative_lse, target_cosine, margin, scale, smoothed)
        if penalty is not None:
            loss = loss + penalty
        counted = None
        if ignored is not None:
            loss, counted = loss.masked_fill(ignored, 0), ~ignored
        reduced, _ = reduce_loss(loss, counted, reduction, sample_weight)
    if not with_stats:
        return reduced, None
    cosine = target_cosine.detach()
    correct = cosine > negative_max
    if ignored is not None:
        correct = correct > ignored  # for booleans: correct and not ignored
    return reduced, MarginSoftmaxStats(loss.detach(), lse, cosine, correct)


def loss_of_mixed_rows(
    of_labels: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    margins: tuple[Margin, Margin],
    rows: Rows,
    correct: Tensor,
    scale: float | Tensor,
    reduction: str,
    penalty: Tensor | None = None,
    smoothed: Smoothing | None = None,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, MarginSoftmaxStats]:
    """Return the reduced loss of rows with two labels, differentiable, and the statistics of the rows' first labels.

    A row is two rows with weights: its share for the first label, the rest for the second one. A part whose label is
    ignored has no loss, and does not count in a mean.

    ``of_labels`` has negative_lse (N,) and target_cosine (N,) of the first label, and of the second; ``margins`` has a
    margin for each. ``correct`` (N,) is the statistic of the first label. :func:`loss_of_rows` describes the others.
    """
    assert rows.second is not None and rows.share is not None
    share = rows.share.to(of_labels[0][0].dtype)
    parts = (
        share.masked_fill(rows.target.label == IGNORED, 0),
        (1 - share).masked_fill(rows.second.label == IGNORED, 0),
    )
    (first, lse), (second, _) = (
        row_losses(*each, margin, scale, smoothed) for each, margin in zip(of_labels, margins, strict=True)
    )
    loss = parts[0] * first + parts[1] * second
    if penalty is not None:
        loss = loss + penalty
    loss = loss.masked_fill(~counted_rows(rows), 0)
    reduced, _ = reduce_loss(loss, parts[0] + parts[1], reduction, sample_weight)
    return reduced, MarginSoftmaxStats(loss.detach(), lse, of_labels[0][1].detach(), correct)
