"""One step of a head, in order, from embeddings and class centers to the reduced loss. Every head ends here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..base.checks import check_inputs
from ..base.compiler import check_not_transformed
from ..base.dtypes import compute_dtype
from ..base.normalize import norms_of
from ..base.options import HeadOptions
from ..base.statistics import MarginSoftmaxStats
from ..margins.protocol import binary_numbers, for_rows, modulation
from .adapting import Ahead, Moments, look_ahead
from .autograd import cosines_of_targets, negatives_and_target
from .direct import is_readable
from .margin_step import in_step
from .mixed import nearer_first, of_both
from .nearest import hardest_negatives
from .ops import are_all_classes, readable
from .shard import ONE_DEVICE, Shard
from .smoothing import smoothing, two_uses
from .tail import loss_of_mixed_rows, loss_of_rows
from .targets import Labels, Rows, Target, counted_rows, ignored_rows, labels_and_share
from .terms import IGNORED

_Compared = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""The results of :func:`negatives_and_target`."""


def loss_on_one_device(
    embeddings: Tensor,
    weight: Tensor,
    target: Labels,
    options: HeadOptions,
    backend: str = "auto",
    reduction: str = "mean",
    ignore_index: int = -100,
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
    """Check the tensors, choose the backend and return the loss: :func:`fused_arcface.margin_softmax_loss`."""
    check_not_transformed("margin_softmax_loss")
    check_inputs(embeddings, weight, target, options.sub_centers, reduction, ignore_index, sample_weight)
    embeddings = as_autocast(embeddings)
    of_classes = backends.ClassPass(embeddings.dtype, embeddings.shape[1])
    dtype = compute_dtype(embeddings, weight)
    backend = backends.select(backend, embeddings.device, dtype, options.needs(), of_classes, weight.dtype)
    num_classes = weight.shape[0] // options.sub_centers
    options.check_step(target, num_classes, embeddings.device)

    first, second, share = labels_and_share(target)
    all_count = second is None and is_readable(first) and are_all_classes(first, num_classes, ignore_index)

    def of_labels(labels: Tensor) -> Target:
        if all_count:
            label = labels.long().clone()
        else:
            label = torch.ops.fused_arcface.local_target.default(labels, num_classes, ignore_index)
        return Target(label, label)

    two = None if second is None else of_labels(second)
    rows = Rows(of_labels(first), checked_weights(sample_weight), two, share, all_count)
    loss, stats = loss_over_classes(embeddings, weight, rows, options, reduction, backend, with_stats=return_stats)
    return loss if stats is None else (loss, stats)


def checked_weights(sample_weight: Tensor | None) -> Tensor | None:
    """Return the rows' weights (N,), after a check of the values where that is no wait."""
    if sample_weight is None:
        return None
    checked: Tensor = torch.ops.fused_arcface.row_factors.default(sample_weight, "sample_weight", math.inf)
    return checked


def loss_over_classes(
    embeddings: Tensor,
    weight: Tensor,
    rows: Rows,
    options: HeadOptions,
    reduction: str,
    backend: str,
    shard: Shard = ONE_DEVICE,
    with_stats: bool = True,
) -> tuple[Tensor, MarginSoftmaxStats | None]:
    """Return the reduced loss over all ranks' rows, and the rows' statistics.

    Args:
        embeddings: (n, D), this rank's rows.
        weight: (C·sub_centers, D), this rank's class centers.
        rows: The targets and weights of all ranks' rows.
        options: The options of the loss.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: A name that :func:`fused_arcface.backends.select` returned.
        shard: The classes held here, and the way to reach the rest.
        with_stats: If false, return None for the statistics.
    """
    sub_centers = options.sub_centers
    num_classes = shard.num_classes or weight.shape[0] // sub_centers
    x, w = embeddings, weight
    if options.label_smoothing > 0:
        (embeddings, x), (weight, w) = two_uses(embeddings), two_uses(weight)

    # 1. The margin of each row. A margin with a state changes it here, once in a step.
    margin = in_step(options.margin, embeddings, alone=shard.batch is not None)
    dtype = compute_dtype(embeddings, weight)

    def norms() -> Tensor:
        return shard.joint(norms_of(embeddings.to(dtype)), lambda rows: norms_of(rows.to(dtype))).squeeze(1)

    def counted() -> Tensor:
        return counted_rows(rows)

    own = for_rows(margin, norms, rows.target.label, counted)

    # 2. The center that is each row's target, and how the negatives change. Two labels and sub-centers have several
    #    centers to choose from: the nearest one is the target.
    target_row, second_row, order, change = rows.target.local, None, None, None

    def nearest(target: Target) -> tuple[Tensor, Tensor]:
        return cosines_of_targets(embeddings, weight, target.local, backend, shard, sub_centers)

    def hardest(count: int) -> Tensor:
        return hardest_negatives(embeddings, weight, target_row, count, sub_centers, shard)

    if rows.second is not None:
        order = nearer_first(rows, nearest(rows.target), nearest(rows.second))
        target_row, second_row = order.rows, order.others
    elif hasattr(margin, "modulate") or sub_centers > 1:
        cosine, target_row = nearest(rows.target)
        change = modulation(margin, cosine, counted(), hardest)

    # 3. The pass over the classes. A scale that adapts may need the figures of one first.
    def compare(scale: float | Tensor, moments: Moments | None = None) -> _Compared:
        logistic = binary_numbers(margin, scale)
        return negatives_and_target(
            embeddings, weight, target_row, scale, backend, shard, sub_centers, change, second_row, logistic, moments
        )

    def ahead(scale: Tensor) -> Ahead | None:
        return look_ahead(embeddings, weight, target_row, scale, sub_centers, backend, shard)

    if isinstance(options.scale, nn.Module):
        step = in_step(options.scale, embeddings, alone=shard.batch is not None)
        scale, found = _with_adapting_scale(options.scale, step, compare, ahead, counted(), num_classes)
    else:
        scale, found = options.scale, compare(options.scale)
    lse, cosine, greatest, other_cosine = found

    # 4. The end, O(N): the margin, the loss of each row, the reduction.
    smoothed = smoothing(x, w, options.label_smoothing, num_classes, shard)
    factors = None if rows.sample_weight is None else rows.sample_weight.to(lse.dtype)
    if rows.second is None or order is None or other_cosine is None:
        row = lse, cosine, greatest
        of_rows = *row, ignored_rows(rows), own.modify, scale, reduction, backend, own.penalty, smoothed, factors
        return loss_of_rows(*of_rows, with_stats)
    of_second = for_rows(margin, norms, rows.second.label, counted) if hasattr(margin, "for_labels") else own
    both = of_both(order, lse, cosine, other_cosine, scale)
    correct = (cosine > greatest).detach() & ~order.swapped & (rows.target.label != IGNORED)
    margins = own.modify, of_second.modify
    loss, stats = loss_of_mixed_rows(both, margins, rows, correct, scale, reduction, own.penalty, smoothed, factors)
    return loss, stats if with_stats else None


def _with_adapting_scale(
    scale: Any,
    step: Any,
    compare: Callable[..., _Compared],
    ahead: Callable[[Tensor], Ahead | None],
    counted: Tensor,
    num_classes: int,
) -> tuple[float | Tensor, _Compared]:
    """Return the scale of a step, and the result of the pass over the classes with it.

    ``step`` is the head's scale in this step, see :func:`in_step`. ``compare`` makes the pass for a scale, and for
    moments if :func:`look_ahead`, which is ``ahead``, has found some.
    """
    value, moments = step.current(num_classes), None
    if scale.training and not scale.delayed:
        seen = ahead(value)
        if seen is not None:
            moments, lse, cosine = seen
        else:
            with torch.no_grad():
                lse, cosine, *_ = compare(value)
        value = step.rescale(lse, cosine, counted, value)
    used = readable(value)
    found = compare(used, moments)
    if scale.training and scale.delayed:
        step.rescale(found[0].detach(), found[1].detach(), counted, value)
    return used, found


def as_autocast(embeddings: Tensor) -> Tensor:
    """Return the embeddings as autocast would hand them to a matrix product.

    The class centers are master weights: they are never cast.
    """
    device = embeddings.device.type
    if embeddings.is_meta or embeddings.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return embeddings
    return embeddings.to(torch.get_autocast_dtype(device))
