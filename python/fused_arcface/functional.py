"""The loss as a function: checks, the choice of a backend, and one step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from .base.options import HeadOptions
from .base.statistics import MarginSoftmaxStats
from .engine.step import loss_on_one_device
from .engine.targets import Labels
from .margins.angular import ArcFace
from .margins.protocol import Margin
from .margins.scale import Scale

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .calls import LossAndStats, LossOptions


@overload
def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    target: Labels,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def margin_softmax_loss(
    embeddings: Tensor, weight: Tensor, target: Labels, *, return_stats: Literal[True], **options: Unpack[LossOptions]
) -> LossAndStats: ...
@overload
def margin_softmax_loss(
    embeddings: Tensor, weight: Tensor, target: Labels, *, return_stats: bool, **options: Unpack[LossOptions]
) -> Tensor | LossAndStats: ...
def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    target: Labels,
    *,
    margin: Margin = ArcFace(),
    scale: Scale = 64.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
    return_stats: bool = False,
    sub_centers: int = 1,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
    """Softmax cross-entropy over ``scale·cos θ`` with a margin on the target, never storing the ``(N, C)`` logits.

    ``loss_i = -log(e^z / (e^z + Σ_{j≠y} e^{s·cos θ_ij}))`` with ``z = s·margin(cos θ_iy)`` (ArcFace, eq. 3,
    arXiv:1801.07698).

    Args:
        embeddings: (N, D) fp32, fp64, bf16 or fp16, of any norm; rows are normalized by ``max(|x|, 1e-12)``.
        weight: (C, D) class centers of any norm; their dtype may differ.
        target: (N,) labels of any integer dtype, in [0, C) or ``ignore_index``; or mixed labels of mixup and CutMix,
            ``(first, second, share)``: two labels (N,), and the share of the first one, a number or (N,) in [0, 1].
            The loss of a row is ``share·CE(first) + (1 - share)·CE(second)``, each with its own margin, in one pass
            over the classes. A part whose label is ignored has no loss and does not count in the mean. The statistics
            are those of the first label, except for the loss, which is the row's.
        margin: a margin of this package, or any differentiable map of target cosines (N,) to modified cosines (N,).
            A margin that uses the rows' norms or changes the negatives has one more method, see
            :class:`fused_arcface.margins.RowMargin` and :class:`fused_arcface.margins.Modulation`.
        scale: ``s``, finite and > 0. From 1e7 on fp32 has no digits left for the logits: they may even become NaN. A
            0-dim parameter is learned, :class:`~fused_arcface.AdaCos` adapts to the batch; neither works with a margin
            that changes the negatives. On a GPU nothing checks that a parameter is > 0.
        reduction: ``"mean"`` (over the rows that count; NaN if none do), ``"sum"`` or ``"none"``.
        ignore_index: label of rows that are ignored: their loss and gradients are 0.
        backend: ``"auto"``, or a name in :func:`fused_arcface.backends.available`, which never falls back to another.
        return_stats: also return :class:`~fused_arcface.MarginSoftmaxStats`, without another pass over the classes.
        sub_centers: K centers for each class, in [1, 16]: weight is (C·K, D) with a class's rows adjacent, and a
            class's cosine is that of its nearest center, and only that center gets a gradient (Sub-center ArcFace,
            ECCV 2020).
        label_smoothing: in [0, 1], as in ``cross_entropy``: uniform over all classes; the target's logit has the
            margin. Only with ``sub_centers=1`` and a margin that leaves the negatives alone.
        sample_weight: (N,) factors of the rows' losses, finite and >= 0, without a gradient, or None. The mean divides
            by their sum over the rows that count, as ``cross_entropy(weight=...)`` does. Weights of classes are
            ``class_weight[target]``. The losses of the statistics do not have these factors.

    Returns:
        The loss, a scalar or (N,), fp32 (fp64 if an input is), or ``(loss, stats)``. Gradients have their input's
        dtype. A NaN row of embeddings makes its own loss and gradient NaN, and the whole weight gradient.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if a shape, device, number or option is wrong, or a named backend lacks sub-centers or modulated
            negatives that the call needs. A label out of range raises on a CPU. On a GPU it makes the row's loss NaN
            instead, unless the environment has ``FUSED_ARCFACE_DEBUG=1``. Values of sample_weight are read under the
            same conditions.
        RuntimeError: if a named backend is not available; in a second backward pass through the same loss; and in a
            derivative of its gradient (:mod:`fused_arcface.reference` is twice differentiable).

    >>> import torch
    >>> x, w = torch.eye(2), torch.eye(2)
    >>> margin_softmax_loss(x, w, torch.tensor([0, 0]), scale=1.0, margin=lambda c: c, reduction="none")
    tensor([0.3133, 1.3133])
    """
    options = HeadOptions(margin, scale, sub_centers, label_smoothing)
    return loss_on_one_device(
        embeddings, weight, target, options, backend, reduction, ignore_index, return_stats, sample_weight
    )
