"""Logits of all classes, with a gradient and, for given targets, with the margin. These store N×C tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.checks import check_margin_output
from ..base.dtypes import compute_dtype
from ..base.normalize import norms_of
from ..base.options import HeadOptions
from ..margins.protocol import Margin, for_rows, modulation
from ..parallel.ranks import JointBatch, Ranks
from .terms import IGNORED

GREATEST = 1 << 30
"""Numbers that logits may have: 4 GiB in fp32."""


def check_size_of_logits(num_rows: int, num_classes: int) -> None:
    """Check that logits (N, C) are small enough to be stored; not under torch.export, where N may have no limit.

    ``num_rows`` comes from a shape: the ``len`` of a tensor would fix the size that torch.export leaves open.

    Raises:
        ValueError: if they are not.
    """
    if not torch.compiler.is_exporting() and num_rows * num_classes > GREATEST:
        raise ValueError(
            f"logits must have at most 2^30 = {GREATEST} numbers (4 GiB in fp32); got (N={num_rows}, C={num_classes}), "
            f"{num_rows * num_classes} numbers: take fewer rows, topk(), or the loss, which stores none"
        )


@contextlib.contextmanager
def _resting(margin: Margin) -> Iterator[None]:
    """Use a margin with a state as in ``eval()``."""
    training = isinstance(margin, nn.Module) and margin.training
    if training:
        margin.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if training:
            margin.train()  # type: ignore[attr-defined]


def with_margin(cosines: Tensor, embeddings: Tensor, target_class: Tensor, options: HeadOptions) -> Tensor:
    """Return the cosines (N, C) with the margin. Times the scale they are logits whose cross-entropy is the loss.

    A penalty that the margin adds to the rows' losses (MagFace) is in no logit.

    Args:
        cosines: (N, C) with all classes.
        embeddings: (N, D).
        target_class: (N,) int64 as ``local_target`` returns it; an ignored row has no margin.
        options: the head's options.

    Raises:
        ValueError: if the margin has binary losses, which are no softmax.
    """
    margin, counted = options.margin, target_class != IGNORED
    if hasattr(margin, "binary"):
        raise ValueError(f"target must be None with {type(margin).__name__}: its losses are no softmax over logits")
    options.check_classes(cosines.shape[1])
    index = target_class.clamp(min=0)
    is_target = F.one_hot(index, cosines.shape[1]).bool() & counted[:, None]
    negatives = cosines.masked_fill(is_target, -torch.inf).detach()
    target_cosine = cosines.gather(1, index[:, None]).squeeze(1)
    with _resting(margin):
        rows = embeddings.to(compute_dtype(embeddings, cosines))
        own = for_rows(margin, lambda: norms_of(rows).squeeze(1), target_class, lambda: counted)
        modified = own.modify(target_cosine.clone())
        check_margin_output(modified, target_cosine)

        def hardest(count: int) -> Tensor:
            return F.pad(negatives, (0, count), value=-torch.inf).topk(count).values

        change = modulation(margin, target_cosine.detach(), counted, hardest)
    if change is not None:
        a, b, d, e = change.coefficients.to(cosines.dtype)
        # The derivative of the sine is bounded where that of an angle is.
        sine = ((1 - cosines) * (1 + cosines)).clamp(min=1e-4).sqrt()
        modulated = (a * cosines + b) * cosines + d + e * sine
        cosines = torch.where((negatives > change.threshold[:, None]) & counted[:, None], modulated, cosines)
    return torch.where(is_target, modified[:, None], cosines)


def logits_of(
    cosines: Tensor,
    embeddings: Tensor,
    target: Tensor | None,
    ignore_index: int,
    options: HeadOptions,
    scale: float | Tensor,
) -> Tensor:
    """Return logits (N, C) in the dtype of the cosines (N, C), with the margin if labels (N,) are given."""
    if target is not None:
        target_class = torch.ops.fused_arcface.local_target.default(target, cosines.shape[1], ignore_index)
        cosines = with_margin(cosines, embeddings, target_class, options)
    return (scale.to(cosines.dtype) if isinstance(scale, Tensor) else scale) * cosines


class _AllRows(torch.autograd.Function):
    """All ranks' rows (N, D) from this rank's (n, D). The gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, batch: JointBatch, ranks: Ranks) -> Tensor:
        ctx.batch, ctx.ranks = batch, ranks
        return batch.embeddings.clone()

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.start_scatter(d_rows.contiguous(), ctx.batch)(), None, None


class _OwnLogits(torch.autograd.Function):
    """This rank's rows with all classes (n, C_total) from all rows with this rank's classes (N, C)."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, batch: JointBatch, ranks: Ranks, counts: list[int]) -> Tensor:
        ctx.batch, ctx.ranks, ctx.counts = batch, ranks, counts
        return torch.cat([batch.own(part.T) for part in ranks.gather_rows(local.T.contiguous(), counts)], 1)

    @staticmethod
    def backward(ctx: Any, d_own: Tensor) -> tuple[Tensor, None, None, None]:
        every = torch.cat(ctx.ranks.gather_rows(d_own.contiguous(), ctx.batch.counts))
        start = sum(ctx.counts[: ctx.ranks.rank])
        return every[:, start : start + ctx.counts[ctx.ranks.rank]], None, None, None


def all_rows(embeddings: Tensor, batch: JointBatch, ranks: Ranks) -> Tensor:
    """Return all ranks' rows (N, D), differentiable where a rank's embeddings are."""
    if ranks.world_size == 1:
        return embeddings
    rows: Tensor = _AllRows.apply(embeddings, batch, ranks)
    return rows


def own_logits(local: Tensor, batch: JointBatch, ranks: Ranks, counts: list[int]) -> Tensor:
    """Return this rank's rows with all classes (n, C_total) from (N, C) of this shard; ``counts`` are the shards' C.

    The gradients are those of the sum over the ranks of what each makes of its rows.
    """
    if ranks.world_size == 1:
        return local
    own: Tensor = _OwnLogits.apply(local, batch, ranks, counts)
    return own
