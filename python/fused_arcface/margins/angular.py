"""Margins that are functions of the target's cosine alone, called on (N,) vectors.

``θ`` is the angle between an embedding and its own class center, ``φ = m1·θ + m2``. A margin replaces ``cos θ`` by
``ψ(θ) - m3``. ``cos φ`` stops falling at ``φ = π``, so an angular margin has a ``boundary``, its continuation there:

==============  =============================================  ================================================
``none``        ``cos φ``                                      not monotone past π
``hard``        ``cos φ`` up to π, ``cos θ - m2·sin m2`` past  what most published heads do; it jumps at φ = π
``fold``        ``(-1)^k cos φ - 2k``, ``k = ⌊φ/π⌋``           monotone and continuous, SphereFace's continuation
``clip``        ``cos(min(φ, π))``                             constant past π: no gradient there
``easy``        ``cos φ`` where ``cos θ > 0``, else ``cos θ``  ArcFace's "easy margin"; it jumps at θ = π/2
``continuous``  ``cos φ`` up to π, ``cos θ - d`` past          monotone and continuous, WeSpeaker's continuation
==============  =============================================  ================================================

``d = 1 + cos((π - m2)/m1)`` makes ``continuous`` so: at φ = π it is -1. Without a factor (m1 = 1) ``d`` is
``1 - cos m2``.

``gradient="exact"`` is the derivative ``m1·sin φ / sin θ``. The true derivative is unbounded at 0 and π. Within 0.6° of
them ``sin θ`` is replaced by :data:`SIN_FLOOR`, so ``|ψ'| <= m1 / SIN_FLOOR`` everywhere.
``gradient="straight_through"`` uses the derivative 1, as insightface has done since December 2022.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..base.compiler import constant_result
from .checks import ANGLE, DIFFERENCE, FACTOR, check_choice, check_number
from .entry import Entry

Boundary = Literal["none", "hard", "fold", "clip", "easy", "continuous"]
GradientMode = Literal["exact", "straight_through"]
Form = Literal["paper", "code"]
"""The form of a method, where its paper and its authors' code differ."""

SIN_FLOOR = 1e-2
"""Smallest ``sin θ`` in a derivative's denominator: the exact gradient is bounded by ``m1 / SIN_FLOOR``."""


# A constant: torch.compile(dynamic=True) takes a global number for a symbol, and has none in a backward pass.
@constant_result
def _least_squared_sine() -> float:
    return SIN_FLOOR**2


class _Angle(torch.autograd.Function):
    """``θ = arccos(cosine)``: accurate near ±1, clamped outside [-1, 1], with the bounded derivative."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine)
        cosine = cosine.clamp(-1, 1)
        return torch.atan2(((1 - cosine) * (1 + cosine)).sqrt(), cosine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (cosine,) = ctx.saved_tensors
        # Differentiable operations only: the reference is twice differentiable through here.
        return -grad / ((1 - cosine) * (1 + cosine)).clamp(min=_least_squared_sine()).sqrt()


def angle(cosine: Tensor) -> Tensor:
    """Return the angles (N,) in radians of cosines (N,). The derivative is bounded by ``1 / SIN_FLOOR``."""
    return _Angle.apply(cosine)


def straight_through(value: Tensor, cosine: Tensor) -> Tensor:
    """Return ``value`` with the derivative of ``cosine``."""
    return value.detach() + (cosine - cosine.detach())


def drop_past_boundary(m1: float, m2: float, boundary: str) -> float:
    """Return the number that is subtracted from ``cos θ`` past π; 0 for a boundary that subtracts none.

    >>> drop_past_boundary(1.0, 0.5, "hard"), drop_past_boundary(1.0, 0.5, "continuous")
    (0.2397..., 0.1224...)
    """
    if boundary == "hard":
        return m2 * math.sin(m2)
    return 1 + math.cos((math.pi - m2) / m1) if boundary == "continuous" else 0.0


def with_angle(cosine: Tensor, margin: Tensor, boundary: str) -> Tensor:
    """Return ``cos(θ + margin)`` (N,) of cosines (N,), for margins (N,) that differ from row to row, in radians."""
    drop = 1 - margin.cos() if boundary == "continuous" else margin * margin.sin()
    return past_boundary(angle(cosine) + margin, cosine, drop, boundary)


def past_boundary(phi: Tensor, cosine: Tensor, drop: Tensor | float, boundary: str) -> Tensor:
    """Return ``ψ`` (N,) of ``φ`` (N,), by the table at the top of this module.

    ``drop`` is subtracted from the cosines past π, see :func:`drop_past_boundary`.
    """
    if boundary == "none":
        return phi.cos()
    if boundary in ("hard", "continuous"):
        return torch.where(phi <= math.pi, phi.cos(), cosine - drop)
    if boundary == "fold":
        k = (phi.detach() / math.pi).floor()
        return (1 - 2 * (k % 2)) * phi.cos() - 2 * k
    if boundary == "clip":
        return phi.clamp(max=math.pi).cos()
    return torch.where(cosine > 0, phi.cos(), cosine)


@dataclass(frozen=True)
class CombinedMargin:
    """``s·(cos(m1·θ + m2) - m3)``: the margins of SphereFace, ArcFace and CosFace combined (ArcFace, eq. 4).

    Args:
        m1: factor of the angle, in [1, 4].
        m2: angle in radians that is added, in [0, π).
        m3: number that is subtracted from the cosine, in [0, 2).
        boundary: continuation past ``φ = π``: ``"none"``, ``"hard"``, ``"fold"``, ``"clip"``, ``"easy"`` or
            ``"continuous"``, see :mod:`fused_arcface.margins.angular`.
        gradient: ``"exact"`` or ``"straight_through"``.

    Raises:
        TypeError: if m1, m2 or m3 is not a number.
        ValueError: if an argument is out of its range.

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
        check_number(self, "m1", self.m1, FACTOR)
        check_number(self, "m2", self.m2, ANGLE)
        check_number(self, "m3", self.m3, DIFFERENCE)
        check_choice(self, "boundary", self.boundary, Boundary)
        check_choice(self, "gradient", self.gradient, GradientMode)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,)."""
        phi = self.m1 * angle(target_cosine) + self.m2
        drop = drop_past_boundary(self.m1, self.m2, self.boundary)
        value = past_boundary(phi, target_cosine, drop, self.boundary) - self.m3
        return straight_through(value, target_cosine) if self.gradient == "straight_through" else value


@dataclass(frozen=True)
class ArcFace:
    """``s·cos(θ + margin)``, the additive angular margin (ArcFace, eq. 3, arXiv:1801.07698).

    Args:
        margin: angle in radians that is added, in [0, π).
        boundary: continuation past ``θ + margin = π``, see :mod:`fused_arcface.margins.angular`. The default ``"hard"``
            jumps there, as most published heads do; ``"fold"`` and ``"continuous"`` are monotone and continuous.
        gradient: ``"exact"`` or ``"straight_through"``.

    Raises:
        TypeError: if the margin is not a number.
        ValueError: if an argument is out of its range.

    >>> import torch
    >>> ArcFace(margin=0.5)(torch.tensor([1.0, 0.0]))
    tensor([ 0.8776, -0.4794])
    """

    margin: float = 0.5
    boundary: Boundary = "hard"
    gradient: GradientMode = "exact"

    def __post_init__(self) -> None:
        check_number(self, "margin", self.margin, ANGLE)
        check_choice(self, "boundary", self.boundary, Boundary)
        check_choice(self, "gradient", self.gradient, GradientMode)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,)."""
        return CombinedMargin(1.0, self.margin, 0.0, self.boundary, self.gradient)(target_cosine)


