"""Distillation over class centers: the divergence between two softmaxes over the same classes, without N×C logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .base.checks import check_embeddings, check_reduction, check_weight
from .base.compiler import check_not_transformed
from .base.dtypes import compute_dtype
from .base.normalize import stored_gradient, unit_gradient, unit_rows, without_autocast
from .base.once_differentiable import once_differentiable
from .base.ranges import POSITIVE, check_number

# Logits of one block of classes: 32 MiB in fp64 on a CPU, 16 times as many on a GPU, where each block costs launches.
_CPU_BLOCK, _GPU_BLOCK = 1 << 22, 1 << 26


def distillation_loss(
    embeddings: Tensor,
    weight: Tensor,
    teacher_embeddings: Tensor,
    teacher_weight: Tensor,
    *,
    scale: float = 64.0,
    teacher_scale: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the divergence of the student's softmax over the classes from the teacher's, never storing (N, C) logits.

    ``loss_i = Σ_j p_ij·(log p_ij - log q_ij)`` with ``p_i = softmax(teacher_scale·cos(teacher))`` and
    ``q_i = softmax(scale·cos(student))``, as ``kl_div`` of the logits (Hinton et al., arXiv:1503.02531). A lower scale
    is a higher temperature. The classes are taken by blocks in plain PyTorch, and again in the backward pass.

    The gradient is exact for all four tensors that require one: detach those of the teacher, or train both.

    Args:
        embeddings: (N, D) of the student, of any norm; fp32, fp64, bf16 or fp16.
        weight: (C, D) class centers of the student.
        teacher_embeddings: (N, E) of the same rows; E may differ from D.
        teacher_weight: (C, E) centers of the same classes in the same order.
        scale: scale of the student's logits, finite and > 0.
        teacher_scale: scale of the teacher's logits; None: ``scale``.
        reduction: ``"mean"`` over the rows, ``"sum"`` or ``"none"``.

    Returns:
        The loss, a scalar or (N,), fp32 (fp64 if an input is).

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if a shape, a device, a number or an option is wrong.

    >>> import torch
    >>> x, w = torch.eye(2), torch.eye(2)
    >>> distillation_loss(x, w, x, w).item(), distillation_loss(x, w, x, -w, scale=1.0)
    (0.0, tensor(0.4621))
    """
    check_not_transformed("distillation_loss")
    check_weight("weight", weight)
    check_weight("teacher_weight", teacher_weight)
    check_embeddings(embeddings, weight)
    check_embeddings(teacher_embeddings, teacher_weight, name="teacher_embeddings")
    if len(teacher_weight) != len(weight):
        raise ValueError(f"teacher_weight must have the classes of weight, C={len(weight)}; got {len(teacher_weight)}")
    if len(teacher_embeddings) != len(embeddings):
        raise ValueError(f"teacher_embeddings must have N={len(embeddings)} rows; got {len(teacher_embeddings)}")
    if teacher_weight.device != weight.device:
        raise ValueError(f"teacher_weight must be on weight's device {weight.device}; got {teacher_weight.device}")
    check_number("scale", scale, POSITIVE)
    if teacher_scale is not None:
        check_number("teacher_scale", teacher_scale, POSITIVE)
    check_reduction(reduction)
    one = torch.ones((), dtype=torch.float64, device="cpu")
    scales = torch.stack([scale * one, (scale if teacher_scale is None else teacher_scale) * one])
    with without_autocast(embeddings.device):
        loss: Tensor = _Divergence.apply(embeddings, weight, teacher_embeddings, teacher_weight, scales)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


_Two = tuple[Tensor, Tensor]
"""A tensor of the student, and one of the teacher."""


