"""The margin family: what becomes of the target's cosine before the softmax. Called on ``(N,)`` vectors only.

With ``θ`` the angle between an embedding and its own class center and ``φ = m1·θ + m2``, a margin replaces ``cos θ`` by
``ψ(θ) - m3``. ``cos φ`` stops falling at ``φ = π``, so an angular margin names a ``boundary``, how it goes on there:

========  =============================================  ======================================================
``none``  ``cos φ``                                      not monotone past π
``hard``  ``cos φ`` up to π, ``cos θ - m2·sin m2`` past  what most published heads do; it jumps at φ = π
``fold``  ``(-1)^k cos φ - 2k``, ``k = ⌊φ/π⌋``           monotone and continuous, SphereFace's continuation
``clip``  ``cos(min(φ, π))``                             constant past π: no gradient there
``easy``  ``cos φ`` where ``cos θ > 0``, else ``cos θ``  ArcFace's "easy margin"; it jumps at θ = π/2
========  =============================================  ======================================================

``gradient="exact"`` is the derivative ``m1·sin φ / sin θ``, with ``sin θ`` replaced by :data:`SIN_FLOOR` within 0.6° of
0 and π, where the true one is unbounded: ``|ψ'| <= m1 / SIN_FLOOR`` everywhere. ``gradient="straight_through"`` takes 1
for it, as insightface has trained since December 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..base.checks import check_margin_rows

Boundary = Literal["none", "hard", "fold", "clip", "easy"]
GradientMode = Literal["exact", "straight_through"]
Form = Literal["paper", "code"]
"""Which form of a method is meant where its paper and its authors' code differ."""

SIN_FLOOR = 1e-2
"""Least ``sin θ`` that a derivative is divided by: the exact gradient is bounded by ``m1 / SIN_FLOOR``."""


class _Angle(torch.autograd.Function):
    """``θ = arccos(cosine)``, accurate near ±1, defined (clamped) outside [-1, 1], with the bounded derivative."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine)
        cosine = cosine.clamp(-1, 1)
        return torch.atan2(((1 - cosine) * (1 + cosine)).sqrt(), cosine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (cosine,) = ctx.saved_tensors
        # Differentiable operations only: the reference is twice differentiable through here.
        return -grad / ((1 - cosine) * (1 + cosine)).clamp(min=SIN_FLOOR**2).sqrt()


def angle(cosine: Tensor) -> Tensor:
    """Angle in radians of a cosine, ``(N,)`` to ``(N,)``, with a derivative that is bounded by ``1 / SIN_FLOOR``."""
    return _Angle.apply(cosine)


def _straight_through(value: Tensor, cosine: Tensor) -> Tensor:
    """``value`` with the derivative of ``cosine``."""
    return value.detach() + (cosine - cosine.detach())


def past_boundary(phi: Tensor, cosine: Tensor, drop: Tensor | float, boundary: str) -> Tensor:
    """``ψ`` of ``φ``, ``(N,)``: the table at the head of this module; ``drop`` is ``m2·sin m2``."""
    if boundary == "none":
        return phi.cos()
    if boundary == "hard":
        return torch.where(phi <= math.pi, phi.cos(), cosine - drop)
    if boundary == "fold":
        k = (phi.detach() / math.pi).floor()
        return (1 - 2 * (k % 2)) * phi.cos() - 2 * k
    if boundary == "clip":
        return phi.clamp(max=math.pi).cos()
    return torch.where(cosine > 0, phi.cos(), cosine)


def check_number(owner: object, name: str, value: object, rule: str, low: float, high: float, closed: bool) -> None:
    label = f"{type(owner).__name__}: {name}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{label} must be a number; got {type(value).__name__}")
    if not (low <= value < high or (closed and value == high)):
        raise ValueError(f"{label} must be in {rule}; got {value}")


def check_angle(owner: object, name: str, value: object) -> None:
    check_number(owner, name, value, "[0, π) radians", 0, math.pi, closed=False)


def _check_m1(owner: object, name: str, value: object) -> None:
    check_number(owner, name, value, "[1, 4]", 1, 4, closed=True)


def _check_m3(owner: object, name: str, value: object) -> None:
    check_number(owner, name, value, "[0, 2)", 0, 2, closed=False)


def check_choice(owner: object, name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        listed = ", ".join(repr(choice) for choice in get_args(choices))
        raise ValueError(f"{type(owner).__name__}: {name} must be one of {listed}; got {value!r}")


@dataclass(frozen=True)
class CombinedMargin:
    """``s·(cos(m1·θ + m2) - m3)``: SphereFace's, ArcFace's and CosFace's margins at once (ArcFace, eq. 4).

    Args:
        m1: multiplies the angle; in [1, 4].
        m2: added to the angle, in radians; in [0, π).
        m3: taken from the cosine; in [0, 2).
        boundary: ``"none"``, ``"hard"``, ``"fold"``, ``"clip"`` or ``"easy"``, see :mod:`fused_arcface.margins`.
        gradient: ``"exact"`` or ``"straight_through"``.

    Raises:
        TypeError: a number that is none.
        ValueError: a value out of its range.

    >>> import torch
    >>> CombinedMargin(m1=1.0, m2=0.3, m3=0.2)(torch.tensor([0.5]))
    tensor([0.0217])
    """

    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0
    boundary: Boundary = "hard"
    gradient: GradientMode = "exact"

    def __post_init__(self) -> None:
        _check_m1(self, "m1", self.m1)
        check_angle(self, "m2", self.m2)
        _check_m3(self, "m3", self.m3)
        check_choice(self, "boundary", self.boundary, Boundary)
        check_choice(self, "gradient", self.gradient, GradientMode)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Modified cosines, ``(N,)``, of the target cosines, ``(N,)``."""
        phi = self.m1 * angle(target_cosine) + self.m2
        value = past_boundary(phi, target_cosine, self.m2 * math.sin(self.m2), self.boundary) - self.m3
        return _straight_through(value, target_cosine) if self.gradient == "straight_through" else value


