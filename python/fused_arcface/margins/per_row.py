"""Margins that differ from row to row: they depend on the embedding's norm, or are drawn at random.

Each has a method ``for_rows``, see :class:`fused_arcface.margins.RowMargin`. Called on cosines alone they use the mean
norm or the mean margin. Those with a state are modules. A head's margin is part of its ``state_dict`` and follows its
``train()`` and ``eval()``. The state is the same on every rank, since every rank gets all ranks' rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..base.checks import check_seed
from ..base.keyed_random import MARGINS, fold, fold_each, normal_rows
from ..base.ranges import ABOVE_0_TO_1, FROM_0, Range
from .angular import Boundary, Form, GradientMode, angle, straight_through, with_angle
from .checks import ABOVE_0, ANGLE, DIFFERENCE, check_choice, check_number
from .entry import Entry, trained
from .protocol import RowMargin
from .state import StatefulMargin

Kind = Literal["arc", "cos"]

# AdaFace's ε: angles are clipped to [ε, π - ε], and ε is added to the deviation.
_EPSILON = 1e-3


class AdaFace(StatefulMargin):
    """``s·(cos(clip(θ - m·ẑ, ε, π - ε)) - (m + m·ẑ))``: a margin by image quality (AdaFace, arXiv:2204.00964).

    Do not normalize embeddings before the head. AdaFace's own nets return unit embeddings and their norms: pass
    ``embeddings * norms``.

    The norm of the embedding measures the quality: ``ẑ = clip(h·(|x| - μ)/(σ + ε), -1, 1)`` with ``ε = 1e-3``. Norms
    are clipped to [1e-3, 100] and have no gradient. μ and σ are the running mean and deviation of the norms. In
    training each batch updates them before they are used. Rows that are ignored or not finite are left out.

    Args:
        margin: ``m``, in radians for the angle and in units of the cosine, in [0, π).
        h: factor of the quality, finite and >= 0: a norm of ``1/h`` deviations above the mean has quality 1.
        rate: rate of the running mean and deviation, ``μ ← (1 - rate)·μ + rate·mean``, in (0, 1].
        gradient: as for :class:`fused_arcface.ArcFace`. The authors' AdaFace has ``"exact"``, their CVLface
            ``"straight_through"``.

    Attributes:
        norm_mean: 0-dim fp32 buffer, μ, initially 20.
        norm_std: 0-dim fp32 buffer, σ, initially 100.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range.

    >>> import torch, fused_arcface as fa
    >>> head = fa.MarginHead(8, 100, margin=AdaFace())
    >>> loss = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 99]))
    >>> bool(head.margin.norm_mean < 20), AdaFace(margin=0.4)(torch.tensor([0.9]))
    (True, tensor([0.5000]))
    """

    norm_mean: Tensor
    norm_std: Tensor
    gradient: GradientMode = "exact"
    """A margin that an earlier version pickled has no gradient of its own."""

    def __init__(
        self, margin: float = 0.4, h: float = 0.333, rate: float = 0.01, gradient: GradientMode = "exact"
    ) -> None:
        super().__init__()
        check_number(self, "margin", margin, ANGLE)
        check_number(self, "h", h, FROM_0)
        check_number(self, "rate", rate, ABOVE_0_TO_1)
        check_choice(self, "gradient", gradient, GradientMode)
        self.margin, self.h, self.rate, self.gradient = margin, h, rate, gradient
        self.register_buffer("norm_mean", self._initial("norm_mean", 20.0))
        self.register_buffer("norm_std", self._initial("norm_std", 100.0))

    def forward(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,), for embeddings of the mean norm."""
        return self._modify(target_cosine, 0.0)

    def for_rows(self, norms: Tensor, counted: Tensor) -> RowMargin:
        """Return the batch's :class:`fused_arcface.margins.RowMargin`."""
        counted, norms = counted & norms.isfinite(), norms.detach().clamp(1e-3, 100)
        if self.training:
            self._update(norms, counted)
        deviations = (norms - self.norm_mean) / (self.norm_std + _EPSILON)
        quality = (self.h * deviations).clamp(-1, 1).to(norms.dtype)
        return RowMargin(lambda target_cosine: self._modify(target_cosine, quality))

    def _modify(self, target_cosine: Tensor, quality: Tensor | float) -> Tensor:
        theta = angle(target_cosine) - self.margin * quality
        value = theta.clamp(_EPSILON, math.pi - _EPSILON).cos() - (self.margin + self.margin * quality)
        return straight_through(value, target_cosine) if self.gradient == "straight_through" else value

    @torch.no_grad()
    def _update(self, norms: Tensor, counted: Tensor) -> None:
        """Update the running statistics; the deviation, with n - 1, only if there are two rows."""
        count = counted.sum()
        mean = norms.masked_fill(~counted, 0).sum() / count
        std = ((norms - mean).masked_fill(~counted, 0).square().sum() / (count - 1)).sqrt()
        for running, batch, least in ((self.norm_mean, mean, 1), (self.norm_std, std, 2)):
            running.copy_(torch.where(count >= least, (1 - self.rate) * running + self.rate * batch, running))

    def extra_repr(self) -> str:
        return f"margin={self.margin}, h={self.h}, rate={self.rate}, gradient={self.gradient!r}"