def _blocks(unit: _Two, weights: _Two, scales: Tensor) -> Iterator[tuple[slice, _Two, _Two]]:
    """Yield the classes by blocks: their rows, unit centers (B, D) and (B, E), and logits (N, B).

    ``unit`` has the unit rows (N, D) and (N, E).
    """
    dtype, (scale, teacher_scale) = unit[0].dtype, scales.tolist()
    limit = _CPU_BLOCK if unit[0].device.type == "cpu" else _GPU_BLOCK
    size = max(limit // max(len(unit[0]), 1), 1)
    for start in range(0, len(weights[0]), size):
        rows = slice(start, start + size)
        student, teacher = (unit_rows(each[rows].to(dtype)) for each in weights)
        logits = scale * (unit[0] @ student.T), teacher_scale * (unit[1] @ teacher.T)
        yield rows, (student, teacher), logits


# Operators, because torch.compile would unroll the loop over blocks. The scales of student and teacher are a tensor,
# (2,) fp64 on the CPU, so that a scale that changes makes no new graph.
torch.library.define(
    "fused_arcface::divergence",
    "(Tensor x, Tensor w, Tensor teacher_x, Tensor teacher_w, Tensor scales) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fused_arcface::divergence_grad",
    "(Tensor x, Tensor w, Tensor teacher_x, Tensor teacher_w, Tensor scales, Tensor lse, Tensor teacher_lse, "
    "Tensor mean, Tensor d_loss, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _dtype(x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor) -> torch.dtype:
    """Return the dtype of the loss, in which the products are taken."""
    return torch.promote_types(compute_dtype(x, w), compute_dtype(teacher_x, teacher_w))


@torch.library.impl("fused_arcface::divergence", "default")
def _divergence(
    x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows' divergences and three numbers of each row for :func:`_divergence_grad`, (N,) each."""
    dtype = _dtype(x, w, teacher_x, teacher_w)
    unit = unit_rows(x.to(dtype)), unit_rows(teacher_x.to(dtype))
    lowest = x.new_full((len(x),), -torch.inf, dtype=torch.float64)
    greatest, teacher_greatest = lowest, lowest
    total, teacher_total, difference = (torch.zeros_like(lowest) for _ in range(3))
    for _, _, both in _blocks(unit, (w, teacher_w), scales):
        logits, teacher_logits = (each.double() for each in both)
        # If a block has a greater logit, the sums so far are rescaled.
        new, teacher_new = (
            torch.maximum(old, each.amax(1)) for old, each in ((greatest, logits), (teacher_greatest, teacher_logits))
        )
        total = total * (greatest - new).exp() + (logits - new[:, None]).exp().sum(1)
        shares = (teacher_logits - teacher_new[:, None]).exp()
        factor = (teacher_greatest - teacher_new).exp()
        teacher_total = teacher_total * factor + shares.sum(1)
        difference = difference * factor + (shares * (teacher_logits - logits)).sum(1)
        greatest, teacher_greatest = new, teacher_new
    lse, teacher_lse = total.log() + greatest, teacher_total.log() + teacher_greatest
    mean = difference / teacher_total  # of the logits' difference, under the teacher's softmax
    return (mean - teacher_lse + lse).to(dtype), lse, teacher_lse, mean


@torch.library.register_fake("fused_arcface::divergence")
def _divergence_fake(
    x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty(x.shape[0], dtype=_dtype(x, w, teacher_x, teacher_w))
    lse, teacher_lse, mean = (torch.empty_like(loss, dtype=torch.float64) for _ in range(3))
    return loss, lse, teacher_lse, mean


@torch.library.impl("fused_arcface::divergence_grad", "default")
def _divergence_grad(
    x: Tensor,
    w: Tensor,
    teacher_x: Tensor,
    teacher_w: Tensor,
    scales: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
    mean: Tensor,
    d_loss: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by the first four arguments, (0,) for those that are not wanted."""
    dtype, inputs, weights = d_loss.dtype, (x, teacher_x), (w, teacher_w)
    unit = unit_rows(x.to(dtype)), unit_rows(teacher_x.to(dtype))
    d_unit = [torch.zeros_like(each) for each in unit]
    d_weights = [
        torch.empty_like(each) if want else each.new_empty(0) for each, want in zip(weights, wanted[1::2], strict=True)
    ]
    for rows, centers, both in _blocks(unit, weights, scales):
        logits, teacher_logits = (each.double() for each in both)
        share, teacher_share = (logits - lse[:, None]).exp(), (teacher_logits - teacher_lse[:, None]).exp()
        d_logits = share - teacher_share, teacher_share * (teacher_logits - logits - mean[:, None])
        for k in range(2):
            d_cosine = (scales[k].item() * d_loss[:, None] * d_logits[k]).to(dtype)
            d_unit[k] += d_cosine @ centers[k]
            if wanted[2 * k + 1]:
                part = weights[k][rows]
                d_part = unit_gradient(d_cosine.T @ unit[k], part.to(dtype))
                d_weights[k][rows] = stored_gradient(d_part, part)
    d_x, d_teacher = (
        stored_gradient(unit_gradient(d_unit[k], inputs[k].to(dtype)), inputs[k])
        if wanted[2 * k]
        else inputs[k].new_empty(0)
        for k in range(2)
    )
    return d_x, d_weights[0], d_teacher, d_weights[1]


@torch.library.register_fake("fused_arcface::divergence_grad")
def _divergence_grad_fake(
    x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor, scales: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one, two, three, four = (
        torch.empty_like(each) if want else each.new_empty(0)
        for each, want in zip((x, w, teacher_x, teacher_w), rest[-1], strict=True)
    )
    return one, two, three, four


class _Divergence(torch.autograd.Function):
    """The rows' divergences (N,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor, scales: Tensor) -> Tensor:
        inputs = x, w, teacher_x, teacher_w, scales
        loss, *of_rows = torch.ops.fused_arcface.divergence(*inputs)
        ctx.save_for_backward(*inputs, *of_rows)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], d_loss: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:4])
        with without_autocast(d_loss.device):
            gradients = torch.ops.fused_arcface.divergence_grad(*saved, d_loss, wanted)
        return *(each if want else None for each, want in zip(gradients, wanted, strict=True)), None
