"""The comparison of a backend with the reference in fp64: what it lets pass and what it finds."""

from __future__ import annotations

import pytest
import torch

import fused_arcface as fa
from fused_arcface.app import agreement


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_right_backend_passes(dtype: torch.dtype) -> None:
    found = agreement.check("cpu", fa.ArcFace(0.5, "fold"), dtype)
    assert found.passed and found.numerical is (True if dtype == torch.float64 else None)


def test_finite_differences_find_a_wrong_derivative() -> None:
    class Wrong:
        """A straight-through gradient that claims to be exact."""

        def __call__(self, target_cosine: torch.Tensor) -> torch.Tensor:
            return fa.ArcFace(gradient="straight_through")(target_cosine)

    assert agreement.finite_differences("cpu", Wrong()) is False
    assert agreement.finite_differences("cpu", fa.ArcFace(gradient="straight_through")) is None


@pytest.mark.parametrize(
    ("has_gradient", "of_penalty"), [(False, False), (True, False), (True, True)], ids=["held", "margin", "penalty"]
)
def test_finite_differences_of_a_margin_by_the_norm(has_gradient: bool, of_penalty: bool) -> None:
    """Finite differences hold the norms if and only if the margin uses them without a gradient, as AdaFace does."""

    class ByNorm:
        def __call__(self, target_cosine: torch.Tensor) -> torch.Tensor:
            return target_cosine

        def for_rows(self, norms: torch.Tensor, counted: torch.Tensor) -> fa.margins.RowMargin:
            if not has_gradient:
                norms = norms.detach()
            if of_penalty:
                return fa.margins.RowMargin(self, norms**2)
            return fa.margins.RowMargin(lambda cosine: cosine - 0.1 * norms)

    assert agreement.norms_are_held(ByNorm()) == (not has_gradient)
    assert agreement.finite_differences("cpu", ByNorm()) is True


def test_nan_does_not_pass() -> None:
    errors = dict.fromkeys(agreement.QUANTITIES, 0.0)
    assert agreement.Agreement(errors, errors, None).passed
    assert not agreement.Agreement(errors | {"d_weight": float("nan")}, errors, None).passed
    assert not agreement.Agreement(errors, errors, False).passed
