"""Margins that differ from row to row: by the embedding's norm, or by chance.

Each has ``for_rows``, see :class:`fused_arcface.margins.RowMargin`. Called on cosines alone they give the curve of a
row in the middle: of the mean norm, or with the mean margin. Those with a state are modules: as the ``margin`` of a
head they are part of its ``state_dict``, follow its ``train()`` and ``eval()``, and are the same on every rank, since
every rank sees all ranks' rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_size
from .keyed import MARGINS, fold, fold_each, normal_rows
from .margin_state import StatefulMargin
from .margins import Boundary, RowMargin, angle, check_angle, check_choice, check_number, past_boundary

Kind = Literal["arc", "cos"]

# AdaFace's ε: of the angles that are clipped to [ε, π - ε] and of the deviation that norms are divided by.
_EPSILON = 1e-3


class AdaFace(StatefulMargin):
    """``s·(cos(clip(θ - m·ẑ, ε, π - ε)) - (m + m·ẑ))``: the better an image, the more is asked of it (AdaFace,
    arXiv:2204.00964).

    ``ẑ = clip(h·(|x| - μ)/(σ + ε), -1, 1)`` stands for the image's quality, with ``ε = 1e-3``, norms clipped to [1e-3,
    100] and without a gradient, μ and σ the running mean and deviation of the norms. They are updated by each batch in
    training, before it is judged; rows that are ignored or not finite do not count.

    Args:
        margin: ``m``, in radians and in units of the cosine; in [0, π).
        h: how many deviations make the margin's full range; finite and >= 0.
        rate: of the running mean and deviation, ``μ ← (1 - rate)·μ + rate·mean``; in (0, 1].

    Attributes:
        norm_mean, norm_std: 0-dim fp32 buffers, μ and σ, at first 20 and 100.

    Raises:
        TypeError: an argument that is not a number.
        ValueError: one out of its range.

    >>> import torch, fused_arcface as fa
    >>> head = fa.MarginHead(8, 100, margin=AdaFace())
    >>> loss = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 99]))
    >>> bool(head.margin.norm_mean < 20), AdaFace(margin=0.4)(torch.tensor([0.9]))
    (True, tensor([0.5000]))
    """

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, margin: float = 0.4, h: float = 0.333, rate: float = 0.01) -> None:
        super().__init__()
        check_number(self, "margin", margin, "[0, π) radians", 0, math.pi, closed=False)
        check_number(self, "h", h, "[0, inf)", 0, math.inf, closed=False)
        check_number(self, "rate", rate, "(0, 1]", math.ulp(0), 1, closed=True)
        self.margin, self.h, self.rate = margin, h, rate
        self.register_buffer("norm_mean", torch.tensor(20.0))
        self.register_buffer("norm_std", torch.tensor(100.0))

    def forward(self, target_cosine: Tensor) -> Tensor:
        """Modified cosines (N,) of target cosines (N,) for embeddings of the mean norm."""
        return self._modify(target_cosine, 0.0)

    def for_rows(self, norms: Tensor, counted: Tensor) -> RowMargin:
        """See :class:`fused_arcface.margins.RowMargin`."""
        counted, norms = counted & norms.isfinite(), norms.detach().clamp(1e-3, 100)
        if self.training:
            self._update(norms, counted)
        deviations = (norms - self.norm_mean) / (self.norm_std + _EPSILON)
        quality = (self.h * deviations).clamp(-1, 1).to(norms.dtype)
        return RowMargin(lambda target_cosine: self._modify(target_cosine, quality))

    def _modify(self, target_cosine: Tensor, quality: Tensor | float) -> Tensor:
        theta = angle(target_cosine) - self.margin * quality
        return theta.clamp(_EPSILON, math.pi - _EPSILON).cos() - (self.margin + self.margin * quality)

    @torch.no_grad()
    def _update(self, norms: Tensor, counted: Tensor) -> None:
        """The running statistics after a batch; the deviation (with n - 1) only if it has two rows."""
        count = counted.sum()
        mean = norms.masked_fill(~counted, 0).sum() / count
        std = ((norms - mean).masked_fill(~counted, 0).square().sum() / (count - 1)).sqrt()
        for running, batch, least in ((self.norm_mean, mean, 1), (self.norm_std, std, 2)):
            running.copy_(torch.where(count >= least, (1 - self.rate) * running + self.rate * batch, running))

    def extra_repr(self) -> str:
        return f"margin={self.margin}, h={self.h}, rate={self.rate}"


@dataclass(frozen=True)
class MagFace:
    """``s·cos(θ + m(a))`` with a margin and a penalty that depend on the embedding's norm (MagFace,
    arXiv:2103.06627).

    With ``a`` the norm clipped to [lower_norm, upper_norm], ``m(a)`` rises linearly from lower_margin to upper_margin,
    and ``λ·(a / upper_norm² + 1/a)`` is added to each row's loss. Both have a gradient through the norm, which is what
    teaches it to tell an image's quality; past the limits there is none.

    Args:
        lower_margin, upper_margin: in radians, 0 <= lower <= upper < π.
        lower_norm, upper_norm: 0 < lower < upper, finite.
        penalty: ``λ``, finite and >= 0; 35 in the paper.
        boundary: what happens past ``θ + m = π``, see :mod:`fused_arcface.margins`.

    Raises:
        TypeError: a number that is none.
        ValueError: a value out of its range.

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
    boundary: Boundary = "hard"

    def __post_init__(self) -> None:
        check_angle(self, "lower_margin", self.lower_margin)
        check_number(self, "upper_margin", self.upper_margin, "[lower_margin, π)", self.lower_margin, math.pi, False)
        check_number(self, "lower_norm", self.lower_norm, "(0, inf)", math.ulp(0), math.inf, closed=False)
        above = math.nextafter(self.lower_norm, math.inf)
        check_number(self, "upper_norm", self.upper_norm, "(lower_norm, inf)", above, math.inf, closed=False)
        check_number(self, "penalty", self.penalty, "[0, inf)", 0, math.inf, closed=False)
        check_choice(self, "boundary", self.boundary, Boundary)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Modified cosines (N,) of target cosines (N,) for norms in the middle of their range."""
        middle = (self.lower_norm + self.upper_norm) / 2
        return self._modify(target_cosine, torch.full_like(target_cosine, middle))

    def for_rows(self, norms: Tensor, counted: Tensor) -> RowMargin:
        """See :class:`fused_arcface.margins.RowMargin`."""
        clipped = norms.clamp(self.lower_norm, self.upper_norm)
        penalty = self.penalty * (clipped / self.upper_norm**2 + 1 / clipped)
        return RowMargin(lambda target_cosine: self._modify(target_cosine, clipped), penalty)

    def _modify(self, target_cosine: Tensor, norms: Tensor) -> Tensor:
        rise = (self.upper_margin - self.lower_margin) / (self.upper_norm - self.lower_norm)
        margin = self.lower_margin + rise * (norms - self.lower_norm)
        return past_boundary(angle(target_cosine) + margin, target_cosine, margin * margin.sin(), self.boundary)


class ElasticFace(StatefulMargin):
    """``s·cos(θ + m)`` or ``s·(cos θ - m)`` with ``m`` drawn from N(margin, std²) for each row of each training step
    (ElasticFace, arXiv:2109.09416).

    A draw is a function of seed, step and the row's place among all ranks' rows: every rank draws the same. In
    ``eval()`` each row has the mean margin.

    Args:
        margin: the mean; an angle in [0, π) radians, or for ``kind="cos"`` in [0, 2).
        std: deviation; finite and >= 0.
        kind: ``"arc"`` or ``"cos"``.
        plus: give the batch's larger draws to the rows of smaller target cosine (ElasticFace+).
        boundary: with ``kind="arc"``, what happens past ``θ + m = π``, see :mod:`fused_arcface.margins`. The default
            is the paper's.
        seed: of the draws; in [0, 2^63).

    Attributes:
        step: 0-dim int64 buffer, training steps so far.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: one out of its range.

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
    ) -> None:
        super().__init__()
        check_choice(self, "kind", kind, Kind)
        if kind == "arc":
            check_angle(self, "margin", margin)
        else:
            check_number(self, "margin", margin, "[0, 2)", 0, 2, closed=False)
        check_number(self, "std", std, "[0, inf)", 0, math.inf, closed=False)
        check_choice(self, "boundary", boundary, Boundary)
        check_size("ElasticFace: seed", seed, least=0)
        self.margin, self.std, self.kind, self.plus = margin, std, kind, bool(plus)
        self.boundary, self.seed = boundary, seed
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, target_cosine: Tensor) -> Tensor:
        """Modified cosines (N,) of target cosines (N,) with the mean margin."""
        return self._modify(target_cosine, torch.full_like(target_cosine, self.margin))

    def for_rows(self, norms: Tensor, counted: Tensor) -> RowMargin:
        """See :class:`fused_arcface.margins.RowMargin`."""
        if not self.training:
            return RowMargin(self)
        self.step.add_(1)
        key = fold_each(fold(self.seed, MARGINS), self.step.to(norms.device))
        draws = normal_rows(key, torch.arange(norms.shape[0], device=norms.device), 1).squeeze(1)
        margins = self.margin + self.std * draws.to(norms.dtype)

        def modify(target_cosine: Tensor) -> Tensor:
            return self._modify(
                target_cosine, _by_difficulty(margins, target_cosine, counted) if self.plus else margins
            )

        return RowMargin(modify)

    def _modify(self, target_cosine: Tensor, margins: Tensor) -> Tensor:
        if self.kind == "cos":
            return target_cosine - margins
        return past_boundary(angle(target_cosine) + margins, target_cosine, margins * margins.sin(), self.boundary)

    def extra_repr(self) -> str:
        names = ("margin", "std", "kind", "plus", "boundary", "seed")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _by_difficulty(margins: Tensor, target_cosine: Tensor, counted: Tensor) -> Tensor:
    """The same margins (N,), the smallest for the greatest cosine; rows that do not count keep out of it."""
    order = target_cosine.detach().masked_fill(~counted, -torch.inf).argsort(descending=True, stable=True)
    ascending = margins.masked_fill(~counted, torch.inf).sort().values
    return torch.where(counted, torch.empty_like(margins).scatter(0, order, ascending), margins)
