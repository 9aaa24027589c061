"""Margins: values and derivatives on all of [-1, 1] against scalar arithmetic, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from support import scalar
from support.cases import BOUNDARIES, MARGINS, PUBLIC, named
from torch import Tensor

import fused_arcface as fa
from fused_arcface.margins import SIN_FLOOR

every_margin = pytest.mark.parametrize("margin", MARGINS, ids=named)
angular_margin = pytest.mark.parametrize("margin", [m for m in MARGINS if hasattr(m, "gradient")], ids=named)


def grid(dtype: torch.dtype = torch.float64) -> Tensor:
    """Cosines from -1 to 1, both ends among them, and close to the ends."""
    near = 1 - torch.logspace(-15, -2, 40, dtype=torch.float64)
    return torch.cat([torch.linspace(-1, 1, 4001, dtype=torch.float64), near, -near]).to(dtype).sort().values


def away_from(points: list[float], cosine: Tensor, distance: float) -> Tensor:
    far = torch.ones_like(cosine, dtype=torch.bool)
    for point in points:
        far &= (cosine - point).abs() > distance
    return cosine[far]


def slope(margin: Callable[[Tensor], Tensor], cosine: Tensor) -> Tensor:
    cosine = cosine.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(margin(cosine).sum(), cosine)
    return gradient


@every_margin
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 5e-15), (torch.float32, 6e-7)], ids=["fp64", "fp32"])
def test_value(margin: Callable[[Tensor], Tensor], dtype: torch.dtype, allowed: float) -> None:
    # In fp32 the two sides of a jump may be told apart up to rounding only.
    cosine = away_from(scalar.kinks(margin) if dtype == torch.float32 else [], grid(dtype), 1e-5)
    right = torch.tensor([scalar.value(margin, c) for c in cosine.tolist()], dtype=torch.float64)
    got = margin(cosine)
    assert got.dtype == dtype and got.shape == cosine.shape
    # √(1 - c²) in place of √((1-c)(1+c)) would be a hundred times worse in fp64.
    assert (got.double() - right).abs().max() <= allowed * scalar.parameters(margin).m1


@every_margin
def test_derivative(margin: Callable[[Tensor], Tensor]) -> None:
    cosine = away_from([*scalar.kinks(margin), -1.0, 1.0], grid(), 1e-9)
    cosine = cosine[(1 - cosine**2).sqrt() > SIN_FLOOR]
    right = torch.tensor([scalar.derivative(margin, c) for c in cosine.tolist()], dtype=torch.float64)
    torch.testing.assert_close(slope(margin, cosine), right, rtol=1e-9, atol=1e-9)


@every_margin
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_finite_and_bounded_on_all_cosines(margin: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    # fp32 cosines of unit vectors come out as much as 2e-7 beyond 1.
    cosine = torch.cat([grid(dtype), torch.tensor([-1.0000002, 1.0000002], dtype=dtype)])
    assert margin(cosine).isfinite().all()
    bound = max(scalar.parameters(margin).m1 / SIN_FLOOR, 1.0)
    gradient = slope(margin, cosine)
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= bound * (1 + 1e-6)


@angular_margin
def test_bounded_derivative_near_the_ends(margin: Callable[[Tensor], Tensor]) -> None:
    """Within 0.6° of 0 and π the derivative is m1 sin φ / SIN_FLOOR, of the branch that φ is on."""
    near = 1 - torch.logspace(-12, -5, 20, dtype=torch.float64)
    cosine = away_from(scalar.kinks(margin), torch.cat([near, -near]), 1e-13)
    sine = (1 - cosine**2).sqrt()
    assert (sine < SIN_FLOOR).all()
    true = torch.tensor([scalar.derivative(margin, c) for c in cosine.tolist()], dtype=torch.float64)
    m1, m2, _, boundary = scalar.parameters(margin)
    phi = m1 * torch.tensor([math.acos(c) for c in cosine.tolist()], dtype=torch.float64) + m2
    linear = (cosine <= 0) & (boundary == "easy")  # cos θ less a constant
    if boundary in ("hard", "continuous"):
        linear |= phi > math.pi
    right = torch.where(linear, torch.ones_like(true), true * sine / SIN_FLOOR)
    torch.testing.assert_close(slope(margin, cosine), right, rtol=1e-4, atol=1e-6)


@angular_margin
def test_straight_through(margin: Callable[[Tensor], Tensor]) -> None:
    """The same value, and the derivative of the cosine: exactly 1."""
    cosine = grid()
    through = dataclasses.replace(margin, gradient="straight_through")
    torch.testing.assert_close(through(cosine), margin(cosine), rtol=0, atol=1e-15)
    assert torch.equal(slope(through, cosine), torch.ones_like(cosine))


@pytest.mark.parametrize("boundary", ["fold", "continuous"])
@pytest.mark.parametrize("m1", [1.0, 1.7, 4.0])
@pytest.mark.parametrize("m2", [0.0, 0.5, 3.1])
def test_monotone_and_continuous(m1: float, m2: float, boundary: str) -> None:
    theta = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    step = -fa.CombinedMargin(m1, m2, 0.0, boundary)(theta.cos()).diff()
    assert step.min() >= -1e-12
    assert step.max() <= m1 * math.pi / 20000 * 1.001


def test_continuous_at_wespeakers_numbers() -> None:
    """θ = 175°, m = 0.2: past π, as 175° + 11.46° > 180°. WeSpeaker subtracts mmm = 1 + cos(π - 0.2) = 0.0199334."""
    cosine = torch.tensor([math.cos(math.radians(175)), math.cos(math.radians(90))], dtype=torch.float64)
    right = torch.tensor([-0.9961947 - 0.0199334, -math.sin(0.2)], dtype=torch.float64)
    torch.testing.assert_close(fa.ArcFace(0.2, "continuous")(cosine), right, rtol=0, atol=1e-7)
    hard = fa.ArcFace(0.2, "hard")(cosine)[0].item()
    assert hard == pytest.approx(-0.9961947 - 0.2 * math.sin(0.2), abs=1e-7)


@pytest.mark.parametrize("boundary", [b for b in BOUNDARIES if b != "none"])
def test_margin_never_rewards(boundary: str) -> None:
    cosine = grid()
    assert (fa.CombinedMargin(1.0, 0.5, 0.1, boundary)(cosine) <= cosine - 0.1 + 1e-12).all()


def test_clip_has_no_gradient_past_the_boundary() -> None:
    cosine = torch.tensor([-0.9, -0.99, -1.0], dtype=torch.float64)
    assert torch.equal(slope(fa.ArcFace(0.5, "clip"), cosine), torch.zeros(3, dtype=torch.float64))


def test_documented_relations() -> None:
    cosine = grid()
    for boundary in BOUNDARIES:
        assert torch.equal(fa.ArcFace(0.4, boundary)(cosine), fa.CombinedMargin(1.0, 0.4, 0.0, boundary)(cosine))
    assert torch.equal(fa.SphereFace(1.7)(cosine), fa.CombinedMargin(1.7, 0.0, 0.0, "fold")(cosine))
    assert torch.equal(fa.CosFace(0.35)(cosine), cosine - 0.35)
    assert fa.NormSoftmax()(cosine) is cosine


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fa.ArcFace(margin="0.5"), TypeError, "ArcFace: margin must be a number; got str"),
        (
            lambda: fa.ArcFace(margin=torch.tensor(0.5)),
            TypeError,
            "ArcFace: margin must be a number; got Tensor: pass it as float(...)",
        ),
        (lambda: fa.ArcFace(margin=True), TypeError, "ArcFace: margin must be a number; got bool"),
        (lambda: fa.ArcFace(margin=-0.1), ValueError, "ArcFace: margin must be in [0, π) radians; got -0.1"),
        (lambda: fa.ArcFace(margin=math.pi), ValueError, f"ArcFace: margin must be in [0, π) radians; got {math.pi}"),
        (lambda: fa.ArcFace(margin=math.nan), ValueError, "ArcFace: margin must be in [0, π) radians; got nan"),
        (
            lambda: fa.ArcFace(boundary="soft"),
            ValueError,
            "ArcFace: boundary must be one of 'none', 'hard', 'fold', 'clip', 'easy', 'continuous'; got 'soft'",
        ),
        (
            lambda: fa.ArcFace(gradient="approximate"),
            ValueError,
            "ArcFace: gradient must be one of 'exact', 'straight_through'; got 'approximate'",
        ),
        (lambda: fa.CosFace(2.0), ValueError, "CosFace: margin must be in [0, 2); got 2.0"),
        (lambda: fa.CosFace(-1e-9), ValueError, "CosFace: margin must be in [0, 2); got -1e-09"),
        (lambda: fa.CosFace(None), TypeError, "CosFace: margin must be a number; got NoneType"),
        (lambda: fa.SphereFace(0.99), ValueError, "SphereFace: margin must be in [1, 4]; got 0.99"),
        (lambda: fa.SphereFace(4.01), ValueError, "SphereFace: margin must be in [1, 4]; got 4.01"),
        (
            lambda: fa.SphereFace(gradient=1),
            ValueError,
            "SphereFace: gradient must be one of 'exact', 'straight_through'; got 1",
        ),
        (lambda: fa.CombinedMargin(m1=5), ValueError, "CombinedMargin: m1 must be in [1, 4]; got 5"),
        (lambda: fa.CombinedMargin(m2=4), ValueError, "CombinedMargin: m2 must be in [0, π) radians; got 4"),
        (lambda: fa.CombinedMargin(m3=2), ValueError, "CombinedMargin: m3 must be in [0, 2); got 2"),
        (lambda: fa.CombinedMargin(m3=[]), TypeError, "CombinedMargin: m3 must be a number; got list"),
    ],
)
def test_refused(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


def test_unhashable_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="boundary must be one of"):
        fa.ArcFace(boundary=["hard"])


def test_limits_are_allowed() -> None:
    for margin in (fa.ArcFace(0), fa.CosFace(0), fa.SphereFace(1), fa.SphereFace(4), fa.CombinedMargin(1, 0, 0)):
        assert margin(grid()).isfinite().all()


@every_margin
def test_frozen_hashable_and_readable(margin: object) -> None:
    copy = pickle.loads(pickle.dumps(margin))
    assert copy == margin and hash(copy) == hash(margin)
    assert eval(repr(margin), PUBLIC) == margin
    for field in dataclasses.fields(margin):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(margin, field.name, 0.1)


def test_repr() -> None:
    assert repr(fa.ArcFace()) == "ArcFace(margin=0.5, boundary='hard', gradient='exact')"
    assert repr(fa.CombinedMargin(1.1, 0.2, 0.3, "fold", "straight_through")) == (
        "CombinedMargin(m1=1.1, m2=0.2, m3=0.3, boundary='fold', gradient='straight_through')"
    )
    assert fa.ArcFace(0.5) != fa.ArcFace(0.4) and fa.CosFace(0.5) != fa.ArcFace(0.5)
