"""The stages in plain PyTorch, logits materialised: any device, and the definition of what a backend computes.

Shapes, in every backend: embeddings (N, D), weight (C, D), target (N,) int64, an index into this weight, or negative
where the row's target is not here (``ops.IGNORED``, ``ops.INVALID``). Results have the compute dtype: the promoted one of both, at least fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..keyed import rounding_bits
from ..margins import CombinedMargin
from ..ops import IGNORED, INVALID, MOMENTUM_BLOCK, CentreStep, compute_dtype

_P = ParamSpec("_P")
_R = TypeVar("_R")


def unavailable() -> str | None:
    return None


def _in_full_precision(stage: Callable[_P, _R]) -> Callable[_P, _R]:
    """The stage with autocast off: bf16 cosines would cost a quarter of a logit."""

    @functools.wraps(stage)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        embeddings = args[0]
        assert isinstance(embeddings, Tensor)
        with torch.autocast(embeddings.device.type, enabled=False):
            return stage(*args, **kwargs)

    return run


def _cosines(embeddings: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit embeddings (N, D), unit centres (C, D), their cosines (N, C) and where those are a row's target (N, C)."""
    dtype = compute_dtype(embeddings, weight)
    unit_x, unit_w = unit_rows(embeddings.to(dtype)), unit_rows(weight.to(dtype))
    is_target = target[:, None] == torch.arange(weight.shape[0], device=target.device)
    return unit_x, unit_w, unit_x @ unit_w.T, is_target