@dataclass(frozen=True)
class ArcFace:
    """``s·cos(θ + margin)``, the additive angular margin (ArcFace, eq. 3, arXiv:1801.07698).

    Args:
        margin: in radians; in [0, π).
        boundary: what happens past ``θ + margin = π``, see :mod:`fused_arcface.margins`. The default ``"hard"`` jumps
            there, as most published heads do; ``"fold"`` is monotone and continuous.
        gradient: ``"exact"`` or ``"straight_through"``.

    Raises:
        TypeError: a margin that is not a number.
        ValueError: a value out of its range.

    >>> import torch
    >>> ArcFace(margin=0.5)(torch.tensor([1.0, 0.0]))
    tensor([ 0.8776, -0.4794])
    """

    margin: float = 0.5
    boundary: Boundary = "hard"
    gradient: GradientMode = "exact"

    def __post_init__(self) -> None:
        check_angle(self, "margin", self.margin)
        check_choice(self, "boundary", self.boundary, Boundary)
        check_choice(self, "gradient", self.gradient, GradientMode)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Modified cosines, ``(N,)``, of the target cosines, ``(N,)``."""
        return CombinedMargin(1.0, self.margin, 0.0, self.boundary, self.gradient)(target_cosine)


@dataclass(frozen=True)
class SphereFace:
    """``s·cos(margin·θ)``, the multiplicative angular margin with its monotone continuation (arXiv:1704.08063, eq. 7).

    Args:
        margin: a factor, in [1, 4].
        gradient: ``"exact"`` or ``"straight_through"``.

    Raises:
        TypeError: a margin that is not a number.
        ValueError: a value out of its range.

    >>> import torch
    >>> SphereFace(margin=2.0)(torch.tensor([1.0, 0.0]))
    tensor([ 1., -1.])
    """

    margin: float = 1.7
    gradient: GradientMode = "exact"

    def __post_init__(self) -> None:
        _check_m1(self, "margin", self.margin)
        check_choice(self, "gradient", self.gradient, GradientMode)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Modified cosines, ``(N,)``, of the target cosines, ``(N,)``."""
        return CombinedMargin(self.margin, 0.0, 0.0, "fold", self.gradient)(target_cosine)


