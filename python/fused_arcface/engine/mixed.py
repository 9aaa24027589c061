"""Rows with two labels, as mixup and CutMix make them, in one pass over the classes.

The loss is ``share·CE(first) + (1 - share)·CE(second)``. The pass leaves out the nearer of the two targets, say b, and
counts the other one, a, among the negatives: ``T_b = Σ_{j≠b} e_j`` with ``e_j = exp(s·cos_j)``. That is all CE(b)
needs. For CE(a) the sum is ``Σ_{j≠a} e_j = T_b + (e_b - e_a)``. Both terms are positive, as b is the nearer one, so
nothing cancels. The other way round the difference would be negative, and its rounding larger than the sum.

The cosine with a depends on a row of weight that the pass takes for a negative. Its gradient is a second coefficient of
the row, which :func:`add_second_gradient` and :func:`update_both` bring to the class centers in O(N·D) and O(N²·D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.dtypes import compute_dtype
from ..base.normalize import stored_gradient, unit_gradient, unit_rows
from .ops import for_numbers, reads_for_free
from .targets import Rows
from .terms import ABSENT, IGNORED, CenterStep, Negatives, RowGradients, SecondTarget


class Nearer(NamedTuple):
    """The two targets of each row, the nearer one first."""

    rows: Tensor
    """(N,) the nearer target as a row of the centers that the step uses; ``ABSENT`` where it is not on this rank."""
    others: Tensor
    """(N,) the other target likewise; ``ABSENT`` also where the row has only one."""
    swapped: Tensor
    """(N,) bool: the nearer target is the second label."""
    two: Tensor
    """(N,) bool: the row has two different labels, neither of them ignored."""


def nearer_first(rows: Rows, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Nearer:
    """Order the two targets of each row by their cosines.

    Args:
        rows: the facts about the rows, with a second target.
        first: cosines (N,) with the first target, and that target as a row of the centers (N,).
        second: the same for the second target.
    """
    assert rows.second is not None
    has_first, has_second = rows.target.label != IGNORED, rows.second.label != IGNORED
    swapped = has_second & (~has_first | (second[0] > first[0]))
    two = has_first & has_second & (rows.target.label != rows.second.label)
    others = torch.where(swapped, first[1], second[1]).masked_fill(~two, ABSENT)
    return Nearer(torch.where(swapped, second[1], first[1]), others, swapped, two)


def of_both(
    order: Nearer, lse: Tensor, cosine: Tensor, other_cosine: Tensor, scale: float | Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the negative log-sum-exp (N,) and target cosine (N,) of the first label, and those of the second.

    ``lse`` (N,) is over all classes but the nearer target, which has the ``cosine`` (N,).
    """
    other_cosine = torch.where(order.two, other_cosine, cosine)
    nearer_logit, other_logit = scale * cosine, scale * other_cosine
    top = torch.maximum(lse, nearer_logit).detach()  # each exponential is at most 1, their sum about 1 or more
    total = (lse - top).exp() + (nearer_logit - top).exp() - (other_logit - top).exp()
    other_lse = torch.where(order.two, top + torch.where(order.two, total, 1).log(), lse)
    return (
        (torch.where(order.swapped, other_lse, lse), torch.where(order.swapped, other_cosine, cosine)),
        (torch.where(order.swapped, lse, other_lse), torch.where(order.swapped, cosine, other_cosine)),
    )


def add_second_gradient(d_centers: Tensor, rows: Tensor, centers: Tensor, second: SecondTarget) -> None:
    """Add to the gradient by centers (K, D), in place, the part of the rows' (N, D) second targets."""
    if centers.shape[0] == 0:
        return
    index = second.row.clamp(min=0)
    coefficient = second.coefficient.masked_fill(second.row < 0, 0)[:, None]
    dtype = compute_dtype(rows, centers)
    own = centers.index_select(0, index)
    gradient = unit_gradient(coefficient * unit_rows(rows.to(dtype)), own.to(dtype))
    d_centers.index_add_(0, index, stored_gradient(gradient, own))


def update_both(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    gradients: RowGradients,
    step: CenterStep,
    backend: str,
    negatives: Negatives,
    second: SecondTarget | None,
) -> None:
    """Make one step of SGD on the class centers, with the gradient of the rows' second targets.

    The kernels know one target for each row. So the centers of second targets, at most N, are put back after the step,
    and a second step changes them alone. Its batch has each row twice, once for each target.
    """

    def update(embeddings: Tensor, target: Tensor, gradients: RowGradients, step: CenterStep) -> None:
        operator, (scale,) = for_numbers(torch.ops.fused_arcface.update_centers, gradients.scale)
        operator(embeddings, weight, target, scale, *gradients[1:], *step, backend, **negatives._asdict())

    if second is None or weight.shape[0] == 0 or target.shape[0] == 0:
        update(embeddings, target, gradients, step)
        return
    groups = _ascending(torch.where(second.row < 0, -1, second.row // negatives.sub_centers))
    sub_centers = torch.arange(negatives.sub_centers, device=target.device)
    is_row = (groups < _NONE).repeat_interleave(negatives.sub_centers)
    row = (groups.masked_fill(groups == _NONE, 0)[:, None] * negatives.sub_centers + sub_centers).flatten()
    chosen = row.masked_fill(~is_row, _NONE)  # among the centers of the step
    row = torch.where(is_row, row if step.classes is None else step.classes.index_select(0, row), weight.shape[0])
    restore = [_keep(each, row) for each in (weight, *step.state.values())]
    update(embeddings, target, gradients, step)
    for put_back in restore:
        put_back()
    scale, lse, negative, of_target = gradients
    targets = torch.cat([_position(chosen, target), _position(chosen, second.row)])
    twice = RowGradients(
        scale,
        torch.cat([lse, lse]),
        torch.cat([negative, torch.zeros_like(negative)]),
        torch.cat([of_target, second.coefficient.to(of_target.dtype)]),
    )
    update(torch.cat([embeddings, embeddings]), targets, twice, step._replace(classes=row))


_NONE = 2**62
"""An entry of a list that is padding."""


def _ascending(numbers: Tensor) -> Tensor:
    """Return the numbers (N,) that are not negative, ascending and each once.

    On a GPU, where their count would be a wait, the end of the list is padding.
    """
    if reads_for_free(numbers):
        return numbers[numbers >= 0].unique()
    ordered = numbers.sort().values
    repeated = torch.cat([torch.zeros_like(ordered[:1], dtype=torch.bool), ordered[1:] == ordered[:-1]])
    return ordered.masked_fill(repeated | (ordered < 0), _NONE).sort().values


def _position(ascending: Tensor, numbers: Tensor) -> Tensor:
    """Return the position (N,) of each number in an ascending list, ``ABSENT`` if it is not there."""
    if ascending.shape[0] == 0:
        return torch.full_like(numbers, ABSENT)
    found = torch.searchsorted(ascending, numbers).clamp(max=ascending.shape[0] - 1)
    return torch.where((numbers >= 0) & (ascending[found] == numbers), found, ABSENT)


def _keep(tensor: Tensor, row: Tensor) -> Callable[[], Any]:
    """Return a function that gives a tensor's rows back what they hold now. Rows past its end are padding."""
    # Padding repeats the first row, and writes the same once more. If that is padding too, nothing is to be written.
    padded = row >= tensor.shape[0]
    row = torch.where(padded, row[:1], row).clamp(max=tensor.shape[0] - 1)
    kept, nothing = tensor[row], padded[:1]
    return lambda: tensor.index_put_((row,), torch.where(nothing[:, None], tensor[row], kept))
