"""The classes nearest to each row, by blocks of classes: never more than (N, 16384) cosines at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.dtypes import compute_dtype
from ..base.normalize import unit_rows, without_autocast
from .shard import Shard

# Classes whose cosines are held at once: (N, 16384) floats, 16 MiB at N = 256.
_CLASSES = 16384


def cosines_of(rows: Tensor, weight: Tensor, sub_centers: int = 1) -> Tensor:
    """Return the cosines (R, C) of rows (R, D) with the classes of weight (C·sub_centers, D).

    A class's cosine is the greatest of its centers'. The dtype is that of the loss's sums, autocast or not: in bf16
    cosines would be 0.004 off, more than neighboring classes differ by.
    """
    dtype = compute_dtype(rows, weight)
    with without_autocast(rows.device):
        cosines = F.linear(unit_rows(rows.to(dtype)), unit_rows(weight.to(dtype)))
    return cosines if sub_centers == 1 else cosines.unflatten(1, (-1, sub_centers)).amax(2)


def nearest_classes(
    embeddings: Tensor,
    weight: Tensor,
    k: int,
    sub_centers: int = 1,
    left_out: Tensor | None = None,
    class_count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the cosines (N, min(k, C)), descending, and ids of the nearest classes, int64.

    Args:
        embeddings: (N, D).
        weight: (C·sub_centers, D).
        k: number of classes, at least 1.
        sub_centers: rows of weight for each class.
        left_out: (N,) int64, a class of each row that gets the cosine -inf; negative: none.
        class_count: 0-dim int64: the rows of weight from there on are padding and get the cosine -inf; None: none are.
    """
    cosines = embeddings.new_empty(embeddings.shape[0], 0, dtype=compute_dtype(embeddings, weight))
    classes = torch.empty(embeddings.shape[0], 0, dtype=torch.int64, device=embeddings.device)
    step, num_classes = max(_CLASSES, k), weight.shape[0] // sub_centers
    for start in range(0, num_classes, step):
        chunk = cosines_of(embeddings, weight[start * sub_centers : (start + step) * sub_centers], sub_centers)
        if left_out is not None:
            column = (left_out - start).clamp(0, chunk.shape[1] - 1)[:, None]
            kept = chunk.gather(1, column).masked_fill(column + start == left_out[:, None], -torch.inf)
            chunk = chunk.scatter(1, column, kept)
        if class_count is not None:
            ids = torch.arange(start, start + chunk.shape[1], device=chunk.device)
            chunk = chunk.masked_fill(ids * sub_centers >= class_count, -torch.inf)
        nearest, column = chunk.topk(min(k, chunk.shape[1]))
        cosines, classes = torch.cat([cosines, nearest], 1), torch.cat([classes, column + start], 1)
        cosines, best = cosines.topk(min(k, cosines.shape[1]))
        classes = classes.gather(1, best)
    return cosines, classes


# An operator, since a compiled head would unroll the blocks.
torch.library.define(
    "fused_arcface::hardest_negatives",
    "(Tensor embeddings, Tensor weight, Tensor target, int count, int sub_centers, Tensor? class_count=None) -> Tensor",
)


@torch.library.impl("fused_arcface::hardest_negatives", "default")
def _hardest_negatives(
    embeddings: Tensor, weight: Tensor, target: Tensor, count: int, sub_centers: int, class_count: Tensor | None = None
) -> Tensor:
    """Return the greatest cosines (N, count) with classes of this shard that are not the target, descending.

    ``target`` (N,) is a row of weight or negative; the rows from ``class_count`` on are padding. Missing ones are -inf.
    """
    left_out = torch.where(target < 0, target, target // sub_centers)
    cosines, _ = nearest_classes(embeddings, weight, count, sub_centers, left_out, class_count)
    return F.pad(cosines, (0, count - cosines.shape[1]), value=-torch.inf)


@torch.library.register_fake("fused_arcface::hardest_negatives")
def _hardest_negatives_fake(embeddings: Tensor, weight: Tensor, target: Tensor, count: int, *_: object) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], count, dtype=compute_dtype(embeddings, weight))


def hardest_negatives(
    embeddings: Tensor, weight: Tensor, target: Tensor, count: int, sub_centers: int, shard: Shard
) -> Tensor:
    """Return the greatest cosines (N, count) of all ranks' rows with negatives of all shards, descending.

    ``embeddings`` (n, D) and ``weight`` (C, D) are this rank's. ``target`` (N,) int64 is an index into the centers that
    the step uses, or negative. A row with fewer negatives has -inf.
    """
    with torch.no_grad():
        rows, centers = shard.all_rows(embeddings), shard.centers(weight)
        own = torch.ops.fused_arcface.hardest_negatives(rows, centers, target, count, sub_centers, shard.class_count)
        if shard.ranks.world_size == 1:
            return own
        every = shard.ranks.gather_rows(own, [len(own)] * shard.ranks.world_size)
        return torch.cat(every, 1).topk(count).values
