"""The oracle of record: the margin-softmax head in plain PyTorch, straight from the formulas, logits materialized.

Any float dtype, every margin, twice differentiable, ``O(N·C)`` memory. All other code is compared with it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base.checks import check_inputs, check_margin_output, check_row_factors, check_target_range
from .base.dtypes import compute_dtype
from .base.normalize import without_autocast
from .base.options import HeadOptions
from .base.statistics import MarginSoftmaxStats
from .margins.angular import ArcFace, angle
from .margins.protocol import Margin, binary_numbers, for_rows, modulation
from .margins.scale import AdaCos, Scale

__all__ = ["margin_softmax_loss"]


def _unit(rows: Tensor) -> Tensor:
    """Return divisors (R, 1) of rows (R, D) before they are squared: a large row's largest magnitude, else 1."""
    largest = rows.detach().abs().amax(1, keepdim=True)
    return torch.where(largest > 1e15, largest, 1)


def _norms(rows: Tensor) -> Tensor:
    """(R, 1) norms of rows (R, D)."""
    unit = _unit(rows)
    return torch.linalg.vector_norm(rows / unit, dim=1, keepdim=True) * unit


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows (R, D) divided by ``max(norm, 1e-12)``."""
    return F.normalize(rows / _unit(rows), eps=1e-12)


def _negative_losses(cosine: Tensor, numbers: Tensor) -> Tensor:
    """Losses (N, C) of negatives by the formula of :class:`fused_arcface.margins.BinaryLosses`."""
    scale, exponent, turn, offset, bias = numbers.to(cosine.dtype)
    turned = cosine * turn.cos() + angle(cosine).sin() * turn.sin()
    sharpened = 2 * ((turned + 1) / 2).clamp(min=0) ** exponent - 1
    return F.softplus(scale * (sharpened + offset) + bias, threshold=40)


def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor | tuple[Tensor, Tensor, Tensor | float],
    *,
    margin: Margin = ArcFace(),
    scale: Scale = 64.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    return_stats: bool = False,
    sub_centers: int = 1,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
    """Compute :func:`fused_arcface.margin_softmax_loss` from the formulas as they stand.

    Args, result and errors are that function's; this one has no ``backend`` and stores the ``(N, C)`` logits.

    >>> import torch
    >>> x, w = torch.eye(2), torch.eye(2)
    >>> margin_softmax_loss(x, w, torch.tensor([0, 0]), scale=1.0, margin=lambda c: c, reduction="none")
    tensor([0.3133, 1.3133])
    """
    options = HeadOptions(margin, scale, sub_centers, label_smoothing)
    return loss_with(options, embeddings, weight, target, reduction, ignore_index, return_stats, sample_weight)


def loss_with(
    options: HeadOptions,
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor | tuple[Tensor, Tensor, Tensor | float],
    reduction: str = "mean",
    ignore_index: int = -100,
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
    """Return :func:`margin_softmax_loss` with options that are checked already."""
    margin, sub_centers = options.margin, options.sub_centers
    check_inputs(embeddings, weight, target, sub_centers, reduction, ignore_index, sample_weight)
    num_classes, dtype = weight.shape[0] // sub_centers, compute_dtype(embeddings, weight)
    options.check_step(target, num_classes, embeddings.device)
    labels = [each.long() for each in ((target,) if isinstance(target, Tensor) else target[:2])]
    for each in labels:
        check_target_range(each, num_classes, ignore_index)
    with without_autocast(embeddings.device):
        cosine = _unit_rows(embeddings.to(dtype)) @ _unit_rows(weight.to(dtype)).T  # (N, C·K)
    if sub_centers > 1:
        cosine = cosine.unflatten(1, (num_classes, sub_centers)).max(2).values  # (N, C)

    # One part of the loss for each label of a row: its share, and 0 where it is ignored.
    share = torch.ones_like(labels[0], dtype=dtype)
    if not isinstance(target, Tensor):
        share = torch.as_tensor(target[2], dtype=dtype, device=share.device).expand_as(share)
        check_row_factors("target[2]", share, 1.0)
    parts = [part.masked_fill(each == ignore_index, 0) for part, each in zip((share, 1 - share), labels, strict=False)]
    counted = torch.stack([each != ignore_index for each in labels]).any(0)
    norms = _norms(embeddings.to(dtype)).squeeze(1)
    own = for_rows(margin, lambda: norms, labels[0].masked_fill(labels[0] == ignore_index, 0), lambda: counted)
    scale = options.scale
    if hasattr(scale, "rescale"):
        scale = _adapted(scale, cosine.detach(), labels, ignore_index, counted)
    of_labels = []
    for each in labels:
        index = each.masked_fill(each == ignore_index, 0)
        with_labels = for_rows(margin, lambda: norms, index, lambda: counted) if hasattr(margin, "for_labels") else own
        of_labels.append(_of_label(options, scale, cosine, index, with_labels.modify, counted))
    loss = torch.stack([part * each.loss for part, each in zip(parts, of_labels, strict=True)]).sum(0)
    if own.penalty is not None:
        loss = loss + own.penalty
    loss = loss.masked_fill(~counted, 0)
    factors = torch.ones_like(loss)
    if sample_weight is not None:
        check_row_factors("sample_weight", sample_weight, math.inf)
        factors = sample_weight.to(dtype)
    result = factors * loss
    if reduction != "none":
        total = result.sum()
        result = total if reduction == "sum" else total / (factors * torch.stack(parts).sum(0))[counted].sum()
    if not return_stats:
        return result
    _, lse, target_cosine, correct = of_labels[0]
    correct = correct & (labels[0] != ignore_index)
    return result, MarginSoftmaxStats(loss.detach(), lse, target_cosine, correct)


def _of_label(
    options: HeadOptions,
    scale: float | Tensor,
    cosine: Tensor,
    index: Tensor,
    modify: Margin,
    counted: Tensor,
) -> MarginSoftmaxStats:
    """Return the losses of rows with cosines (N, C) and classes (N,), differentiable, and their other statistics."""
    margin, num_classes = options.margin, cosine.shape[1]
    scale = scale.to(cosine.dtype) if isinstance(scale, Tensor) else scale
    is_target = F.one_hot(index, num_classes).bool()  # (N, C)
    negatives = cosine.masked_fill(is_target, -torch.inf)
    target_cosine = cosine.gather(1, index[:, None]).squeeze(1)
    modified = modify(target_cosine.clone())  # a copy: a user's margin may work in place
    check_margin_output(modified, target_cosine)

    changed = negatives

    def hardest(count: int) -> Tensor:
        return F.pad(negatives.detach(), (0, count), value=-torch.inf).topk(count).values

    change = modulation(margin, target_cosine.detach(), counted, hardest)
    if change is not None:
        threshold, (a, b, d, e), *_ = change
        modulated = (a * cosine + b) * cosine + d + e * angle(cosine).sin()
        changed = torch.where(negatives > threshold[:, None], modulated, negatives).to(cosine.dtype)
    # The scale may have a gradient: it must not be multiplied by an infinity.
    negative_lse = (scale * changed.masked_fill(is_target, 0)).masked_fill(is_target, -torch.inf).logsumexp(1)
    loss = F.softplus(negative_lse - scale * modified, threshold=40)
    if options.label_smoothing > 0:
        logits = scale * torch.where(is_target, modified[:, None], cosine)
        uniform = (logits.logsumexp(1, keepdim=True) - logits).mean(1)
        loss = (1 - options.label_smoothing) * loss + options.label_smoothing * uniform
    lse = torch.logaddexp(negative_lse, scale * modified)
    numbers = binary_numbers(margin, scale)
    if numbers is not None:
        sums = _negative_losses(cosine, numbers).masked_fill(is_target, 0).sum(1)
        loss, lse = margin.row_losses(target_cosine, sums, scale), sums.log()  # type: ignore[attr-defined]
    correct = (target_cosine > negatives.amax(1)).detach()
    return MarginSoftmaxStats(loss, lse.detach(), target_cosine.detach(), correct)


def _adapted(adapting: AdaCos, cosine: Tensor, labels: list[Tensor], ignore_index: int, counted: Tensor) -> Tensor:
    """Return the scale of a step with cosines (N, C), after its update in training.

    If a row has two labels, the nearer one is the target.
    """
    own = [cosine.gather(1, each.masked_fill(each == ignore_index, 0)[:, None]).squeeze(1) for each in labels]
    own = [each.masked_fill(label == ignore_index, -torch.inf) for each, label in zip(own, labels, strict=True)]
    target_cosine, which = torch.stack(own).max(0)
    target = torch.stack(labels).gather(0, which[None]).squeeze(0).masked_fill(~counted, 0)
    scale = adapting.current(cosine.shape[1])
    if not adapting.training:
        return scale
    negatives = cosine.masked_fill(F.one_hot(target, cosine.shape[1]).bool(), -torch.inf)
    updated = adapting.rescale((scale * negatives).logsumexp(1), target_cosine, counted, scale)
    return scale if adapting.delayed else updated