@dataclass(frozen=True)
class CosFace:
    """``s·(cos θ - margin)``, the additive cosine margin (CosFace, eq. 4, arXiv:1801.09414).

    Args:
        margin: taken from the cosine; in [0, 2).

    Raises:
        TypeError: a margin that is not a number.
        ValueError: a margin out of its range.

    >>> import torch
    >>> CosFace(margin=0.35)(torch.tensor([1.0, 0.0]))
    tensor([ 0.6500, -0.3500])
    """

    margin: float = 0.35

    def __post_init__(self) -> None:
        _check_m3(self, "margin", self.margin)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Modified cosines, ``(N,)``, of the target cosines, ``(N,)``."""
        return target_cosine - self.margin


@dataclass(frozen=True)
class NormSoftmax:
    """``s·cos θ``: normalized softmax without a margin (NormFace, arXiv:1704.06369).

    >>> import torch
    >>> NormSoftmax()(torch.tensor([0.5]))
    tensor([0.5000])
    """

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """The target cosines, ``(N,)``, as they are."""
        return target_cosine


def parameters(margin: object) -> tuple[float, float, float, str, str] | None:
    """``(m1, m2, m3, boundary, gradient)`` of a margin of this module, None for any other callable.

    The boundary of a margin that leaves the angle alone is called ``"linear"``: ``cos θ - m3``, derivative 1
    everywhere.

    >>> parameters(ArcFace(0.3)), parameters(abs)
    ((1.0, 0.3, 0.0, 'hard', 'exact'), None)
    """
    # By exact type: a subclass may compute something else.
    if type(margin) is ArcFace:
        return 1.0, margin.margin, 0.0, margin.boundary, margin.gradient
    if type(margin) is SphereFace:
        return margin.margin, 0.0, 0.0, "fold", margin.gradient
    if type(margin) is CombinedMargin:
        return margin.m1, margin.m2, margin.m3, margin.boundary, margin.gradient
    if type(margin) is CosFace:
        return 1.0, 0.0, margin.margin, "linear", "exact"
    return (1.0, 0.0, 0.0, "linear", "exact") if type(margin) is NormSoftmax else None


Margin = Callable[[Tensor], Tensor]
"""Any map of target cosines ``(N,)`` to modified cosines ``(N,)`` that autograd can differentiate."""


class RowMargin(NamedTuple):
    """A margin for the rows of one batch: what the ``for_rows`` of a margin gives that depends on more than a cosine.

    A margin may have a method ``for_rows(norms, counted)``, called once in each forward pass, with all ranks' rows on
    every rank: the embeddings' norms (N,), differentiable, fp32 (fp64 if an input is), and which rows take part (N,)
    bool. What it returns is used in its place. :class:`fused_arcface.AdaFace` and its like are made so. One that keeps
    running statistics derives from :class:`fused_arcface.margins.state.StatefulMargin`: they stay fp32 through casts.
    """

    modify: Margin
    """Target cosines (N,) to modified cosines (N,)."""
    penalty: Tensor | None = None
    """(N,) added to the rows' losses."""


class Modulation(NamedTuple):
    """What becomes of a batch's negatives: a cosine above its row's threshold becomes ``a·c² + b·c + d``.

    A margin may have a method ``modulate(target_cosine, counted)``, called once in each forward pass, with all ranks'
    rows on every rank: their target cosines (N,), known before anything else is computed, without a gradient, and which
    rows take part (N,) bool. Which negatives lie above the threshold is taken as given: no gradient flows through that.
    :class:`fused_arcface.CurricularFace` and its like are made so.
    """

    threshold: Tensor
    """(N,)"""
    coefficients: Tensor
    """(3,) fp64: a, b, d."""
    greatest: float
    """No modulated cosine is above it, nor below -1."""
    steepest: float
    """Nor is a derivative's magnitude."""


def for_rows(margin: Margin, norms: Callable[[], Tensor], counted: Tensor) -> RowMargin:
    """The margin of a batch's rows, of their norms (N,), asked for only where they matter, and which take part (N,)."""
    own: Callable[[Tensor, Tensor], RowMargin] | None = getattr(margin, "for_rows", None)
    if own is None:
        return RowMargin(margin)
    of_rows = own(norms(), counted)
    if of_rows.penalty is not None:
        check_margin_rows("penalty", of_rows.penalty, counted)
    return of_rows


def modulates(margin: Margin) -> bool:
    """Whether the margin changes the negatives."""
    return hasattr(margin, "modulate")


def modulation(margin: Margin, target_cosine: Tensor, counted: Tensor) -> Modulation | None:
    """What becomes of a batch's negatives, by target cosines (N,) and which rows take part (N,); None: nothing."""
    own: Callable[[Tensor, Tensor], Modulation] | None = getattr(margin, "modulate", None)
    if own is None:
        return None
    change = own(target_cosine, counted)
    check_margin_rows("threshold", change.threshold, counted)
    return change