@_in_full_precision
def class_max(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """(N,) greatest cosine of each row with a class that is not its target; -inf where there is none."""
    _, _, cosine, is_target = _cosines(embeddings, weight, target)
    return cosine.masked_fill(is_target, -torch.inf).amax(1)


@_in_full_precision
def class_stats(
    embeddings: Tensor, weight: Tensor, target: Tensor, scale: float, shift: Tensor | None, with_centre_sum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of each row's negatives: sum and maximum, and the sum of the class centres weighted alike.

    With ``e_ij = exp(scale·cos_ij - shift_i)`` for ``j != target_i`` (shift ``(N,)`` fp64, none is zero), else 0:
    ``Σ_j e_ij`` (N,), ``max_j cos_ij`` (N,), ``Σ_j e_ij ŵ_j`` (N, D), the last empty unless asked for.
    """
    _, unit_w, cosine, is_target = _cosines(embeddings, weight, target)
    logits = scale * cosine.double() - (0 if shift is None else shift[:, None])
    exponentials = logits.exp().to(cosine.dtype).masked_fill(is_target, 0)
    centre_sum = exponentials @ unit_w if with_centre_sum else exponentials.new_empty(0)
    return exponentials.sum(1), cosine.masked_fill(is_target, -torch.inf).amax(1), centre_sum


@_in_full_precision
def weight_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
) -> Tensor:
    """(C, D) gradient by the class centres, in weight's dtype, from each row's coefficients (N,) and lse (N,) fp64.

    The derivative by ``cos_ij`` is ``negative_coefficient_i·exp(scale·cos_ij - lse_i)``, the target's
    ``target_coefficient_i``.
    """
    gradient = _exact_weight_grad(embeddings, weight, target, scale, lse, negative_coefficient, target_coefficient)
    return torch.empty_like(weight).copy_(gradient)  # laid out like weight, as the operator's fake has it


def _exact_weight_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
) -> Tensor:
    """:func:`weight_grad` in the compute dtype."""
    unit_x, _, cosine, is_target = _cosines(embeddings, weight, target)
    probability = (scale * cosine.double() - lse[:, None]).exp().to(cosine.dtype)
    d_cosine = torch.where(is_target, target_coefficient[:, None], negative_coefficient[:, None] * probability)
    return unit_gradient(d_cosine.T @ unit_x, weight.to(unit_x.dtype))


@_in_full_precision
def update_centres(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
    step: CentreStep,
) -> None:
    """One step on the class centres in place of :func:`weight_grad`, whose other arguments these are."""
    if not step.active:
        return
    rows = torch.arange(weight.shape[0], device=weight.device) if step.classes is None else step.classes
    centres = weight[rows]
    gradient = _exact_weight_grad(embeddings, centres, target, scale, lse, negative_coefficient, target_coefficient)
    value = centres.to(gradient.dtype)
    velocity = gradient + step.weight_decay * value
    bits = rounding_bits(step.rounding_key, rows + step.class_start, weight.shape[1])
    if step.momentum_buffer is not None:
        buffer, scales = step.momentum_buffer, step.momentum_scale
        old = buffer[rows].to(value.dtype)
        if scales is not None:
            old *= scales[rows].to(value.dtype).repeat_interleave(MOMENTUM_BLOCK, 1)[:, : weight.shape[1]]
        velocity += step.momentum * old
        if scales is None:
            buffer[rows] = _round_stochastically(velocity, buffer.dtype, bits >> 16)
        else:
            buffer[rows], scales[rows] = _quantise(velocity, bits >> 16)
    weight[rows] = _round_stochastically(value - step.lr * velocity, weight.dtype, bits & 0xFFFF)


def _round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Values (R, D) in ``dtype``; in bf16 up with the probability of the distance from the value below, by 16 bits (R,
    D)."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    words = values.float().view(torch.int32)
    return ((words + torch.where(values.isfinite(), bits.int(), 0)) & -65536).view(torch.float32).to(dtype)


def _quantise(values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (R, D) and the units (R, ceil(D / 64)) fp32 of each 64 columns: the largest magnitude over 127; rounded by
    ``bits``."""
    dim = values.shape[1]
    blocks = torch.nn.functional.pad(values, (0, -dim % MOMENTUM_BLOCK)).unflatten(1, (-1, MOMENTUM_BLOCK))
    largest = blocks.abs().amax(2)
    units = torch.where(largest > 1e-35, largest.float() / 127, 0)
    inverse = torch.where(units > 0, 1 / units.to(values.dtype), 0).repeat_interleave(MOMENTUM_BLOCK, 1)[:, :dim]
    rounded = (values * inverse + (bits.to(values.dtype) + 0.5) / 65536).floor()
    return rounded.clamp(-127, 127).to(torch.int8), units


def _norms(rows: Tensor) -> Tensor:
    """(R, 1) norms of rows (R, D), squared and summed in fp64: fp32's would overflow from 2e19 on."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).to(rows.dtype)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (R, D) divided by ``max(norm, 1e-12)``."""
    return rows / _norms(rows).clamp(min=1e-12)


def _unit_targets(weight: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit centres of the rows' targets, (N, D); zeros where the target is not here."""
    if weight.shape[0] == 0:
        return weight.new_zeros(target.shape[0], weight.shape[1], dtype=dtype)
    unit_w = unit_rows(weight.index_select(0, target.clamp(min=0)).to(dtype))
    return unit_w.masked_fill((target < 0)[:, None], 0)


def target_cosine(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """(N,) cosine of each row with its target's centre; 0 where target is ``IGNORED``, NaN where it is ``INVALID``."""
    dtype = compute_dtype(embeddings, weight)
    cosine = (unit_rows(embeddings.to(dtype)) * _unit_targets(weight, target, dtype)).sum(1).clamp(-1, 1)
    return cosine.masked_fill(target == IGNORED, 0).masked_fill(target == INVALID, torch.nan)


def unit_embedding_grad(
    weight: Tensor, target: Tensor, mean_centre: Tensor, negative_coefficient: Tensor, target_coefficient: Tensor
) -> Tensor:
    """(N, D) gradient by the unit embeddings, as far as these classes make it, in mean_centre's dtype.

    mean_centre (N, D) is the softmax-weighted mean of the unit centres over the row's negatives; the coefficients
    (N,) are those of :func:`weight_grad`.
    """
    unit_w = _unit_targets(weight, target, mean_centre.dtype)
    of_target = target_coefficient.masked_fill(target < 0, 0)[:, None] * unit_w
    return negative_coefficient[:, None] * mean_centre + of_target


def embedding_grad(d_unit: Tensor, embeddings: Tensor) -> Tensor:
    """(N, D) gradient by the embeddings, in their dtype, from that by the unit embeddings.

    In fp16 finite numbers saturate, as a zero row's would overflow.
    """
    gradient = unit_gradient(d_unit, embeddings.to(d_unit.dtype))
    if embeddings.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        gradient = torch.where(gradient.isfinite(), gradient.clamp(-limit, limit), gradient)
    return torch.empty_like(embeddings).copy_(gradient)


def margin_loss(
    negative_lse: Tensor,
    target_cosine: Tensor,
    scale: float,
    m1: float,
    m2: float,
    m3: float,
    boundary: str,
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each row's loss, its full log-sum-exp, and the loss's derivatives by negative_lse and by target_cosine, all (N,).

    The margin by its numbers (:func:`fused_arcface.margins.parameters`).
    """
    with torch.enable_grad():
        lse, cosine = negative_lse.detach().requires_grad_(), target_cosine.detach().requires_grad_()
        angular = None if boundary == "linear" else CombinedMargin(m1, m2, m3, boundary, gradient)  # type: ignore[arg-type]
        modified = cosine - m3 if angular is None else angular(cosine)
        loss = F.softplus(lse - scale * modified, threshold=40)
        d_lse, d_cosine = torch.autograd.grad(loss.sum(), (lse, cosine))
    return loss.detach(), torch.logaddexp(lse, scale * modified).detach(), d_lse, d_cosine


def unit_gradient(d_unit: Tensor, row: Tensor) -> Tensor:
    """Gradient by ``row`` (R, D) from that by ``row / max(|row|, 1e-12)``, same shape."""
    norm = _norms(row)
    unit = row / norm.clamp(min=1e-12)
    along = (unit * d_unit).sum(1, keepdim=True).masked_fill(norm < 1e-12, 0)
    return (d_unit - unit * along) / norm.clamp(min=1e-12)
