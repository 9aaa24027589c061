"""The one autograd function: from embeddings and class centres to each row's negative log-sum-exp and target cosine.

Everything after it is O(N) and plain PyTorch (:mod:`fused_arcface.loss`), so its two incoming gradients carry any
margin: ``d_lse_i = sigmoid(L_i - z_i)`` spreads over the negatives by their softmax, ``d_target_cosine_i`` holds the
margin's derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops import compute_dtype

_ops = torch.ops.fused_arcface


def needs_shift(scale: float, num_classes: int, dtype: torch.dtype) -> bool:
    """Whether ``Σ exp(scale·cos)·ŵ`` over ``num_classes`` classes can leave the range of ``dtype`` at either end.

    Inside it (s = 64 up to 2.6e10 classes in fp32) sums need no running maximum: logits are bounded by the scale. At
    the lower end ``exp(-scale)`` times a small component must still be a normal number: 24 (53) bits above the least.
    """
    lowest, highest = (670, 709) if dtype == torch.float64 else (70, 88)
    return scale > lowest or scale + math.log(num_classes) >= highest


class NegativesAndTarget(torch.autograd.Function):
    """See :func:`negatives_and_target`."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        target: Tensor,
        scale: float,
        with_centre_sum: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift = None
        if needs_shift(scale, weight.shape[0], compute_dtype(embeddings, weight)):
            maximum = _ops.class_max(embeddings, weight, target, backend)
            shift = (scale * maximum.double()).masked_fill(maximum == -torch.inf, 0)
        total, maximum, centre_sum = _ops.class_stats(
            embeddings, weight, target, scale, shift, with_centre_sum, backend
        )
        # fp64: at s = 1000 an fp32 rounding of it would cost 3e-5 of every probability in the backward pass.
        lse = total.double().log() if shift is None else total.double().log() + shift
        target_cosine = _ops.target_cosine(embeddings, weight, target, backend)
        if with_centre_sum:  # the softmax-weighted mean of the centres; a row without negatives has none
            centre_sum = centre_sum / total.masked_fill(total == 0, 1)[:, None]
        ctx.save_for_backward(embeddings, weight, target, lse, centre_sum)
        ctx.scale, ctx.backend = scale, backend
        ctx.mark_non_differentiable(maximum)
        return lse.to(target_cosine.dtype), target_cosine, maximum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_lse: Tensor, d_target_cosine: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, weight, target, lse, mean_centre = ctx.saved_tensors
        negative_coefficient = ctx.scale * d_lse
        d_embeddings = d_weight = None
        if ctx.needs_input_grad[0]:
            d_unit = _ops.unit_embedding_grad(
                weight, target, mean_centre, negative_coefficient, d_target_cosine, ctx.backend
            )
            d_embeddings = _ops.embedding_grad(d_unit, embeddings, ctx.backend)
        if ctx.needs_input_grad[1]:
            d_weight = _ops.weight_grad(
                embeddings, weight, target, ctx.scale, lse, negative_coefficient, d_target_cosine, ctx.backend
            )
        return d_embeddings, d_weight, None, None, None, None


def negatives_and_target(
    embeddings: Tensor, weight: Tensor, target: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's negative log-sum-exp, target cosine (both differentiable) and greatest negative cosine, all ``(N,)``.

    Args:
        embeddings: (N, D).
        weight: (C, D).
        target: (N,) int64 index into weight, or -1: no target here, its cosine is 0 and all classes are negatives; or
            -2: an invalid label, its cosine is NaN.
        scale: of the logits.
        backend: a name that :func:`fused_arcface.backends.select` returned.
    """
    with_centre_sum = torch.is_grad_enabled() and embeddings.requires_grad
    result: tuple[Tensor, Tensor, Tensor] = NegativesAndTarget.apply(
        embeddings, weight, target, scale, with_centre_sum, backend
    )
    return result