@dataclass(frozen=True)
class MagFace:
    """``s·cos(θ + m(a))``: a margin and a penalty by the embedding's norm (MagFace, arXiv:2103.06627).

    ``a`` is the norm clipped to [lower_norm, upper_norm]. ``m(a)`` rises linearly from lower_margin to upper_margin.
    ``λ·(a / upper_norm² + 1/a)`` is added to each row's loss. Both have a gradient through the norm, so the norm learns
    to measure the image's quality. Outside of the limits the norm has no gradient. Embeddings must not be normalized
    before the head.

    Args:
        lower_margin: angle in radians at lower_norm, in [0, π).
        upper_margin: angle in radians at upper_norm, in [lower_margin, π).
        lower_norm: lower limit of the norm, finite and > 0.
        upper_norm: upper limit of the norm, finite and > lower_norm.
        penalty: ``λ``, finite and >= 0; 35 in the paper.
        boundary: continuation past π, see :mod:`fused_arcface.margins.angular`. The default ``"easy"`` is that of the
            authors' code: no margin on targets past 90°. ``"hard"`` has the margin there: at 100° and a norm of 60 the
            target's cosine becomes -0.717 instead of -0.174.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range.

    >>> import torch
    >>> norms, counted = torch.tensor([10.0, 110.0]), torch.tensor([True, True])
    >>> modify, penalty = MagFace().for_rows(norms, counted)
    >>> modify(torch.tensor([1.0, 1.0])), penalty
    (tensor([0.9004, 0.6967]), tensor([3.5289, 0.6364]))
    """

    lower_margin: float = 0.45
    upper_margin: float = 0.8
    lower_norm: float = 10.0
    upper_norm: float = 110.0
    penalty: float = 35.0
    boundary: Boundary = "easy"

    def __post_init__(self) -> None:
        check_number(self, "lower_margin", self.lower_margin, ANGLE)
        upper = Range("in [lower_margin, π)", self.lower_margin, math.pi)
        check_number(self, "upper_margin", self.upper_margin, upper)
        check_number(self, "lower_norm", self.lower_norm, ABOVE_0)
        above = Range("in (lower_norm, inf)", self.lower_norm, math.inf, has_low=False)
        check_number(self, "upper_norm", self.upper_norm, above)
        check_number(self, "penalty", self.penalty, FROM_0)
        check_choice(self, "boundary", self.boundary, Boundary)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,), for norms in the middle of their range."""
        middle = (self.lower_norm + self.upper_norm) / 2
        return self._modify(target_cosine, torch.full_like(target_cosine, middle))

    def for_rows(self, norms: Tensor, counted: Tensor) -> RowMargin:
        """Return the batch's :class:`fused_arcface.margins.RowMargin`."""
        clipped = norms.clamp(self.lower_norm, self.upper_norm)
        penalty = self.penalty * (clipped / self.upper_norm**2 + 1 / clipped)
        return RowMargin(lambda target_cosine: self._modify(target_cosine, clipped), penalty)

    def _modify(self, target_cosine: Tensor, norms: Tensor) -> Tensor:
        rise = (self.upper_margin - self.lower_margin) / (self.upper_norm - self.lower_norm)
        margin = self.lower_margin + rise * (norms - self.lower_norm)
        return with_angle(target_cosine, margin, self.boundary)


