"""Scales that adapt to the training. A head takes them as its ``scale``."""

from __future__ import annotations

import math
from typing import Union

import torch
from torch import Tensor

from .state import StatefulMargin

Scale = Union[float, Tensor, "AdaCos"]
"""The scale of a head: a number, a 0-dim parameter, or :class:`AdaCos`."""


class AdaCos(StatefulMargin):
    """A scale that adapts to the batch, for ``scale=``: the dynamic scale of AdaCos (arXiv:1905.00292, eq. 15 to 17).

    In training each step sets ``s ← ln B / cos(min(π/4, θ_med))`` and uses the result. B is the mean over the rows of
    ``Σ_{j≠y} e^(s·cos θ_j)`` with the scale of the step before, θ_med the median of the targets' angles, the lower one
    of two. The first step begins with ``√2·ln(C - 1)``. Rows are those of all ranks; ignored ones and those that are
    not finite are left out. With ``sample_rate < 1`` the sum is over the step's classes. In ``eval()`` the scale stays
    as it is. If all negatives are far, the formula gives a number that is not above 0; it is dropped.

    B is of the same batch, so the scale is known after a pass over the classes. On a CPU that pass is enough if the
    step changes the scale by at most 1. Otherwise a second pass follows, at the cost of half a forward pass. On a GPU,
    compiled, with sub-centers, and with ``CenterSGD`` it always follows. ``delayed=True`` saves that pass: a step then
    uses the scale that the step before has computed.

    Args:
        delayed: use each scale one step later, at no cost over the classes.

    Attributes:
        scale: (1,) fp64 buffer, 0 before the first step.

    >>> import torch, fused_arcface as fa
    >>> head = fa.MarginHead(8, 100, margin=fa.NormSoftmax(), scale=fa.AdaCos())
    >>> loss = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 99]))
    >>> bool(head.scale.scale > 0)
    True
    """

    scale: Tensor

    def __init__(self, delayed: bool = False) -> None:
        super().__init__()
        if not isinstance(delayed, bool):
            raise TypeError(f"AdaCos: delayed must be a bool; got {type(delayed).__name__}")
        self.delayed = delayed
        # Not 0-dim: torch.compile takes such a CPU tensor in fp64 for a Python float, and loses its changes.
        self.register_buffer("scale", self._initial("scale", torch.zeros(1, device="cpu"), torch.float64))

    def current(self, num_classes: int) -> Tensor:
        """Return the scale as it is now, 0-dim fp64, a copy."""
        first = torch.full_like(self.scale, math.sqrt(2) * math.log(num_classes - 1))
        return torch.where(self.scale > 0, self.scale, first).squeeze(0)

    def rescale(self, negative_lse: Tensor, target_cosine: Tensor, counted: Tensor, scale: Tensor) -> Tensor:
        """Update the scale by a batch and return it, 0-dim fp64, a copy.

        Args:
            negative_lse: (N,) ``ln Σ_{j≠y} e^(scale·cos θ_j)`` of all ranks' rows.
            target_cosine: (N,).
            counted: (N,) bool, false for ignored rows.
            scale: 0-dim, the scale of the step before.
        """
        lse, cosine = negative_lse.detach().double(), target_cosine.detach().double()
        counted = counted & lse.isfinite() & cosine.isfinite()
        count = counted.sum()
        log_mean = lse.masked_fill(~counted, -torch.inf).logsumexp(0) - count.double().log()
        angles = cosine.clamp(-1, 1).acos().masked_fill(~counted, torch.inf).sort().values
        # One angle more, so that a batch without rows has a median too.
        angles = torch.cat([angles, angles.new_zeros(1)])
        median = angles.gather(0, ((count - 1) // 2).clamp(min=0)[None]).squeeze(0)
        new = log_mean / median.clamp(max=math.pi / 4).cos()
        new = torch.where((count > 0) & new.isfinite() & (new > 0), new, scale)
        self.scale.copy_(new)
        return new

    def extra_repr(self) -> str:
        return f"delayed={self.delayed}" if self.delayed else ""
