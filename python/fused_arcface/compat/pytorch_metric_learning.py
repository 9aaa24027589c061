"""pytorch-metric-learning's losses over class centers, computed by the fused head.

Only the import changes::

    from fused_arcface.compat.pytorch_metric_learning import ArcFaceLoss

Each class derives from the class that it replaces. Constructor, miners, reducers, regularizers, records and
``state_dict`` are inherited, with margins in degrees and ``W`` (D, C). The losses of the rows come from this package,
which stores no N×C logits. These differences are intended:

- The gradient is exact and bounded. Theirs divides by zero at a target's cosine of ±1, which gives NaN before torch
  2.14.
- A small loss keeps its digits. Theirs is ``log Σ e^z - z``, which is 0 or several percent off in fp32.
- ``W`` keeps its dtype. Theirs takes the dtype of the embeddings: after one batch in bf16 it stays in bf16.
- A label outside [0, C) raises a ValueError that names it.
- ``get_outliers(return_dominant_centers=False)`` returns the outliers alone, and the dominant center of a class without
  rows is its first one; theirs is memory that was not set.

A loss with a distance that is neither ``CosineSimilarity`` nor ``DotProductSimilarity`` is computed by
pytorch-metric-learning itself.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances as _distances
from pytorch_metric_learning import losses as _losses
from pytorch_metric_learning.utils import common_functions as _common
from pytorch_metric_learning.utils import loss_and_miner_utils as _miners
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as _checkpoint

from .. import sub_centers as _sub_centers
from ..base.dtypes import compute_dtype as _compute_dtype
from ..base.normalize import unit_rows as _unit_rows
from ..base.normalize import without_autocast as _without_autocast
from ..functional import margin_softmax_loss as _margin_softmax_loss
from ..margins.angular import ArcFace as _ArcFace
from ..margins.angular import CosFace as _CosFace
from ..margins.angular import NormSoftmax as _NormSoftmax
from ..margins.angular import angle as _angle
from ..margins.angular import past_boundary as _past_boundary
from ..margins.protocol import Margin as _Margin

__all__ = ["ArcFaceLoss", "CosFaceLoss", "NormalizedSoftmaxLoss", "SphereFaceLoss", "SubCenterArcFaceLoss"]

# Classes whose logits SphereFaceLoss holds at once.
_CLASSES = 16384


class _Fused(nn.Module):
    """The part that all five losses share. As the first base class it replaces the computation of the second."""

    # Attributes of the second base class, which type checkers do not see.
    W: nn.Parameter
    distance: Any
    collect_stats: bool
    margin: Any
    scale: Any
    temperature: Any
    sub_centers: Any
    get_angles: Any
    add_weight_regularization_to_loss_dict: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # (D, C) as in theirs, but stored by class: the head reads it as (C, D) without a copy.
        self.W = nn.Parameter(self.W.detach().T.contiguous().T)
        if not self._is_fused():
            name, distance = type(self).__name__, type(self.distance).__name__
            warnings.warn(f"{name}: pytorch-metric-learning computes the loss, as distance={distance}()", stacklevel=2)

    def _is_fused(self) -> bool:
        """Return whether the loss with this distance is computed here."""
        plain = type(self.distance) in (_distances.CosineSimilarity, _distances.DotProductSimilarity)
        return plain and self.distance.p == 2

    def _row_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the rows' losses (N,)."""
        raise NotImplementedError

    def _softmax(
        self, embeddings: Tensor, labels: Tensor, margin: _Margin, scale: float, sub_centers: int = 1
    ) -> Tensor:
        losses, stats = _margin_softmax_loss(
            embeddings,
            self.W.T,
            labels,
            margin=margin,
            scale=float(scale),
            reduction="none",
            return_stats=True,
            sub_centers=sub_centers,
        )
        self._record(stats.target_cosine)
        return losses

    def _of_any_norm(self, embeddings: Tensor, labels: Tensor, margin: Any, scale: float) -> Tensor:
        """Return the rows' losses (N,) with the logits ``scale·|x|·cos θ`` of embeddings x that are not normalized.

        The fused kernels have one scale for all rows. Here plain PyTorch takes the classes by blocks, and computes them
        again in the backward pass.
        """
        dtype = _compute_dtype(embeddings, self.W)
        rows, unit, labels = embeddings.to(dtype), _unit_rows(self.W.T.to(dtype)), labels.long()
        wrong = labels[(labels < 0) | (labels >= len(unit))]
        if len(wrong):
            raise ValueError(f"labels must be in [0, num_classes={len(unit)}); got {int(wrong[0])}")
        cosine = (_unit_rows(rows) * unit[labels]).sum(1)
        self._record(cosine.detach())
        starts = range(0, len(unit), _CLASSES)
        parts = [
            _checkpoint(_negative_lse, rows, block, labels - start, scale, use_reentrant=False)
            for start, block in zip(starts, unit.split(_CLASSES), strict=True)
        ]
        target_logit = scale * rows.norm(dim=1) * margin(cosine)
        return F.softplus(torch.stack(parts).logsumexp(0) - target_logit, threshold=40)

    def _record(self, target_cosine: Tensor) -> None:
        """Record the mean angle, if statistics are collected and the loss has this one."""
        if self.collect_stats and hasattr(self, "get_angles"):
            self.get_angles(target_cosine)

    def cast_types(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move W to the embeddings' device; its dtype stays."""
        if self.W.device != device:
            self.W.data = self.W.data.to(device)

    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> dict[str, dict[str, Any]]:
        """Return pytorch-metric-learning's dictionary of the losses, for its reducers."""
        if not self._is_fused():
            result: dict[str, Any] = super().compute_loss(  # type: ignore[misc]
                embeddings, labels, indices_tuple, ref_emb, ref_labels
            )
            return result
        _common.labels_required(labels)
        _common.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        self.cast_types(embeddings.dtype, embeddings.device)
        losses = self._row_losses(embeddings, labels)
        weights = _miners.convert_to_weights(indices_tuple, labels, dtype=losses.dtype)
        every = {
            "losses": losses * weights,
            "indices": _common.torch_arange_from_size(embeddings),
            "reduction_type": "element",
        }
        loss_dict = {"loss": every}
        self.add_weight_regularization_to_loss_dict(loss_dict, self.W.t())
        return loss_dict

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Return the scaled logits (N, C) without a margin, in W's dtype, of embeddings (N, D); differentiable."""
        self.cast_types(embeddings.dtype, embeddings.device)
        logits: Tensor = super().get_logits(embeddings.to(self.W.dtype))  # type: ignore[misc]
        return logits


class ArcFaceLoss(_Fused, _losses.ArcFaceLoss):  # type: ignore[misc]
    """pytorch-metric-learning's ``ArcFaceLoss``: ``scale·cos(θ + margin)``, margin in degrees.

    Past ``θ + margin = π`` it is ``cos θ - margin·sin(margin)``, as :class:`fused_arcface.ArcFace` has it.

    >>> loss_func = ArcFaceLoss(num_classes=10, embedding_size=8, margin=28.6, scale=64)
    >>> loss = loss_func(torch.randn(4, 8), torch.tensor([0, 1, 2, 9]))
    >>> loss.backward(); loss_func.W.grad.shape
    torch.Size([8, 10])
    """

    def _row_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self._softmax(embeddings, labels, _ArcFace(float(self.margin)), self.scale)


class CosFaceLoss(_Fused, _losses.CosFaceLoss):  # type: ignore[misc]
    """pytorch-metric-learning's ``CosFaceLoss``: ``scale·(cos θ - margin)``."""

    def _row_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self._softmax(embeddings, labels, _CosFace(float(self.margin)), self.scale)


class NormalizedSoftmaxLoss(_Fused, _losses.NormalizedSoftmaxLoss):  # type: ignore[misc]
    """pytorch-metric-learning's ``NormalizedSoftmaxLoss``: ``cos θ / temperature``.

    With ``distance=DotProductSimilarity(normalize_embeddings=False)`` it is ``|x|·cos θ / temperature``, as in
    :class:`SphereFaceLoss`.
    """

    def _row_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if not self.distance.normalize_embeddings:
            return self._of_any_norm(embeddings, labels, _NormSoftmax(), 1 / self.temperature)
        return self._softmax(embeddings, labels, _NormSoftmax(), 1 / self.temperature)


class SubCenterArcFaceLoss(_Fused, _losses.SubCenterArcFaceLoss):  # type: ignore[misc]
    """pytorch-metric-learning's ``SubCenterArcFaceLoss``: each class has several centers, and the nearest one counts.

    ``W`` is (D, C·sub_centers), a class's centers one after another.
    """

    def _row_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self._softmax(embeddings, labels, _ArcFace(float(self.margin)), self.scale, self.sub_centers)

    @torch.no_grad()
    def get_outliers(
        self, embeddings: Tensor, labels: Tensor, threshold: float = 75, return_dominant_centers: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the rows further than ``threshold`` degrees from their class's dominant center, ordered by class.

        Args:
            embeddings: (N, D).
            labels: (N,).
            threshold: in degrees.
            return_dominant_centers: also return the dominant centers (D, C).
        """
        _common.check_shapes(embeddings, labels)
        self.cast_types(embeddings.dtype, embeddings.device)
        weight, count, labels = self.W.T, self.sub_centers, labels.to(embeddings.device)
        cosines = _sub_centers.own_cosines(embeddings, weight, labels, count)
        rows = labels.long() * count + cosines.argmax(1)
        chosen = _sub_centers.dominant(torch.bincount(rows, minlength=len(weight)).unflatten(0, (-1, count)))
        cosine = cosines.gather(1, chosen[labels.long()][:, None]).squeeze(1)
        far = (cosine < math.cos(math.radians(threshold))).nonzero().squeeze(1)
        outliers = far[labels[far].argsort(stable=True)]
        return (outliers, _sub_centers.keep_dominant(weight, chosen).T) if return_dominant_centers else outliers


class SphereFaceLoss(_Fused, _losses.SphereFaceLoss):  # type: ignore[misc]
    """pytorch-metric-learning's ``SphereFaceLoss``: ``scale·|x|·cos θ``, with ``cos(margin·θ)`` for the target.

    The logits grow with the embedding's norm, so the fused kernels do not apply. Plain PyTorch takes the classes by
    blocks of 16,384, and computes them again in the backward pass: no N×C logits are stored.
    """

    def _row_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        def folded(cosine: Tensor) -> Tensor:
            return _past_boundary(self.margin * _angle(cosine), cosine, 0.0, "fold")

        return self._of_any_norm(embeddings, labels, folded, self.scale)


def _negative_lse(rows: Tensor, unit: Tensor, target: Tensor, scale: float) -> Tensor:
    """Return the log-sum-exp (N,) of ``scale·⟨x, ŵ⟩`` over a block of classes, without the targets among them."""
    with _without_autocast(rows.device):
        logits = scale * rows @ unit.T
    is_target = target[:, None] == torch.arange(len(unit), device=unit.device)
    return logits.masked_fill(is_target, -torch.inf).logsumexp(1)
