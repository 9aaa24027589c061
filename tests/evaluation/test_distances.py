"""Distances against scipy and against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")  # which comes with scipy

from scipy.spatial import distance as distance_of

from fused_arcface.evaluation import Cosine, Distance, Euclidean, InnerProduct, Mahalanobis, PNorm, make_distance

DRAW = torch.Generator().manual_seed(0)
GALLERY = torch.randn(300, 7, generator=DRAW, dtype=torch.float64) @ torch.randn(
    7, 7, generator=DRAW, dtype=torch.float64
)
CASES = {
    "euclidean": (Euclidean(), distance_of.euclidean),
    "1-norm": (PNorm(1), distance_of.cityblock),
    "2.5-norm": (PNorm(2.5), lambda a, b: distance_of.minkowski(a, b, p=2.5)),
    "∞-norm": (PNorm(float("inf")), distance_of.chebyshev),
    "inner product": (InnerProduct(), lambda a, b: -np.dot(a, b)),
    "cosine": (Cosine(), distance_of.cosine),
    "mahalanobis": (
        Mahalanobis.fit(GALLERY, shrinkage=0.0),
        lambda a, b: distance_of.mahalanobis(a, b, np.linalg.inv(np.cov(GALLERY.numpy().T, bias=True))),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_pairs_and_matrix_against_scipy(name: str, dtype: torch.dtype, tolerance: float) -> None:
    found, expected = CASES[name]
    x, y = torch.randn(5, 7, dtype=dtype), torch.randn(30, 7, dtype=dtype)
    table = np.array([[expected(a, b) for b in y.double().numpy()] for a in x.double().numpy()])
    np.testing.assert_allclose(found.matrix(x, y).numpy(), table, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found(x, y[:5]).numpy(), table[:, :5].diagonal(), rtol=tolerance, atol=tolerance)
    assert found(x, y[:5]).dtype == dtype and found.matrix(x[:0], y).shape == (0, 30)


@pytest.mark.parametrize("found", [Euclidean(), PNorm(3), Cosine()], ids=repr)
def test_near_embeddings_do_not_cancel(found: Distance) -> None:
    x = torch.randn(40, 512)
    near = found.matrix(x, x).diagonal()
    assert near.abs().max() < (1e-6 if isinstance(found, Cosine) else 1e-12)


@pytest.mark.parametrize("found", [Cosine(), InnerProduct()], ids=str)
def test_autocast_does_not_shorten_the_products(found: Distance) -> None:
    x, y = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        matrix = found.matrix(x, y)
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix, found.matrix(x.double(), y.double()).float(), rtol=1e-5, atol=1e-5)


def test_mahalanobis_shrinks_as_stated() -> None:
    x, y, a = torch.randn(4, 7).double(), torch.randn(4, 7).double(), 0.3
    empirical = np.cov(GALLERY.numpy().T, bias=True)
    sigma = (1 - a) * empirical + a * np.trace(empirical) / 7 * np.eye(7)
    difference = (x - y).numpy()
    expected = np.sqrt(np.einsum("pi,ij,pj->p", difference, np.linalg.inv(sigma), difference))
    np.testing.assert_allclose(Mahalanobis.fit(GALLERY, a)(x, y).numpy(), expected, rtol=1e-12)


def test_mahalanobis_chooses_ledoit_and_wolfs_shrinkage() -> None:
    from sklearn.covariance import LedoitWolf

    few = torch.randn(5, 7)  # fewer than dimensions: S is singular
    fitted, expected = Mahalanobis.fit(few), LedoitWolf().fit(few.double().numpy())
    assert 0 < fitted.shrinkage == pytest.approx(expected.shrinkage_)
    sigma = (fitted.factor @ fitted.factor.T).numpy()
    np.testing.assert_allclose(sigma, expected.covariance_, atol=1e-12)
    with pytest.raises(ValueError, match=r"with shrinkage 0 is singular"):
        Mahalanobis.fit(few, shrinkage=0.0)


def test_whitening_makes_the_covariance_one() -> None:
    white = Mahalanobis.fit(GALLERY, 0.0).transform(GALLERY)
    np.testing.assert_allclose(np.cov(white.numpy().T, bias=True), np.eye(7), atol=1e-10)


def test_a_zero_row_has_a_cosine_distance() -> None:
    assert Cosine()(torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [1.0]


def test_names_make_them() -> None:
    assert make_distance("cosine") == Cosine() and make_distance("p-norm", order=4) == PNorm(4)
    assert isinstance(make_distance("mahalanobis", gallery=GALLERY, shrinkage=0.5), Mahalanobis)
    with pytest.raises(ValueError, match=r"^distance must be one of cosine, euclidean.*; got 'hamming'$"):
        make_distance("hamming")
    with pytest.raises(ValueError, match="mahalanobis needs a gallery"):
        make_distance("mahalanobis")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PNorm(0.5), ValueError, "order must be >= 1; got 0.5"),
        (lambda: PNorm(float("nan")), ValueError, "order must be >= 1; got nan"),
        (lambda: PNorm("2"), TypeError, "order must be a number; got str"),  # type: ignore[arg-type]
        (lambda: Mahalanobis.fit(torch.zeros(1, 3)), ValueError, r"gallery must be \(M >= 2, D >= 1\); got \(1, 3\)"),
        (lambda: Mahalanobis.fit(GALLERY, 1.5), ValueError, r"shrinkage must be in \[0, 1\]; got 1.5"),
        (lambda: Mahalanobis.fit(torch.full((3, 2), torch.nan)), ValueError, "gallery must be finite"),
        (lambda: Cosine()(torch.zeros(2, 3), torch.zeros(1, 3)), ValueError, r"y must be \(P, D\)"),
        (lambda: Cosine().matrix(torch.zeros(2, 3), torch.zeros(1, 4)), ValueError, r"x and y must be"),
        (lambda: Cosine().matrix(torch.zeros(2, 3).int(), torch.zeros(1, 3)), TypeError, "must be floating-point"),
        (lambda: CASES["mahalanobis"][0](torch.zeros(2, 3), torch.zeros(2, 3)), ValueError, r"\(M, D=7\), as fitted"),
    ],
)
def test_wrong_arguments(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]
