"""The one autograd function: from embeddings and class centers to each row's negative log-sum-exp and target cosine.

Everything after it is O(N) and plain PyTorch (:mod:`fused_arcface.engine.tail`), so its two incoming gradients carry any
margin: ``d_lse_i = sigmoid(L_i - z_i)`` spreads over the negatives by their softmax, ``d_target_cosine_i`` holds the
margin's derivative.

Collectives stand between the stages here and nowhere else. A :class:`Shard` says what this process holds; the one-shard
case is a shard whose collectives hand back what they were given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.once_differentiable import once_differentiable
from ..margins.angular import Modulation
from ..parallel.ranks import ALONE, JointBatch, Ranks
from .ops import PLAIN, Negatives, compute_dtype

_ops = torch.ops.fused_arcface


def needs_shift(
    scale: float, num_classes: int, dtype: torch.dtype, greatest: float = 1.0, steepest: float = 1.0
) -> bool:
    """Whether ``Σ exp(scale·cos)·ŵ`` over ``num_classes`` classes can leave the range of ``dtype`` at either end.

    Inside it (s = 64 up to 2.6e10 classes in fp32) sums need no running maximum: logits are bounded by the scale. At
    the lower end ``exp(-scale)`` times a small component must still be a normal number: 24 (53) bits above the least.
    Modulated cosines are at most ``greatest``, and each term has a factor of at most ``steepest``.
    """
    lowest, highest = (670, 709) if dtype == torch.float64 else (70, 88)
    return scale > lowest or scale * greatest + math.log(num_classes * steepest) >= highest


class CenterUpdate:
    """What :class:`Shard` asks of a fused optimizer: one update of the class centers, made in the backward pass.

    :mod:`fused_arcface.center_sgd` has the only one.
    """

    def apply(
        self,
        embeddings: Tensor,
        weight: Tensor,
        classes: Tensor | None,
        target: Tensor,
        scale: float,
        lse: Tensor,
        negative_coefficient: Tensor,
        target_coefficient: Tensor,
        backend: str,
        negatives: Negatives = PLAIN,
    ) -> None:
        """Updates rows ``classes`` (K,) of weight, all if None, in place. Arguments as of ``ops.weight_grad``."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Shard:
    """What a step over one shard of the classes needs beside its tensors. The default is the head on one device."""

    ranks: Ranks = ALONE
    batch: JointBatch | None = None
    """All ranks' rows; None where this process is alone and its embeddings are all there are."""
    num_classes: int | None = None
    """Classes over all shards, C_total; None: those of the weight."""
    classes: Tensor | None = None
    """(K,) int64 ascending rows of weight that take part in this step; None: all of them."""
    class_count: Tensor | None = None
    """0-dim int64: those of ``classes`` from there on are padding, ``C``; None: all take part."""
    dense_grad: bool = False
    """With ``classes``: the gradient by weight as a dense (C, D) tensor, not a sparse one."""
    with_max: bool = False
    """Whether each row's greatest negative cosine is wanted over all shards, not over this one."""
    update: CenterUpdate | None = None
    """In place of a gradient by weight."""

    def all_rows(self, embeddings: Tensor) -> Tensor:
        """(N, D) of all ranks from this one's (n, D)."""
        return embeddings if self.batch is None else self.batch.embeddings

    def own_rows(self, rows: Tensor) -> Tensor:
        return rows if self.batch is None else self.batch.own(rows)

    def joint(self, own: Tensor, every: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, ...) of all ranks' rows: ``own`` (n, ...) in this rank's places, with W times the gradient (see
        :meth:`start_scatter`; every rank computes the whole loss), ``every`` of all embeddings (N, D) in the others."""
        if self.batch is None or self.ranks.world_size == 1:
            return own
        first, last = self.batch.first, self.batch.first + self.batch.count
        rows = every(self.batch.embeddings)
        own = own + (self.ranks.world_size - 1) * (own - own.detach())
        return torch.cat([rows[:first], own, rows[last:]])

    def centers(self, weight: Tensor) -> Tensor:
        """(K, D) centers that take part in this step."""
        if self.classes is None:
            return weight
        rows = self.classes if self.class_count is None else self.classes.clamp(max=weight.shape[0] - 1)
        return weight.index_select(0, rows)

    def target_rows(self, target: Tensor) -> Tensor:
        """Indices into the centers that take part (N,) as rows of weight; negative ones stay."""
        if self.classes is None or self.classes.shape[0] == 0:
            return target
        return torch.where(target < 0, target, self.classes.index_select(0, target.clamp(min=0)))

    def start_scatter(self, rows: Tensor) -> Callable[[], Tensor]:
        """See :meth:`Ranks.start_scatter`; times W, as data-parallel wrappers of the backbone divide by it."""
        if self.batch is None:
            return lambda: rows
        wait = self.ranks.start_scatter(rows, self.batch)
        return lambda: wait() * self.ranks.world_size

    def weight_gradient(self, d_centers: Tensor, weight: Tensor) -> Tensor:
        """The gradient by weight (C, D) from that by the centers that took part (K, D)."""
        if self.classes is None:
            return d_centers
        if self.dense_grad:
            return torch.zeros_like(weight).index_copy_(0, self.classes, d_centers)
        return torch.sparse_coo_tensor(
            self.classes[None], d_centers, weight.shape, is_coalesced=True, check_invariants=False
        )


ONE_DEVICE = Shard()


class NegativesAndTarget(torch.autograd.Function):
    """See :func:`negatives_and_target`."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        target: Tensor,
        scale: float,
        with_center_sum: bool,
        backend: str,
        shard: Shard,
        bounds: tuple[float, float],
        *numbers: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        negatives = dict(zip(Negatives._fields, numbers, strict=True))
        rows, centers = shard.all_rows(embeddings), shard.centers(weight)
        shift = None
        if needs_shift(scale, shard.num_classes or weight.shape[0], compute_dtype(rows, centers), *bounds):
            maximum = _ops.class_max.default(rows, centers, target, backend, shard.class_count, **negatives)
            maximum = shard.ranks.max(maximum)
            shift = (scale * maximum.double()).masked_fill(maximum == -torch.inf, 0)
        total, maximum, center_sum = _ops.class_stats.default(
            rows, centers, target, scale, shift, with_center_sum, backend, shard.class_count, **negatives
        )
        target_cosine = _ops.target_cosine.default(rows, weight, shard.target_rows(target), backend)
        total, target_cosine = shard.ranks.sum_rows(total, target_cosine)
        if shard.with_max:
            maximum = shard.ranks.max(maximum)
        lse, mean_center = _ops.finish_negatives.default(total, shift, center_sum, backend)
        ctx.save_for_backward(embeddings, weight, target, lse, mean_center)
        ctx.scale, ctx.with_center_sum, ctx.backend, ctx.shard = scale, with_center_sum, backend, shard
        ctx.negatives = negatives
        ctx.mark_non_differentiable(maximum)
        ctx.set_materialize_grads(False)
        return lse.to(target_cosine.dtype), target_cosine, maximum

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Any, ...], d_lse: Tensor | None, d_target_cosine: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        shard = ctx.shard
        embeddings, weight, target, lse, mean_center = saved
        rows = shard.all_rows(embeddings)
        # A gradient is None where the loss does not depend on the output.
        dtype = compute_dtype(rows, weight)
        d_lse = torch.zeros_like(lse, dtype=dtype) if d_lse is None else d_lse
        d_target_cosine = torch.zeros_like(lse, dtype=dtype) if d_target_cosine is None else d_target_cosine
        negative_coefficient = ctx.scale * d_lse
        coefficients = ctx.scale, lse, negative_coefficient, d_target_cosine
        d_embeddings = d_weight = None
        if ctx.with_center_sum:
            d_unit = _ops.unit_embedding_grad.default(
                weight, shard.target_rows(target), mean_center, negative_coefficient, d_target_cosine, ctx.backend
            )
            finish = shard.start_scatter(d_unit)
        # The weight pass runs while the embeddings' gradient is on its way between the ranks.
        if shard.update is not None:
            shard.update.apply(
                rows, weight, shard.classes, target, *coefficients, ctx.backend, Negatives(**ctx.negatives)
            )
        elif ctx.needs_input_grad[1]:
            d_weight = shard.weight_gradient(
                _ops.weight_grad.default(
                    rows, shard.centers(weight), target, *coefficients, ctx.backend, **ctx.negatives
                ),
                weight,
            )
        if ctx.with_center_sum:
            d_unit = finish()
            if ctx.needs_input_grad[0]:
                d_embeddings = _ops.embedding_grad.default(d_unit, shard.own_rows(rows), ctx.backend)
        return d_embeddings, d_weight, *(None for _ in range(9))


