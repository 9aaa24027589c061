"""One step of a head, in order, from embeddings and class centers to the reduced loss. Every head ends here."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..base.checks import check_inputs
from ..base.compiler import check_not_transformed
from ..base.dtypes import compute_dtype
from ..base.normalize import norms_of
from ..base.options import HeadOptions
from ..base.statistics import MarginSoftmaxStats
from ..margins.protocol import RowMargin, binary_numbers, for_rows, modulates, modulation
from .autograd import cosines_of_targets, negatives_and_target
from .margin_step import in_step
from .nearest import hardest_negatives
from .shard import ONE_DEVICE, Shard
from .smoothing import smoothing, two_uses
from .tail import loss_of_rows
from .terms import IGNORED


def loss_on_one_device(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    options: HeadOptions,
    backend: str = "auto",
    reduction: str = "mean",
    ignore_index: int = -100,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
    """Check the tensors, choose the backend and return the loss: :func:`fused_arcface.margin_softmax_loss`."""
    check_not_transformed("margin_softmax_loss")
    check_inputs(embeddings, weight, target, options.sub_centers, reduction, ignore_index)
    backend = backends.select(backend, embeddings.device, compute_dtype(embeddings, weight), options.needs())
    embeddings = as_autocast(embeddings)
    num_classes = weight.shape[0] // options.sub_centers
    target_class = torch.ops.fused_arcface.local_target.default(target, num_classes, ignore_index)
    ignored = target_class == IGNORED
    loss, stats = loss_over_classes(embeddings, weight, target_class, ignored, options, reduction, backend)
    return (loss, stats) if return_stats else loss


def loss_over_classes(
    embeddings: Tensor,
    weight: Tensor,
    target_class: Tensor,
    ignored: Tensor,
    options: HeadOptions,
    reduction: str,
    backend: str,
    shard: Shard = ONE_DEVICE,
) -> tuple[Tensor, MarginSoftmaxStats]:
    """Return the reduced loss over all ranks' rows, and the rows' statistics.

    Args:
        embeddings: (n, D), this rank's rows.
        weight: (C·sub_centers, D), this rank's class centers.
        target_class: (N,) int64, all ranks' rows: an index into the classes that the step uses here, or negative.
        ignored: (N,) bool.
        options: The options of the loss.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: A name that :func:`fused_arcface.backends.select` returned.
        shard: The classes held here, and the way to reach the rest.
    """
    scale, sub_centers, label_smoothing = options.scale, options.sub_centers, options.label_smoothing
    x, w = embeddings, weight
    if label_smoothing > 0:
        (embeddings, x), (weight, w) = two_uses(embeddings), two_uses(weight)
    dtype = compute_dtype(embeddings, weight)
    # A margin with a state changes it once in a step, before the loss is computed.
    margin = in_step(options.margin, embeddings, alone=shard.batch is not None)
    own = RowMargin(margin)
    if hasattr(margin, "for_rows"):
        own = for_rows(
            margin,
            lambda: shard.joint(norms_of(embeddings.to(dtype)), lambda rows: norms_of(rows.to(dtype))).squeeze(1),
            ~ignored,
        )
    target_row, change = target_class, None
    if modulates(margin) or sub_centers > 1:
        cosine, target_row = cosines_of_targets(embeddings, weight, target_class, backend, shard, sub_centers)

        def hardest(count: int) -> Tensor:
            return hardest_negatives(embeddings, weight, target_row, count, sub_centers, shard)

        change = modulation(margin, cosine, ~ignored, hardest)
    logistic = binary_numbers(margin, scale)
    rows = negatives_and_target(embeddings, weight, target_row, scale, backend, shard, sub_centers, change, logistic)
    smoothed = smoothing(x, w, label_smoothing, shard.num_classes or weight.shape[0], shard)
    return loss_of_rows(*rows, ignored, own.modify, scale, reduction, backend, own.penalty, smoothed)


def as_autocast(embeddings: Tensor) -> Tensor:
    """Return the embeddings as autocast would hand them to a matrix product.

    The class centers are master weights: they are never cast.
    """
    device = embeddings.device.type
    if embeddings.is_meta or embeddings.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return embeddings
    return embeddings.to(torch.get_autocast_dtype(device))
