"""The head once more, in Python's own numbers, straight from the formulas: no tensor, no autograd.

Derivatives are complex steps, exact to the last bits: f'(c) = Im f(c + ih) / h for a tiny h.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from typing import NamedTuple

import fused_arcface as fa

Row = Sequence[float]


class Parameters(NamedTuple):
    m1: float
    m2: float
    m3: float
    boundary: str


def parameters(margin: object) -> Parameters:
    if isinstance(margin, fa.ArcFace):
        return Parameters(1, margin.margin, 0, margin.boundary)
    if isinstance(margin, fa.CombinedMargin):
        return Parameters(margin.m1, margin.m2, margin.m3, margin.boundary)
    if isinstance(margin, fa.SphereFace):
        return Parameters(margin.margin, 0, 0, "fold")
    if isinstance(margin, fa.CosFace):
        return Parameters(1, 0, margin.margin, "none")
    assert isinstance(margin, fa.NormSoftmax)
    return Parameters(1, 0, 0, "none")


def _psi(margin: object, cosine: complex) -> complex:
    m1, m2, m3, boundary = parameters(margin)
    phi = m1 * cmath.acos(cosine) + m2
    if boundary == "hard" and phi.real > math.pi:
        return cosine - m2 * math.sin(m2) - m3
    if boundary == "continuous" and phi.real > math.pi:
        return cosine - math.cos((math.pi - m2) / m1) - 1 - m3
    if boundary == "fold":
        k = math.floor(phi.real / math.pi)
        return (-1) ** k * cmath.cos(phi) - 2 * k - m3
    if boundary == "clip" and phi.real > math.pi:
        return -1 - m3
    if boundary == "easy" and cosine.real <= 0:
        return cosine - m3
    return cmath.cos(phi) - m3


def value(margin: object, cosine: float) -> float:
    return _psi(margin, cosine).real


def derivative(margin: object, cosine: float) -> float:
    return _psi(margin, complex(cosine, 1e-30)).imag / 1e-30


def kinks(margin: object) -> list[float]:
    """Cosines at which the value jumps or its derivative does."""
    m1, m2, _, boundary = parameters(margin)
    if boundary == "easy":
        return [0.0]
    if boundary == "none":
        return []
    last = int((m1 * math.pi + m2) / math.pi)
    # Where fold goes on, cos φ is at its turning point: the continuation is smooth there to first order only.
    return [math.cos((k * math.pi - m2) / m1) for k in range(1, last + 1)]


def _unit(row: Row) -> list[float]:
    norm = max(math.sqrt(math.fsum(v * v for v in row)), 1e-12)
    return [v / norm for v in row]


def cosine(x: Row, w: Row) -> float:
    return math.fsum(a * b for a, b in zip(_unit(x), _unit(w), strict=True))


class RowResult(NamedTuple):
    loss: float
    d_cosine: list[float]  # (C,) gradient by the row's cosines


def row(x: Row, weight: Sequence[Row], y: int, margin: object, scale: float, slope: float | None = None) -> RowResult:
    """One row's loss and its gradient by the cosines; ``slope`` stands in for the margin's own derivative if given."""
    cosines = [cosine(x, w) for w in weight]
    z = scale * value(margin, cosines[y])
    greatest = max((c for j, c in enumerate(cosines) if j != y), default=-math.inf)
    if greatest == -math.inf:
        return RowResult(0.0, [0.0])
    total = math.fsum(math.exp(scale * (c - greatest)) for j, c in enumerate(cosines) if j != y)
    lse = scale * greatest + math.log(total)
    gap = lse - z
    loss = gap + math.log1p(math.exp(-gap)) if gap > 0 else math.log1p(math.exp(gap))
    sigmoid = 1 / (1 + math.exp(-gap)) if gap > 0 else math.exp(gap) / (1 + math.exp(gap))
    slope = derivative(margin, cosines[y]) if slope is None else slope
    gradient = [scale * sigmoid * math.exp(scale * c - lse) for c in cosines]
    gradient[y] = -scale * sigmoid * slope
    return RowResult(loss, gradient)


def _project(d_unit: Row, at: Row) -> list[float]:
    unit, norm = _unit(at), math.sqrt(math.fsum(v * v for v in at))
    along = math.fsum(a * b for a, b in zip(d_unit, unit, strict=True))
    return [(d - u * along) / norm for d, u in zip(d_unit, unit, strict=True)]


def gradients(
    embeddings: Sequence[Row],
    weight: Sequence[Row],
    target: Sequence[int],
    margin: object,
    scale: float,
    slope: float | None = None,
) -> tuple[list[list[float]], list[list[float]]]:
    """Of the summed loss, by embeddings (N, D) and by weight (C, D)."""
    d_cosine = [row(x, weight, y, margin, scale, slope).d_cosine for x, y in zip(embeddings, target, strict=True)]
    units_x, units_w = [_unit(x) for x in embeddings], [_unit(w) for w in weight]
    d_x = [
        _project([math.fsum(g * w[d] for g, w in zip(d_row, units_w, strict=True)) for d in range(len(x))], x)
        for x, d_row in zip(embeddings, d_cosine, strict=True)
    ]
    d_w = [
        _project(
            [math.fsum(d_row[j] * x[d] for d_row, x in zip(d_cosine, units_x, strict=True)) for d in range(len(w))], w
        )
        for j, w in enumerate(weight)
    ]
    return d_x, d_w
