"""The functional head: checks, the choice of a backend, and the straight line from there to the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .autograd import negatives_and_target
from .checks import check_inputs
from .loss import MarginSoftmaxStats, loss_of_rows
from .margins import ArcFace, Margin
from .ops import IGNORED


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
) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
    """Softmax cross-entropy over ``scale·cos θ`` with a margin on the target, never storing the ``(N, C)`` logits.

    ``loss_i = -log(e^z / (e^z + Σ_{j≠y} e^{s·cos θ_ij}))`` with ``z = s·margin(cos θ_iy)`` (ArcFace, eq. 3,
    arXiv:1801.07698).

    Args:
        embeddings: (N, D) fp32, fp64, bf16 or fp16, of any norm; rows are normalised by ``max(|x|, 1e-12)``.
        weight: (C, D) class centres, likewise; its dtype may differ.
        target: (N,) labels of any integer dtype, in [0, C) or ``ignore_index``.
        margin: a margin of this package, or any differentiable map of target cosines (N,) to modified cosines (N,).
        scale: ``s``, finite and > 0.
        reduction: ``"mean"`` (over the rows that count; NaN if none do), ``"sum"`` or ``"none"``.
        ignore_index: label of rows that take no part: loss and gradients 0.
        backend: ``"auto"``, or a name in :func:`fused_arcface.backends.available`; a named one never falls back.
        return_stats: also return :class:`~fused_arcface.MarginSoftmaxStats`, at no cost over the classes.

    Returns:
        The loss, a scalar or (N,), fp32 (fp64 if an input is), or ``(loss, stats)``. Gradients have their input's
        dtype. A NaN row of embeddings makes its own loss and gradient NaN, and the whole weight gradient.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device, range or option. Out-of-range labels: on a GPU the row's loss is NaN instead,
            unless the environment has ``FUSED_ARCFACE_DEBUG=1``.
        RuntimeError: a named backend that is not available; a second backward through the same loss, or a double one.

    >>> import torch
    >>> x, w = torch.eye(2), torch.eye(2)
    >>> margin_softmax_loss(x, w, torch.tensor([0, 0]), scale=1.0, margin=lambda c: c, reduction="none")
    tensor([0.3133, 1.3133])
    """
    check_inputs(embeddings, weight, target, margin, scale, reduction, ignore_index)
    backend = backends.select(backend, embeddings.device)
    embeddings = as_autocast(embeddings)
    local_target = torch.ops.fused_arcface.local_target(target, weight.shape[0], ignore_index)
    rows = negatives_and_target(embeddings, weight, local_target, float(scale), backend)
    loss, stats = loss_of_rows(*rows, local_target == IGNORED, margin, scale, reduction, backend)
    return (loss, stats) if return_stats else loss


def as_autocast(embeddings: Tensor) -> Tensor:
    """Embeddings as autocast would hand them to a matrix product. The class centres are master weights: never cast."""
    device = embeddings.device.type
    if embeddings.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return embeddings
    return embeddings.to(torch.get_autocast_dtype(device))
