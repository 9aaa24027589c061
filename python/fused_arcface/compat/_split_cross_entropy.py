"""Cross-entropy over logits whose classes are split over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..parallel.ranks import Ranks


class SplitCrossEntropy(torch.autograd.Function):
    """Each row's cross-entropy (N,) over the logits of all shards.

    This rank has the logits (N, C) of its shard and the target's column (N,), -1 if it is in another shard.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ranks: Ranks) -> Tensor:
        rows = (target >= 0).nonzero().squeeze(1)
        local = logits.new_full((logits.shape[0],), -torch.inf) if logits.shape[1] == 0 else logits.amax(1)
        maximum = ranks.max(local)
        exponentials = (logits - maximum[:, None]).exp()
        target_logit = torch.zeros_like(maximum)
        target_logit[rows] = logits[rows, target[rows]]
        total, target_logit = ranks.sum(torch.stack([exponentials.sum(1), target_logit])).unbind()
        ctx.save_for_backward(exponentials / total[:, None], rows, target)
        return total.log() + maximum - target_logit

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None, None]:
        probabilities, rows, target = ctx.saved_tensors
        d_logits = probabilities * d_loss[:, None]
        d_logits[rows, target[rows]] -= d_loss[rows]
        return d_logits, None, None
