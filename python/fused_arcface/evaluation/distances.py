"""Distances between embeddings, for ``verify`` and ``identify``. Smaller means more alike.

Each distance maps single embeddings (:meth:`Distance.transform`: a normalization, a whitening) and then takes a
Minkowski distance or an inner product. A search engine needs to know only those two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.extras import require
from ..base.normalize import without_autocast
from ..base.ranges import Range, check_number

NAMES = ("cosine", "euclidean", "p-norm", "inner-product", "mahalanobis")


@dataclass(frozen=True)
class Distance:
    """Base class of the distances; use its subclasses.

    >>> x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    >>> Euclidean()(x, y[1:])
    tensor([4.])
    >>> Euclidean().matrix(x, y)
    tensor([[5., 4.]])
    """

    @property
    def p(self) -> float | None:
        """Order of the Minkowski distance between transformed embeddings; None for their inner product."""
        return 2.0

    def transform(self, x: Tensor) -> Tensor:
        """Return the rows ``(M, D)`` to compare in place of embeddings ``(M, D)``."""
        return x

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances ``(P,)`` of pairs of rows ``(P, D)`` and ``(P, D)``.

        Raises:
            ValueError: if the shapes differ or are not ``(P, D)``.
        """
        _check_rows(x, y)
        if x.shape != y.shape:
            raise ValueError(f"y must be (P, D), as x is, {tuple(x.shape)}; got {tuple(y.shape)}")
        return self.of_transformed(self.transform(x), self.transform(y))

    def of_transformed(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances ``(P,)`` of pairs of transformed rows ``(P, D)``."""
        if self.p is None:
            return self._from_inner((x * y).sum(1))
        return torch.linalg.vector_norm(x - y, ord=self.p, dim=1)

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances ``(M, K)`` of each row ``(M, D)`` to each row ``(K, D)``.

        Raises:
            ValueError: if the shapes are not ``(M, D)`` and ``(K, D)``.
        """
        _check_rows(x, y)
        return self.matrix_of_transformed(self.transform(x), self.transform(y))

    def matrix_of_transformed(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances ``(M, K)`` of transformed rows."""
        if self.p is None:
            with without_autocast(x.device):
                return self._from_inner(x @ y.T)
        # Differences, not ‖x‖² + ‖y‖² − 2⟨x, y⟩, which cancels where x and y are close.
        return torch.cdist(x, y, p=self.p, compute_mode="donot_use_mm_for_euclid_dist")

    def _from_inner(self, inner: Tensor) -> Tensor:
        return -inner


@dataclass(frozen=True)
class Euclidean(Distance):
    """``‖x − y‖``.

    >>> Euclidean()(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]]))
    tensor([5.])
    """


@dataclass(frozen=True)
class PNorm(Distance):
    """``(Σ |x_i − y_i|^p)^(1/p)``, the Minkowski distance.

    Args:
        order: the order p, at least 1; ``math.inf`` gives the greatest difference.

    Raises:
        TypeError: if the order is not a number.
        ValueError: if the order is below 1, which gives no norm.

    >>> PNorm(1)(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
    tensor([3.])
    """

    order: float = 3.0

    def __post_init__(self) -> None:
        check_number("order", self.order, Range(">= 1", 1, math.inf, has_high=True))

    @property
    def p(self) -> float | None:
        return float(self.order)


@dataclass(frozen=True)
class InnerProduct(Distance):
    """``−⟨x, y⟩``: a similarity, negated so that smaller means more alike here too.

    >>> InnerProduct()(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([-11.])
    """

    @property
    def p(self) -> float | None:
        return None


@dataclass(frozen=True)
class Cosine(InnerProduct):
    """``1 − cos(x, y)``, from 0 to 2; a row of zeros has distance 1 to everything.

    >>> Cosine()(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
    tensor([1.])
    """

    def transform(self, x: Tensor) -> Tensor:
        return F.normalize(x)

    def _from_inner(self, inner: Tensor) -> Tensor:
        return 1 - inner


@dataclass(frozen=True, eq=False)
class Mahalanobis(Distance):
    """``√((x − y)ᵀ Σ⁻¹ (x − y))`` with a covariance that was fitted: the Euclidean distance after whitening.

    Make it with :meth:`fit`. With ``Σ = L·Lᵀ`` (Cholesky) the distance is ``‖L⁻¹x − L⁻¹y‖``: no inverse is formed.
    """

    factor: Tensor = field(repr=False)
    """(D, D) fp64, ``L``."""
    shrinkage: float = 0.0
    """Share of the identity, scaled to the mean variance, in Σ."""

    @classmethod
    def fit(cls, gallery: Tensor, shrinkage: float | None = None) -> Mahalanobis:
        """Fit the covariance to a gallery's embeddings ``(M, D)``; labels are not used.

        ``Σ = (1 − a)·S + a·(tr S / D)·I``, S the empirical covariance (divided by M). Without shrinkage S is singular
        for M <= D, and badly conditioned for a much greater M too.

        Args:
            gallery: embeddings (M, D), M >= 2.
            shrinkage: share a of the identity, in [0, 1]; None chooses it by Ledoit and Wolf's formula (2004,
                as in scikit-learn).

        Raises:
            ValueError: if the gallery has another shape, the shrinkage is out of range, or Σ is not positive definite.
            MissingExtra: if scikit-learn is not installed.

        >>> distance = Mahalanobis.fit(torch.tensor([[-1.0, 0], [1, 0], [0, 2], [0, -2]]), shrinkage=0.0)
        >>> distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]]))  # two over a deviation of √2
        tensor([1.4142])
        """
        if gallery.dim() != 2 or gallery.shape[0] < 2 or gallery.shape[1] < 1:
            raise ValueError(f"gallery must be (M >= 2, D >= 1); got {tuple(gallery.shape)}")
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must be in [0, 1]; got {shrinkage}")
        if not gallery.isfinite().all():
            raise ValueError("gallery must be finite")
        covariance = require("sklearn.covariance", "eval")
        rows = gallery.detach().double().cpu().numpy()
        if shrinkage is None:
            sigma, shrinkage = covariance.ledoit_wolf(rows)
        else:
            sigma = covariance.shrunk_covariance(covariance.empirical_covariance(rows), shrinkage)
        factor, failed = torch.linalg.cholesky_ex(torch.as_tensor(sigma))
        # A matrix is singular as well if only rounding left a pivot above zero.
        pivots = factor.diagonal()
        if failed or not pivots.min() > math.sqrt(torch.finfo(torch.float64).eps) * pivots.max():
            raise ValueError(
                f"the covariance of {tuple(gallery.shape)} embeddings with shrinkage {shrinkage:g} is singular: "
                "give more embeddings or a greater shrinkage"
            )
        return cls(factor.to(gallery.device), float(shrinkage))

    def transform(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.factor.shape[0]:
            raise ValueError(f"embeddings must be (M, D={self.factor.shape[0]}), as fitted; got {tuple(x.shape)}")
        factor = self.factor.to(x.device)
        return torch.linalg.solve_triangular(factor, x.double().T, upper=False).T.to(x.dtype)


def make_distance(
    name: str, *, order: float = 3.0, gallery: Tensor | None = None, shrinkage: float | None = None
) -> Distance:
    """Return the distance of a name, as the command line spells it.

    Args:
        name: one of :data:`NAMES`.
        order: the order of ``"p-norm"``.
        gallery: embeddings (M, D) that ``"mahalanobis"`` is fitted on.
        shrinkage: shrinkage of its covariance, see :meth:`Mahalanobis.fit`.

    Raises:
        ValueError: if the name is unknown, or a gallery is missing.

    >>> make_distance("p-norm", order=1)
    PNorm(order=1)
    """
    if name not in NAMES:
        raise ValueError(f"distance must be one of {', '.join(NAMES)}; got {name!r}")
    if name == "p-norm":
        return PNorm(order)
    if name != "mahalanobis":
        return {"cosine": Cosine, "euclidean": Euclidean, "inner-product": InnerProduct}[name]()
    if gallery is None:
        raise ValueError("mahalanobis needs a gallery to fit its covariance on")
    return Mahalanobis.fit(gallery, shrinkage)


def _check_rows(x: Tensor, y: Tensor) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must be (M, D) and (K, D); got {tuple(x.shape)} and {tuple(y.shape)}")
    if not x.is_floating_point() or not y.is_floating_point():
        raise TypeError(f"x and y must be floating-point; got {x.dtype} and {y.dtype}")
