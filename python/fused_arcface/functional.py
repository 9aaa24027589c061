"""The functional head: checks, the choice of a backend, and the straight line from there to the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import backends
from .base.checks import check_inputs
from .base.compiler import check_not_transformed
from .base.normalize import norms_of
from .engine.autograd import ONE_DEVICE, Shard, cosines_of_targets, negatives_and_target
from .engine.margin_step import in_step
from .engine.ops import IGNORED, compute_dtype
from .engine.smoothing import smoothing, two_uses
from .engine.tail import MarginSoftmaxStats, loss_of_rows
from .margins.angular import ArcFace, Margin, for_rows, modulates, modulation

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .calls import LossAndStats, LossOptions


@overload
def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def margin_softmax_loss(
    embeddings: Tensor, weight: Tensor, target: Tensor, *, return_stats: Literal[True], **options: Unpack[LossOptions]
) -> LossAndStats: ...
@overload
def margin_softmax_loss(
    embeddings: Tensor, weight: Tensor, target: Tensor, *, return_stats: bool, **options: Unpack[LossOptions]
) -> Tensor | LossAndStats: ...
def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    margin: Margin = ArcFace(),
    scale: float = 64.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
    return_stats: bool = False,
    sub_centers: int = 1,
    label_smoothing: float = 0.0,
) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
    """Softmax cross-entropy over ``scale·cos θ`` with a margin on the target, never storing the ``(N, C)`` logits.

    ``loss_i = -log(e^z / (e^z + Σ_{j≠y} e^{s·cos θ_ij}))`` with ``z = s·margin(cos θ_iy)`` (ArcFace, eq. 3,
    arXiv:1801.07698).

    Args:
        embeddings: (N, D) fp32, fp64, bf16 or fp16, of any norm; rows are normalized by ``max(|x|, 1e-12)``.
        weight: (C, D) class centers, likewise; its dtype may differ.
        target: (N,) labels of any integer dtype, in [0, C) or ``ignore_index``.
        margin: a margin of this package, or any differentiable map of target cosines (N,) to modified cosines (N,).
            One that knows the rows' norms or changes the negatives has a method more, see
            :class:`fused_arcface.margins.RowMargin` and :class:`fused_arcface.margins.Modulation`.
        scale: ``s``, finite and > 0. From 1e7 on fp32 has no digits left for the logits: they may even become NaN.
        reduction: ``"mean"`` (over the rows that count; NaN if none do), ``"sum"`` or ``"none"``.
        ignore_index: label of rows that take no part: loss and gradients 0.
        backend: ``"auto"``, or a name in :func:`fused_arcface.backends.available`; a named one never falls back.
        return_stats: also return :class:`~fused_arcface.MarginSoftmaxStats`, at no cost over the classes.
        sub_centers: K centers for each class, in [1, 16]: weight is (C·K, D) with a class's rows adjacent, and a
            class's cosine is the greatest of theirs, which alone has a gradient (Sub-center ArcFace, ECCV 2020).
        label_smoothing: in [0, 1], as in ``cross_entropy``: uniform over all classes, of which the target's logit has
            the margin. Only with ``sub_centers=1`` and a margin that leaves the negatives alone.

    Returns:
        The loss, a scalar or (N,), fp32 (fp64 if an input is), or ``(loss, stats)``. Gradients have their input's
        dtype. A NaN row of embeddings makes its own loss and gradient NaN, and the whole weight gradient.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device, range or option. Out-of-range labels: on a GPU the row's loss is NaN instead,
            unless the environment has ``FUSED_ARCFACE_DEBUG=1``.
            A named backend without sub-centers or modulated negatives, where they are asked for.
        RuntimeError: a named backend that is not available; a second backward through the same loss; a derivative of
            its gradient (:mod:`fused_arcface.reference` is twice differentiable).

    >>> import torch
    >>> x, w = torch.eye(2), torch.eye(2)
    >>> margin_softmax_loss(x, w, torch.tensor([0, 0]), scale=1.0, margin=lambda c: c, reduction="none")
    tensor([0.3133, 1.3133])
    """
    check_not_transformed("margin_softmax_loss")
    check_inputs(embeddings, weight, target, margin, scale, reduction, ignore_index, sub_centers, label_smoothing)
    needs = unusual_negatives(margin, sub_centers)
    backend = backends.select(backend, embeddings.device, compute_dtype(embeddings, weight), needs)
    embeddings = as_autocast(embeddings)
    num_classes = weight.shape[0] // sub_centers
    local_target = torch.ops.fused_arcface.local_target(target, num_classes, ignore_index)
    ignored = local_target == IGNORED
    options = HeadOptions(margin, float(scale), sub_centers, float(label_smoothing))
    loss, stats = loss_over_classes(embeddings, weight, local_target, ignored, options, reduction, backend)
    return (loss, stats) if return_stats else loss


class HeadOptions(NamedTuple):
    """What defines a head's loss; see :func:`margin_softmax_loss`."""

    margin: Margin
    scale: float
    sub_centers: int = 1
    label_smoothing: float = 0.0


def unusual_negatives(margin: Margin, sub_centers: int) -> str | None:
    """What only some backends have of this, for an error; None where every backend will do."""
    if modulates(margin):
        return f"the modulated negatives of {type(margin).__name__}"
    return f"sub_centers={sub_centers}" if sub_centers > 1 else None


def loss_over_classes(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    ignored: Tensor,
    options: HeadOptions,
    reduction: str,
    backend: str,
    shard: Shard = ONE_DEVICE,
) -> tuple[Tensor, MarginSoftmaxStats]:
    """Reduced loss over all ranks' rows, and their statistics: what every head ends in.

    Args are those of :func:`fused_arcface.engine.autograd.negatives_and_target`; target (N,) counts the classes that
    take part, not their rows; ignored (N,) bool.
    """
    margin, scale, sub_centers, label_smoothing = options
    x, w = embeddings, weight
    if label_smoothing > 0:
        (embeddings, x), (weight, w) = two_uses(embeddings), two_uses(weight)
    dtype = compute_dtype(embeddings, weight)
    # A margin with a state changes it once in a step, before the loss is computed.
    margin = in_step(margin, embeddings, alone=shard.batch is not None)
    own = for_rows(
        margin,
        lambda: shard.joint(norms_of(embeddings.to(dtype)), lambda rows: norms_of(rows.to(dtype))).squeeze(1),
        ~ignored,
    )
    change = None
    if modulates(margin) or sub_centers > 1:
        cosine, target = cosines_of_targets(embeddings, weight, target, backend, shard, sub_centers)
        change = modulation(margin, cosine, ~ignored)
    rows = negatives_and_target(embeddings, weight, target, scale, backend, shard, sub_centers, change)
    smoothed = smoothing(x, w, label_smoothing, shard.num_classes or weight.shape[0], shard)
    return loss_of_rows(*rows, ignored, own.modify, scale, reduction, backend, own.penalty, smoothed)


def as_autocast(embeddings: Tensor) -> Tensor:
    """Embeddings as autocast would hand them to a matrix product. The class centers are master weights: never cast."""
    device = embeddings.device.type
    if embeddings.is_meta or embeddings.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return embeddings
    return embeddings.to(torch.get_autocast_dtype(device))