@dataclass(frozen=True)
class SphereFace:
    """``s·cos(margin·θ)``, the multiplicative angular margin with its monotone continuation (arXiv:1704.08063, eq. 7).

    Args:
        margin: factor of the angle, in [1, 4].
        gradient: ``"exact"`` or ``"straight_through"``.

    Raises:
        TypeError: if the margin is not a number.
        ValueError: if an argument is out of its range.

    >>> import torch
    >>> SphereFace(margin=2.0)(torch.tensor([1.0, 0.0]))
    tensor([ 1., -1.])
    """

    margin: float = 1.7
    gradient: GradientMode = "exact"

    def __post_init__(self) -> None:
        check_number(self, "margin", self.margin, FACTOR)
        check_choice(self, "gradient", self.gradient, GradientMode)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,)."""
        return CombinedMargin(self.margin, 0.0, 0.0, "fold", self.gradient)(target_cosine)


@dataclass(frozen=True)
class CosFace:
    """``s·(cos θ - margin)``, the additive cosine margin (CosFace, eq. 4, arXiv:1801.09414).

    Args:
        margin: number that is subtracted from the cosine, in [0, 2).

    Raises:
        TypeError: if the margin is not a number.
        ValueError: if the margin is out of its range.

    >>> import torch
    >>> CosFace(margin=0.35)(torch.tensor([1.0, 0.0]))
    tensor([ 0.6500, -0.3500])
    """

    margin: float = 0.35

    def __post_init__(self) -> None:
        check_number(self, "margin", self.margin, DIFFERENCE)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,)."""
        return target_cosine - self.margin


@dataclass(frozen=True)
class NormSoftmax:
    """``s·cos θ``: normalized softmax without a margin (NormFace, arXiv:1704.06369).

    >>> import torch
    >>> NormSoftmax()(torch.tensor([0.5]))
    tensor([0.5000])
    """

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Return the target cosines (N,) as they are."""
        return target_cosine


def parameters(margin: object) -> tuple[float, float, float, str, str] | None:
    """Return ``(m1, m2, m3, boundary, gradient)`` of a margin ``cos(m1·θ + m2) - m3``, None for any other callable.

    CosFace and NormSoftmax don't use the angle. Their boundary is called ``"linear"``: ``cos θ - m3``, derivative 1.

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


_MODES = [(boundary, gradient) for gradient in get_args(GradientMode) for boundary in get_args(Boundary)]

ENTRIES = (
    Entry(
        NormSoftmax,
        "cos θ",
        "NormFace, 1704.06369",
        lambda: [NormSoftmax()],
    ),
    Entry(
        SphereFace,
        "cos(m·θ), continued by (−1)^k·cos(m·θ) − 2k",
        "SphereFace, 1704.08063",
        lambda: [SphereFace(1.7, gradient) for gradient in get_args(GradientMode)],
        "m = 1.7; the paper's 4 is trained with an annealed mixture",
    ),
    Entry(
        CosFace,
        "cos θ − m",
        "CosFace, 1801.09414",
        lambda: [CosFace(0.35)],
    ),
    Entry(
        ArcFace,
        "cos(θ + m)",
        "ArcFace, 1801.07698",
        lambda: [ArcFace(0.5, *mode) for mode in _MODES],
        'boundary "hard" as in most published heads; insightface has boundary="none", gradient="straight_through"',
    ),
    Entry(
        CombinedMargin,
        "cos(m1·θ + m2) − m3",
        "ArcFace, 1801.07698, eq. 4",
        lambda: [CombinedMargin(1.2, 0.4, 0.1, *mode) for mode in _MODES],
        'as ArcFace; insightface has boundary="none", gradient="straight_through"',
    ),
)
"""The rows of :mod:`.registry` for the margins of this module."""