def cosines_of_targets(
    embeddings: Tensor, weight: Tensor, target: Tensor, backend: str, shard: Shard, sub_centers: int
) -> tuple[Tensor, Tensor]:
    """Ahead of :func:`negatives_and_target`, without a gradient: cosines (N,) of all ranks' rows with their targets,
    and the targets as rows of the centers that take part (N,), from those as classes: of several centers the nearest.
    """
    with torch.no_grad():
        rows = shard.all_rows(embeddings)
        candidates = [torch.where(target < 0, target, target * sub_centers + k) for k in range(sub_centers)]
        cosines = torch.stack(
            [_ops.target_cosine.default(rows, weight, shard.target_rows(each), backend) for each in candidates]
        )
        cosine, nearest = cosines.max(0)
        target = torch.stack(candidates).gather(0, nearest[None]).squeeze(0)
        return shard.ranks.sum(cosine), target


def negatives_and_target(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    backend: str,
    shard: Shard = ONE_DEVICE,
    sub_centers: int = 1,
    modulation: Modulation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's negative log-sum-exp, target cosine (both differentiable) and greatest negative cosine, all ``(N,)``.

    Args:
        embeddings: (n, D), this rank's rows. Their gradient is W times the derivative, W the number of ranks.
        weight: (C, D), this rank's classes.
        target: (N,) int64, all ranks' rows: index into the centers that take part; ``IGNORED``: no target here, all
            classes are negatives, and without a target on any rank the cosine is 0; or ``INVALID``: the cosine is NaN.
        scale: of the logits.
        backend: a name that :func:`fused_arcface.backends.select` returned.
        shard: what is held here of the classes, and how to reach the rest.
        sub_centers: rows of weight for each class; the target is then a row of weight.
        modulation: of the negatives' cosines.
    """
    bounds = (1.0, 1.0) if modulation is None else (modulation.greatest, modulation.steepest)
    changed = (None, None) if modulation is None else (modulation.threshold, modulation.coefficients)
    requires_grad = embeddings.requires_grad if shard.batch is None else shard.batch.requires_grad
    result: tuple[Tensor, Tensor, Tensor] = NegativesAndTarget.apply(
        embeddings,
        weight,
        target,
        scale,
        torch.is_grad_enabled() and requires_grad,
        backend,
        shard,
        bounds,
        sub_centers,
        *changed,
    )
    return result
