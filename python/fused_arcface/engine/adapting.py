"""A scale that adapts to the batch, in one pass over the classes: the sums for a scale that is known after the pass.

AdaCos computes a step's scale s from the sums ``Σ_j e^(s₀·c_j)`` of that step with the scale s₀ of the step before. The
loss then needs those sums with s. So the pass sums the moments ``m_k = Σ_j e^(s₀·c_j)·c_j^k``, and

    Σ_j e^(s·c_j) = Σ_k m_k·(s - s₀)^k / k!

The cosines lie in [-1, 1], so few moments are enough where s - s₀ is small. Otherwise a second pass follows. The pass
cannot sum the centers for the gradient by the embeddings, as s is unknown then: the backward pass does, beside the
gradient by weight and from the same tiles.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..base.dtypes import compute_dtype
from .autograd import needs_shift
from .direct import stages
from .ops import readable
from .shard import Shard

_LONGEST_STEP = 1.0
"""Greatest change of the scale that the moments serve. The 17th term of the series, which is missing, is then below
5e-14 of the sum."""


class Moments(NamedTuple):
    """The sums over this shard's classes with one scale."""

    scale: float
    sums: Tensor
    """(N, K) fp64: ``Σ_j e^(scale·c_j)·c_j^k`` over the negatives."""
    maximum: Tensor
    """(N,) greatest cosine among them."""

    def total(self, scale: float | Tensor) -> Tensor | None:
        """Return the rows' sums (N,) fp64 with another scale, None if it is too far."""
        if isinstance(scale, Tensor) or not abs(scale - self.scale) <= _LONGEST_STEP:
            return None
        factors = [(scale - self.scale) ** k / math.factorial(k) for k in range(self.sums.shape[1])]
        return self.sums @ self.sums.new_tensor(factors)


Ahead = tuple[Moments, Tensor, Tensor]
"""The result of :func:`look_ahead`."""


def look_ahead(
    embeddings: Tensor, weight: Tensor, target: Tensor, scale: Tensor, sub_centers: int, backend: str, shard: Shard
) -> Ahead | None:
    """Return the moments with a scale, and all shards' negative log-sum-exps and target cosines (N,) for it.

    The result is None where the step needs two passes: on backends without the feature ``late_scale``, compiled, with
    sub-centers, with an update of the centers in the backward pass, and outside of the range of plain sums.
    """
    is_plain = sub_centers == 1 and shard.update is None and (weight.requires_grad or not torch.is_grad_enabled())
    if not is_plain or torch.compiler.is_compiling() or not backends.has(backend, "late_scale"):
        return None
    known = readable(scale)
    rows, centers = shard.all_rows(embeddings), shard.centers(weight)
    dtype, num_classes = compute_dtype(rows, centers), shard.num_classes or weight.shape[0]
    if isinstance(known, Tensor) or needs_shift(known + _LONGEST_STEP, num_classes, dtype):
        return None
    operators = stages(rows, centers, target)
    with torch.no_grad():
        moments = Moments(known, *operators.class_moments.default(rows, centers, target, known, backend))
        cosine = operators.target_cosine.default(rows, weight, shard.target_rows(target), backend)
        total, cosine = shard.ranks.sum_rows(moments.sums[:, 0], cosine.double())
        return moments, total.log(), cosine
