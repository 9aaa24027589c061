"""The one autograd function: from embeddings and class centers to each row's negative log-sum-exp and target cosine.

Everything after it is O(N) and plain PyTorch (:mod:`fused_arcface.engine.tail`), so its two incoming gradients carry
any margin: ``d_lse_i = sigmoid(L_i - z_i)`` spreads over the negatives by their softmax, ``d_target_cosine_i`` holds
the margin's derivative.

Collectives stand between the stages here and nowhere else. A :class:`Shard` says what this process holds. The one-shard
case is a shard whose collectives return what they were given.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.dtypes import compute_dtype
from ..base.normalize import unit_rows
from ..base.once_differentiable import once_differentiable
from ..margins.protocol import Modulation
from . import ops
from .direct import stages
from .mixed import add_second_gradient
from .shard import ONE_DEVICE, Shard
from .terms import Negatives, RowGradients, SecondTarget

if TYPE_CHECKING:
    from .adapting import Moments


def needs_shift(
    scale: float, num_classes: int, dtype: torch.dtype, greatest: float = 1.0, steepest: float = 1.0
) -> bool:
    """Return true if ``Σ exp(scale·cos)·ŵ`` over ``num_classes`` classes can leave the range of ``dtype``.

    Inside it (s = 64 up to 2.6e10 classes in fp32) sums need no running maximum: logits are bounded by the scale. At
    the lower end ``exp(-scale)`` times a small component must still be a normal number: 24 (53) bits above the least.
    Modulated cosines are at most ``greatest``, and each term has a factor of at most ``steepest``.
    """
    lowest, highest = (670, 709) if dtype == torch.float64 else (70, 88)
    return scale > lowest or scale * greatest + math.log(num_classes * steepest) >= highest


class NegativesAndTarget(torch.autograd.Function):
    """See :func:`negatives_and_target`."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        target: Tensor,
        second: Tensor | None,
        scale: float | Tensor,
        with_center_sum: bool,
        backend: str,
        shard: Shard,
        bounds: tuple[float, float],
        moments: Moments | None,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        negatives = dict(zip(Negatives._fields, numbers, strict=True))
        rows, (centers, classes) = shard.all_rows(embeddings), shard.operands(weight, backend)
        used = {"class_count": shard.class_count, "classes": classes}
        stage = stages(rows, centers, target, second, *numbers[1:])
        shift, given = None, scale
        scale = ops.readable(scale)
        is_logistic = negatives["logistic"] is not None  # such losses lie far inside of the range of fp32
        if isinstance(scale, Tensor) or (
            not is_logistic
            and needs_shift(scale, shard.num_classes or weight.shape[0], compute_dtype(rows, centers), *bounds)
        ):
            maximum = stage.class_max.default(rows, centers, target, backend, **used, **negatives)
            maximum = shard.ranks.max(maximum)
            shift = (scale * maximum.double()).masked_fill(maximum == -torch.inf, 0)
        known = None if moments is None or shift is not None else moments.total(scale)
        if known is None or moments is None:
            class_stats, (factor,) = ops.for_numbers(stage.class_stats, scale)
            total, maximum, center_sum = class_stats(
                rows, centers, target, factor, shift, with_center_sum, backend, **used, **negatives
            )
        else:
            total, maximum = known.to(moments.maximum.dtype), moments.maximum
            center_sum = total.new_empty(0)
        target_cosine = stage.target_cosine.default(rows, weight, shard.target_rows(target), backend)
        second_cosine = None
        if second is None:
            total, target_cosine = shard.ranks.sum_rows(total, target_cosine)
        else:
            second_cosine = stage.target_cosine.default(rows, weight, shard.target_rows(second), backend)
            total, target_cosine, second_cosine = shard.ranks.sum_rows(total, target_cosine, second_cosine)
        if shard.with_max:
            maximum = shard.ranks.max(maximum)
        lse, mean_center = stage.finish_negatives.default(total, shift, center_sum, backend)
        number = None if isinstance(scale, Tensor) else scale
        of_device = scale if isinstance(scale, Tensor) else None
        ctx.save_for_backward(embeddings, weight, target, second, lse, mean_center, of_device)
        ctx.scale_dtype = given.dtype if isinstance(given, Tensor) else None
        ctx.scale, ctx.with_center_sum, ctx.backend, ctx.shard = number, with_center_sum, backend, shard
        ctx.centers_are_summed = known is None
        ctx.negatives = negatives
        ctx.mark_non_differentiable(maximum)
        ctx.set_materialize_grads(False)
        return lse.to(target_cosine.dtype), target_cosine, maximum, second_cosine

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        saved: tuple[Any, ...],
        d_lse: Tensor | None,
        d_target_cosine: Tensor | None,
        _: None,
        d_second_cosine: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        shard = ctx.shard
        if shard.ranks.world_size > 1:
            shard.ranks.backward_passes += 1
        embeddings, weight, target, second_row, lse, mean_center, of_device = saved
        scale = ctx.scale if of_device is None else of_device
        rows = shard.all_rows(embeddings)
        stage = stages(rows, *saved, d_lse, d_target_cosine, d_second_cosine)
        # A gradient is None where the loss does not depend on the output.
        dtype = compute_dtype(rows, weight)
        d_lse = torch.zeros_like(lse, dtype=dtype) if d_lse is None else d_lse
        d_target_cosine = torch.zeros_like(lse, dtype=dtype) if d_target_cosine is None else d_target_cosine
        negative_coefficient = scale * d_lse
        gradients = RowGradients(scale, lse, negative_coefficient, d_target_cosine)
        second = None if d_second_cosine is None else SecondTarget(second_row, d_second_cosine)
        d_embeddings = d_weight = d_scale = None
        if ctx.needs_input_grad[4]:
            # By the scale, lse has the derivative Σ p_j·cos_j, the cosine with the mean of the centers that it sums.
            along = (unit_rows(rows.to(mean_center.dtype)) * mean_center).sum(1)
            d_scale = shard.ranks.sum((d_lse.double() * along).sum()).to(ctx.scale_dtype)
        d_centers = None
        if ctx.with_center_sum:
            of_mean = negative_coefficient
            if not ctx.centers_are_summed:
                d_centers, mean_center = stage.both_gradients.default(
                    rows, shard.centers(weight), target, *gradients, ctx.backend
                )
                of_mean = torch.ones_like(d_lse)
            d_unit = stage.unit_embedding_grad.default(
                weight, shard.target_rows(target), mean_center, of_mean, d_target_cosine, ctx.backend
            )
            if second is not None:
                row, ones = shard.target_rows(second.row), torch.ones_like(d_lse)
                d_unit = stage.unit_embedding_grad.default(weight, row, d_unit, ones, second.coefficient, ctx.backend)
            finish = shard.start_scatter(d_unit)
        d_bias = None
        if ctx.needs_input_grad[-1]:  # before the centers change
            centers, count = shard.centers(weight), shard.class_count
            own = stage.bias_grad.default(
                rows, centers, target, lse, d_lse, ctx.backend, class_count=count, **ctx.negatives
            )
            d_bias = shard.ranks.sum(own)
        # The weight pass runs while the embeddings' gradient is on its way between the ranks.
        if shard.update is not None:
            shard.update(rows, shard.classes, target, gradients, ctx.backend, Negatives(**ctx.negatives), second)
        elif ctx.needs_input_grad[1]:
            if d_centers is None:
                centers, classes = shard.operands(weight, ctx.backend)
                weight_grad, (factor,) = ops.for_numbers(stage.weight_grad, scale)
                numbers = (factor, lse, negative_coefficient, d_target_cosine)
                d_centers = weight_grad(rows, centers, target, *numbers, ctx.backend, classes=classes, **ctx.negatives)
            if second is not None:
                add_second_gradient(d_centers, rows, shard.centers(weight), second)
            d_weight = shard.weight_gradient(d_centers, weight)
        if ctx.with_center_sum:
            d_unit = finish()
            if ctx.needs_input_grad[0]:
                d_embeddings = stage.embedding_grad.default(d_unit, shard.own_rows(rows), ctx.backend)
        d_logistic = None if d_bias is None else F.pad(d_bias[None], (4, 0))
        return d_embeddings, d_weight, None, None, d_scale, *(None for _ in range(8)), d_logistic