class ElasticFace(StatefulMargin):
    """``s·cos(θ + m)`` or ``s·(cos θ - m)`` with a random margin m (ElasticFace, arXiv:2109.09416).

    m is drawn from N(margin, std²) for each row in each training step. A draw depends on the seed, the step and the
    row's index among all ranks' rows, so every rank draws the same. In ``eval()`` each row has the mean margin.

    Args:
        margin: mean of m, an angle in [0, π) radians, or in [0, 2) for ``kind="cos"``.
        std: deviation of m, finite and >= 0.
        kind: ``"arc"`` for ``cos(θ + m)``, ``"cos"`` for ``cos θ - m``.
        plus: True to assign the batch's draws by the rows' target cosines (ElasticFace+).
        boundary: continuation past ``θ + m = π`` with ``kind="arc"``, see :mod:`fused_arcface.margins.angular`. The
            default is that of the paper.
        seed: seed of the draws, in [0, 2^63).
        form: assignment of the draws with ``plus``. ``"paper"``: the smaller a target's cosine, the larger its margin.
            ``"code"``: as in the authors' code. It gives row i the k-th smallest draw, where k is the row that has the
            i-th largest cosine, which is the inverse of the assignment in the paper. With draws 0.4, 0.5, 0.6 and
            cosines 0.1, 0.9, 0.5 the paper's margins are 0.6, 0.4, 0.5, the code's 0.5, 0.6, 0.4.

    Attributes:
        step: 0-dim int64 buffer, number of training steps.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if an argument is out of its range.

    >>> import torch, fused_arcface as fa
    >>> head = fa.MarginHead(8, 100, margin=ElasticFace(0.5, 0.05))
    >>> loss = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 99]))
    >>> head.margin.step, head.margin(torch.tensor([1.0]))
    (tensor(1), tensor([0.8776]))
    """

    step: Tensor

    def __init__(
        self,
        margin: float = 0.5,
        std: float = 0.05,
        kind: Kind = "arc",
        plus: bool = False,
        boundary: Boundary = "none",
        seed: int = 0,
        form: Form = "paper",
    ) -> None:
        super().__init__()
        check_choice(self, "kind", kind, Kind)
        check_choice(self, "form", form, Form)
        check_number(self, "margin", margin, ANGLE if kind == "arc" else DIFFERENCE)
        check_number(self, "std", std, FROM_0)
        check_choice(self, "boundary", boundary, Boundary)
        check_seed(seed, "ElasticFace: seed")
        self.margin, self.std, self.kind, self.plus = margin, std, kind, bool(plus)
        self.boundary, self.seed, self.form = boundary, seed, form
        self.register_buffer("step", self._initial("step", 0, torch.int64))

    def forward(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,) with the mean margin."""
        return self._modify(target_cosine, torch.full_like(target_cosine, self.margin))

    def for_rows(self, norms: Tensor, counted: Tensor) -> RowMargin:
        """Return the batch's :class:`fused_arcface.margins.RowMargin`."""
        if not self.training:
            return RowMargin(self)
        self.step.add_(1)
        key = fold_each(fold(self.seed, MARGINS), self.step.to(norms.device))
        draws = normal_rows(key, torch.arange(norms.shape[0], device=norms.device), 1).squeeze(1)
        margins = self.margin + self.std * draws.to(norms.dtype)

        def modify(target_cosine: Tensor) -> Tensor:
            if not self.plus:
                return self._modify(target_cosine, margins)
            return self._modify(target_cosine, _by_difficulty(margins, target_cosine, counted, self.form))

        return RowMargin(modify)

    def _modify(self, target_cosine: Tensor, margins: Tensor) -> Tensor:
        if self.kind == "cos":
            return target_cosine - margins
        return with_angle(target_cosine, margins, self.boundary)

    def extra_repr(self) -> str:
        names = ("margin", "std", "kind", "plus", "boundary", "seed", "form")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _by_difficulty(margins: Tensor, target_cosine: Tensor, counted: Tensor, form: Form) -> Tensor:
    """Assign margins (N,) to rows by target cosine. Ignored rows keep theirs."""
    # The rows that are not ignored come first, by descending cosine, and so do their margins, ascending.
    order = target_cosine.detach().masked_fill(~counted, -torch.inf).argsort(descending=True, stable=True)
    ascending = margins.masked_fill(~counted, torch.inf).sort().values
    if form == "paper":
        return torch.where(counted, torch.empty_like(margins).scatter(0, order, ascending), margins)
    index = (counted.cumsum(0) - 1).clamp(min=0)  # of a row among those that are not ignored
    return torch.where(counted, ascending[index[order[index]]], margins)


ENTRIES = (
    Entry(
        AdaFace,
        "cos(θ − m·ẑ) − (m + m·ẑ), ẑ from the norm",
        "AdaFace, 2204.00964",
        lambda: [trained(AdaFace(), norm_mean=3.0, norm_std=2.0)],
        'the authors\' CVLface has gradient="straight_through"',
    ),
    Entry(
        MagFace,
        "cos(θ + m(a)), plus λ·(a/u² + 1/a) in the loss, a the norm",
        "MagFace, 2103.06627",
        lambda: [MagFace(lower_norm=0.7, upper_norm=6.0, boundary=boundary) for boundary in ("easy", "hard")],
        'boundary "easy" as in the authors\' code; the paper has cos(θ + m) everywhere',
    ),
    Entry(
        ElasticFace,
        "cos(θ + m) or cos θ − m, m drawn from N(margin, std²)",
        "ElasticFace, 2109.09416",
        lambda: [ElasticFace(0.5, 0.1), ElasticFace(0.35, 0.1, kind="cos", plus=True)],
        "with plus=True the paper's assignment; the authors' code is form=\"code\"",
    ),
)
"""The rows of :mod:`.registry` for the margins of this module."""
