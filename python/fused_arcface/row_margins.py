"""Margins that differ from row to row: by the embedding's norm, or by chance.

Each has ``for_rows``, see :class:`fused_arcface.margins.RowMargin`. Called on cosines alone they give the curve of a row
in the middle: of the mean norm, or with the mean margin. Those with a state are modules: as the ``margin`` of a head
they are part of its ``state_dict``, follow its ``train()`` and ``eval()``, and are the same on every rank, since every
rank sees all ranks' rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .margins import RowMargin, angle, check_number

# AdaFace's ε: of the angles that are clipped to [ε, π - ε] and of the deviation that norms are divided by.
_EPSILON = 1e-3


class AdaFace(nn.Module):
    """``s·(cos(clip(θ - m·ẑ, ε, π - ε)) - (m + m·ẑ))``: the better the image, the more it is asked for (arXiv:2204.00964,
    eq. 16).

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
