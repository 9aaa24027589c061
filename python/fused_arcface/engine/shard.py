"""The shard of the classes that one process holds in a step, and the collectives that reach the other shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import has
from ..base.once_differentiable import once_differentiable
from ..parallel.ranks import ALONE, JointBatch, Ranks

CenterUpdate = Callable[..., None]
"""An update of the class centers that a fused optimizer makes in the backward pass.

It is called with all ranks' embeddings (N, D), the rows ``classes`` (K,) of weight to update (None: all), target (N,),
the :class:`RowGradients`, the backend, the :class:`Negatives`, and the :class:`SecondTarget` or None.
"""


@dataclass(frozen=True, eq=False)
class Shard:
    """The facts about one shard of the classes in a step. The default is the head on one device."""

    ranks: Ranks = ALONE
    batch: JointBatch | None = None
    """All ranks' rows; None if this process is alone, and its embeddings are all rows."""
    num_classes: int | None = None
    """Classes over all shards, C_total; None: those of the weight."""
    classes: Tensor | None = None
    """(K,) int64 ascending rows of weight that this step uses; None: all of them."""
    class_count: Tensor | None = None
    """0-dim int64: the entries of ``classes`` from there on are padding, ``C``; None: none are."""
    dense_grad: bool = False
    """With ``classes``: the gradient by weight as a dense (C, D) tensor, not a sparse one."""
    with_max: bool = False
    """If true, reduce each row's largest negative cosine over all shards."""
    update: CenterUpdate | None = None
    """If given, it is called, and there is no gradient by weight."""

    def all_rows(self, embeddings: Tensor) -> Tensor:
        """Return all ranks' rows (N, D) from this one's (n, D)."""
        return embeddings if self.batch is None else self.batch.embeddings

    def own_rows(self, rows: Tensor) -> Tensor:
        return rows if self.batch is None else self.batch.own(rows)

    def joint(self, own: Tensor, every: Callable[[Tensor], Tensor]) -> Tensor:
        """Return (N, ...) of all ranks' rows: this rank's are ``own`` (n, ...), the others ``every`` of the embeddings.

        The gradient by ``own`` is W times the derivative, see :meth:`start_scatter`. Every rank computes the loss.
        """
        if self.batch is None or self.ranks.world_size == 1:
            return own
        first, last = self.batch.first, self.batch.first + self.batch.count
        rows = every(self.batch.embeddings)
        own = own + (self.ranks.world_size - 1) * (own - own.detach())
        return torch.cat([rows[:first], own, rows[last:]])

    def centers(self, weight: Tensor) -> Tensor:
        """Return the centers (K, D) that this step uses."""
        if self.classes is None:
            return weight
        rows = self.classes if self.class_count is None else self.classes.clamp(max=weight.shape[0] - 1)
        return weight.index_select(0, rows)

    def operands(self, weight: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
        """Return the tensor with this step's centers, and their rows in it (K,), None for all.

        It is the weight itself if the backend can gather the rows, else a copy of them.
        """
        if self.classes is not None and has(backend, "gathering"):
            return weight, self.classes
        return self.centers(weight), None

    def target_rows(self, target: Tensor) -> Tensor:
        """Return indices into the centers that the step uses (N,) as rows of weight; negative ones stay."""
        if self.classes is None or self.classes.shape[0] == 0:
            return target
        return torch.where(target < 0, target, self.classes.index_select(0, target.clamp(min=0)))

    def start_scatter(self, rows: Tensor) -> Callable[[], Tensor]:
        """Call :meth:`Ranks.start_scatter`, times W, as data-parallel wrappers of the backbone divide by it."""
        if self.batch is None:
            return lambda: rows
        wait = self.ranks.start_scatter(rows, self.batch)
        return lambda: wait() * self.ranks.world_size

    def weight_gradient(self, d_centers: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient by weight (C, D) from that by the centers that the step used (K, D)."""
        if self.classes is None:
            return d_centers
        if self.dense_grad:
            return torch.zeros_like(weight).index_copy_(0, self.classes, d_centers)
        return torch.sparse_coo_tensor(
            self.classes[None], d_centers, weight.shape, is_coalesced=True, check_invariants=False
        )


class _OwnRows(torch.autograd.Function):
    """See :func:`own_losses`."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, batch: JointBatch, ranks: Ranks) -> Tensor:
        ctx.batch, ctx.ranks = batch, ranks
        return batch.own(losses).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _saved: tuple[()], d_own: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat(ctx.ranks.gather_rows(d_own, ctx.batch.counts)), None, None


def own_losses(losses: Tensor, batch: JointBatch, ranks: Ranks) -> Tensor:
    """Return this rank's (n,) of all ranks' row losses (N,).

    Each rank computes the losses of all rows, and the caller may compute anything from those of its own rows. The
    backward pass gathers the gradients by all rows' losses: they are those of the sum over the ranks.
    """
    own: Tensor = _OwnRows.apply(losses, batch, ranks)
    return own


ONE_DEVICE = Shard()
