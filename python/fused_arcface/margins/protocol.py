"""The protocol of margins: a function of the target's cosine, and optional methods.

The heads call :func:`for_rows` and :func:`modulation`; margins return :class:`RowMargin` and :class:`Modulation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.checks import check_margin_rows

Margin = Callable[[Tensor], Tensor]
"""Any map of target cosines (N,) to modified cosines (N,) that autograd can differentiate."""


class RowMargin(NamedTuple):
    """The margin of one batch's rows, returned by ``for_rows``.

    A margin that depends on more than a cosine has a method ``for_rows(norms, counted) -> RowMargin``. The heads call
    it once in each forward pass and use the result in the margin's place. It gets the rows of all ranks, on every rank:

    - norms: (N,) norms of the embeddings, differentiable, fp32 (fp64 if an input is).
    - counted: (N,) bool, false for ignored rows.

    :class:`fused_arcface.AdaFace`, ``MagFace`` and ``ElasticFace`` are examples. A margin with running statistics
    derives from :class:`fused_arcface.margins.state.StatefulMargin`, which keeps them in fp32.

    A margin that depends on the label has a method ``for_labels(labels, counted) -> RowMargin`` instead. It is called
    at the same place:

    - labels: (N,) int64 global class ids, on any number of ranks and with a sample of the classes; 0 for ignored rows.
    - counted: as above.

    :class:`fused_arcface.ClassMargin` is an example; :class:`fused_arcface.margins.LabelMargin` makes one of a function
    of cosines and labels.
    """

    modify: Margin
    """Target cosines (N,) to modified cosines (N,)."""
    penalty: Tensor | None = None
    """(N,) added to the rows' losses."""


class Modulation(NamedTuple):
    """The change of one batch's negatives.

    A cosine ``c`` above its row's threshold becomes ``a·c² + b·c + d + e·√(1 - c²)``.

    A margin that changes the negatives has a method ``modulate(target_cosine, counted) -> Modulation``. The heads call
    it once in each forward pass, before the products with the class centers. It gets the rows of all ranks, on every
    rank:

    - target_cosine: (N,) without a gradient.
    - counted: (N,) bool, false for ignored rows.

    A margin with an attribute ``num_hardest`` (an int) gets a third argument, at the cost of one more product with the
    class centers: the ``num_hardest`` greatest cosines of each row's negatives, (N, num_hardest), descending, -inf
    where there are fewer. :class:`fused_arcface.InterTopK` uses them for its thresholds.

    A margin with four coefficients has an attribute ``turns_negatives`` that is true: not every backend has the term
    with the sine. :class:`fused_arcface.InterTopK` is an example.

    The comparison with the threshold has no gradient. :class:`fused_arcface.CurricularFace`, ``MVSoftmax`` and
    ``InterclassFilter`` are examples.
    """

    threshold: Tensor
    """(N,)"""
    coefficients: Tensor
    """(3,) fp64: a, b, d, and e is 0; or (4,): a, b, d, e."""
    greatest: float
    """Upper bound of the modulated cosines. The lower bound is -1."""
    steepest: float
    """Upper bound of the derivative's magnitude."""


class BinaryLosses(NamedTuple):
    """The negatives' losses of a margin that is a sum of logistic losses, one for each class, and no softmax.

    The loss of a negative at the angle θ is ``softplus(scale·(g(cos(θ - angle)) + offset) + bias)`` with
    ``g(z) = 2·((z + 1)/2)^exponent - 1``; exponent 1 is ``g(z) = z``.

    Such a margin has two methods: ``binary() -> BinaryLosses``, and ``row_losses(target_cosine, negative_sum, scale)``,
    which returns the rows' losses (N,) from their target cosines (N,) and the sums (N,) of their negatives' losses.
    :class:`fused_arcface.SphereFace2` and :class:`fused_arcface.UniFace` are examples.
    """

    exponent: float
    angle: float
    """In radians."""
    offset: float
    bias: Tensor
    """0-dim; it may have a gradient."""


def binary_numbers(margin: Margin, scale: float | Tensor) -> Tensor | None:
    """Return scale, exponent, angle, offset and bias (5,) fp64 of a margin with binary losses; None for another."""
    own: Callable[[], BinaryLosses] | None = getattr(margin, "binary", None)
    if own is None:
        return None
    *numbers, bias = own()
    one = torch.ones((), dtype=torch.float64, device=bias.device)
    return torch.stack([*(one * value for value in (scale, *numbers)), bias.double()])


def for_rows(margin: Margin, norms: Callable[[], Tensor], labels: Tensor, counted: Callable[[], Tensor]) -> RowMargin:
    """Return the margin of a batch's rows.

    Args:
        margin: any margin; without a method ``for_rows`` or ``for_labels`` it is returned as it is.
        norms: function that returns the rows' norms (N,), called only for a margin that needs them.
        labels: (N,) int64 global class ids, negative for rows without a class.
        counted: function that returns (N,) bool, false for ignored rows, called only for a margin that needs them.

    Raises:
        TypeError, ValueError: if the margin's penalty is not a tensor (N,) on the rows' device.
    """
    of_labels: Callable[[Tensor, Tensor], RowMargin] | None = getattr(margin, "for_labels", None)
    of_norms: Callable[[Tensor, Tensor], RowMargin] | None = getattr(margin, "for_rows", None)
    if of_labels is not None:
        of_rows = of_labels(labels.clamp(min=0), counted())
    elif of_norms is not None:
        of_rows = of_norms(norms(), counted())
    else:
        return RowMargin(margin)
    if of_rows.penalty is not None:
        check_margin_rows("penalty", of_rows.penalty, labels)
    return of_rows


def modulation(
    margin: Margin, target_cosine: Tensor, counted: Tensor, hardest: Callable[[int], Tensor]
) -> Modulation | None:
    """Return the change of a batch's negatives, with four coefficients; None if the margin leaves them alone.

    Args:
        margin: any margin.
        target_cosine: (N,) without a gradient.
        counted: (N,) bool, false for ignored rows.
        hardest: function that returns the greatest cosines (N, count) of each row's negatives, called only for a margin
            with ``num_hardest``.

    Raises:
        TypeError, ValueError: if the margin's threshold is not a tensor (N,) on the rows' device, or it has four
            coefficients without ``turns_negatives``.
    """
    own: Callable[..., Modulation] | None = getattr(margin, "modulate", None)
    if own is None:
        return None
    count = getattr(margin, "num_hardest", 0)
    change = own(target_cosine, counted, *([hardest(count)] if count else []))
    check_margin_rows("threshold", change.threshold, counted)
    if len(change.coefficients) > 3 and not getattr(margin, "turns_negatives", False):
        name = type(margin).__name__
        raise ValueError(f"{name}: modulate must return 3 coefficients, or turns_negatives must be true; got 4")
    coefficients = F.pad(change.coefficients, (0, 4 - len(change.coefficients)))
    # Not by _replace: torch.compile of torch 2.8 does not follow it.
    return Modulation(change.threshold, coefficients, change.greatest, change.steepest)
