"""The heads of other libraries, each as the operations that its users run, from leaves to the mean loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_arcface import reference

from .truth import MARGIN, SCALE

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps embeddings (N, D), weight (C, D) and target (N,) to the mean loss ()."""


def eager(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute the head in plain PyTorch: this package's reference."""
    loss = reference.margin_softmax_loss(embeddings, weight, target, margin=MARGIN, scale=SCALE)
    assert isinstance(loss, Tensor)
    return loss


def plain(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute the loss as users write it: normalize, linear, acos, cos, scatter, cross_entropy."""
    cosine = F.linear(F.normalize(embeddings), F.normalize(weight))
    of_target = cosine.gather(1, target[:, None]).float().clamp(-1 + 1e-7, 1 - 1e-7)
    modified = (of_target.acos() + MARGIN.margin).cos()
    logits = SCALE * cosine.scatter(1, target[:, None], modified.to(cosine.dtype))
    return F.cross_entropy(logits.float(), target)


def plain_under_autocast(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute the same under autocast to bf16."""
    with torch.autocast(embeddings.device.type, torch.bfloat16):
        return plain(embeddings, weight, target)


def compiled(embeddings: Tensor, weight: Tensor, target: Tensor, loss: Loss = eager) -> Tensor:
    """Compute another loss through torch.compile.

    The reference's check of the labels' range reads a value, which breaks the graph once, before anything of size N×C.
    :func:`plain` is one graph that reads no value, so it can be a CUDA graph.
    """
    return _compiled(loss)(embeddings, weight, target)


@functools.cache
def _compiled(loss: Loss) -> Loss:
    # There is a graph for each combination of gradients or none, dtypes, static or dynamic shapes. Past the limit torch
    # would run eager code without a word.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(loss)


class _ShardSoftmax(torch.autograd.Function):
    """Cross-entropy of one shard's logits (N, C), which are overwritten with probabilities, then with the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        # The all-reduces of maximum, sum and loss between these lines are left out: they do nothing on one rank.
        maximum, _ = logits.max(dim=1, keepdim=True)
        logits.sub_(maximum).exp_()
        logits.div_(logits.sum(1, keepdim=True))
        rows = torch.where(target != -1)[0]
        loss = logits.new_zeros(logits.shape[0], 1)
        # Indexing by the shard's rows copies all its logits: once here, once in the backward.
        loss[rows] = logits[rows].gather(1, target[rows, None])
        ctx.save_for_backward(rows, logits, target)
        return loss.clamp_min_(1e-30).log_().mean().neg()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        rows, logits, target = ctx.saved_tensors
        one_hot = logits.new_zeros(rows.numel(), logits.shape[1])
        one_hot.scatter_(1, target[rows, None], 1)
        logits[rows] -= one_hot
        logits.div_(logits.shape[0])
        return logits * d_loss.item(), None


def insightface(embeddings: Tensor, weight: Tensor, target: Tensor, fp16: bool = False) -> Tensor:
    """Run the operations of arcface_torch's PartialFC_V2 with ArcFace on one rank.

    They are in its order, so memory traffic and peak are its own. The angles of the whole matrix are computed, and no
    gradient passes through the margin.
    """
    target = torch.where((target >= 0) & (target < weight.shape[0]), target, -1)  # the classes of this shard
    with torch.autocast(embeddings.device.type, dtype=torch.float16, enabled=fp16):
        logits = F.linear(F.normalize(embeddings), F.normalize(weight))
    logits = logits.float() if fp16 else logits
    logits = logits.clamp(-1, 1)
    with torch.no_grad():
        rows = torch.where(target != -1)[0]
        target_angle = logits[rows, target[rows]].arccos()
        logits.arccos_()
        logits[rows, target[rows]] = target_angle + 0.5
        logits.cos_()
    logits = logits * SCALE
    return _ShardSoftmax.apply(logits, target)


def metric_learning(weight: Tensor) -> tuple[Tensor, Loss]:
    """Return the parameter (D, C) and the loss of pytorch-metric-learning's ArcFaceLoss, with a copy of the centers."""
    from pytorch_metric_learning.losses import ArcFaceLoss

    # It is built for one class and then given its centers, so that no C × D initial ones are drawn.
    module = ArcFaceLoss(num_classes=1, embedding_size=weight.shape[1], margin=math.degrees(0.5), scale=SCALE)
    module.num_classes = weight.shape[0]
    module.W = torch.nn.Parameter(weight.detach().t().contiguous())

    def loss(embeddings: Tensor, _: Tensor, target: Tensor) -> Tensor:
        return module(embeddings, target)

    return module.W, loss


def linear_cross_entropy(embeddings: Tensor, weight: Tensor, target: Tensor, chunked: bool = False) -> Tensor:
    """Run torch's cross-entropy of a linear layer: no normalization, no margin.

    If ``chunked``, it holds the logits of a few rows at a time.
    """
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return F.linear_cross_entropy(embeddings, weight, target, options=options)


def cut_cross_entropy(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Run apple/ml-cross-entropy: the linear layer's cross-entropy without its logits.

    With ``filter_eps=None`` no gradient is skipped.
    """
    from cut_cross_entropy import linear_cross_entropy as loss  # type: ignore[import-not-found, unused-ignore]

    return loss(embeddings, weight, target, filter_eps=None)


def liger(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Run Liger's linear cross-entropy: the logits of a few rows at a time.

    Its forward pass computes the gradient of each input that requires one, even if autograd is off.
    """
    if not torch.is_grad_enabled():
        embeddings, weight = embeddings.detach(), weight.detach()
    from liger_kernel.transformers import (  # type: ignore[import-not-found, unused-ignore]
        LigerFusedLinearCrossEntropyLoss,
    )

    return LigerFusedLinearCrossEntropyLoss()(weight, embeddings, target)