def cosines_of_targets(
    embeddings: Tensor, weight: Tensor, target: Tensor, backend: str, shard: Shard, sub_centers: int
) -> tuple[Tensor, Tensor]:
    """Return the cosines (N,) of all ranks' rows with their targets, and the targets as rows of the centers (N,).

    If a class has several centers, the row is the nearest one. Neither result has a gradient;
    :func:`negatives_and_target` follows.
    """
    with torch.no_grad():
        rows = shard.all_rows(embeddings)
        stage = stages(rows, weight, target)
        candidates = [torch.where(target < 0, target, target * sub_centers + k) for k in range(sub_centers)]
        cosines = torch.stack(
            [stage.target_cosine.default(rows, weight, shard.target_rows(each), backend) for each in candidates]
        )
        cosine, nearest = cosines.max(0)
        target = torch.stack(candidates).gather(0, nearest[None]).squeeze(0)
        return shard.ranks.sum(cosine), target


def negatives_and_target(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float | Tensor,
    backend: str,
    shard: Shard = ONE_DEVICE,
    sub_centers: int = 1,
    modulation: Modulation | None = None,
    second: Tensor | None = None,
    logistic: Tensor | None = None,
    moments: Moments | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return each row's negative log-sum-exp and target cosine, differentiable, and greatest negative cosine, ``(N,)``.

    The last result is the cosine with the row's second target, differentiable, None without one.

    Args:
        embeddings: (n, D), this rank's rows. Their gradient is W times the derivative, W the number of ranks.
        weight: (C, D), this rank's classes.
        target: (N,) int64, all ranks' rows: an index into the centers that the step uses; ``ABSENT``: no target here,
            all classes are negatives, and without a target on any rank the cosine is 0; ``INVALID``: the cosine is NaN.
        scale: of the logits, a number or 0-dim. Its gradient, the same on every rank, is for negatives that are not
            modulated.
        backend: a name that :func:`fused_arcface.backends.select` returned.
        shard: what is held here of the classes, and how to reach the rest.
        sub_centers: rows of weight for each class; the target is then a row of weight.
        modulation: of the negatives' cosines.
        second: (N,) like target: a second target, which is one of the negatives as well.
        logistic: (5,) as in :class:`Negatives`: the negatives then have losses of their own, and the log-sum-exp is the
            logarithm of their sum.
        moments: the sums of an earlier pass in this step. If they serve this scale, no other pass is made.
    """
    bounds = (1.0, 1.0) if modulation is None else (modulation.greatest, modulation.steepest)
    changed = (None, None) if modulation is None else (modulation.threshold, modulation.coefficients)
    requires_grad = embeddings.requires_grad if shard.batch is None else shard.batch.requires_grad
    requires_grad |= isinstance(scale, Tensor) and scale.requires_grad
    result: tuple[Tensor, Tensor, Tensor, Tensor | None] = NegativesAndTarget.apply(
        embeddings,
        weight,
        target,
        second,
        scale,
        torch.is_grad_enabled() and requires_grad,
        backend,
        shard,
        bounds,
        moments,
        sub_centers,
        *changed,
        logistic,
    )
    return result
