"""Margins that change the negatives as well: those above a threshold, which depends on the row's target cosine.

Each has ``modulate``, see :class:`fused_arcface.margins.Modulation`. They need a backend that takes such negatives; the
others say so. With ``backend="auto"`` on a GPU that is the reference, which stores the N×C logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .margin_state import StatefulMargin
from .margins import ArcFace, Boundary, GradientMode, Margin, Modulation, check_angle, check_choice, check_number

Kind = Literal["adaptive", "fixed"]


def _check_target_margin(owner: object, margin: object) -> None:
    """The margin of the target inside another: a function of its cosine alone."""
    wrong = not callable(margin) or isinstance(margin, (nn.Module, type))
    if wrong or hasattr(margin, "for_rows") or hasattr(margin, "modulate"):
        rule = "must be a function of the target's cosine alone, such as ArcFace or CosFace"
        got = f"the class {margin.__name__}" if isinstance(margin, type) else type(margin).__name__
        raise TypeError(f"{type(owner).__name__}: margin {rule}; got {got}")


def _coefficients(like: Tensor, a: Tensor | float, b: Tensor | float, d: Tensor | float) -> Tensor:
    values = [torch.as_tensor(value, dtype=torch.float64, device=like.device) for value in (a, b, d)]
    return torch.stack(values)


@dataclass(frozen=True)
class MVSoftmax:
    """A margin ``f`` on the target, and more weight for negatives with ``cos θ_j > f(θ_y)``, the misclassified ones
    (MV-Softmax, arXiv:1912.00833).

    In the paper their exponential ``e^(s·cos θ_j)`` is multiplied by ``h``, adaptive
    ``h = e^(s·(t - 1)·(cos θ_j + 1))`` or fixed ``h = e^(s·(t - 1))``: the logit becomes ``s·(t·cos θ_j + t - 1)`` or
    ``s·(cos θ_j + t - 1)``. With ``t = 1`` nothing changes. FaceX-Zoo's ``MV_Softmax`` is the adaptive one, with
    ArcFace's margin left off targets past 90° (``boundary="easy"``), where it nevertheless compares with
    ``cos(θ_y + m)``; here it is the modified cosine in both places, as in the paper.

    Args:
        margin: ``f``, of the target: a function of its cosine alone.
        t: weight of the hard negatives, in [1, 4].
        kind: ``"adaptive"`` or ``"fixed"``.

    Raises:
        TypeError: a margin that is none, or depends on more than a cosine; a weight that is not a number.
        ValueError: a weight out of its range, or another kind.

    >>> import torch, fused_arcface as fa
    >>> x, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    >>> margin = MVSoftmax(fa.CosFace(0.1), t=1.5)
    >>> fa.margin_softmax_loss(x, w, torch.tensor([0]), scale=1.0, margin=margin)  # log(1 + e^(1.7 - 0.5))
    tensor(1.4633)
    """

    margin: Margin = ArcFace()
    t: float = 1.12
    kind: Kind = "adaptive"

    def __post_init__(self) -> None:
        _check_target_margin(self, self.margin)
        check_number(self, "t", self.t, "[1, 4]", 1, 4, closed=True)
        check_choice(self, "kind", self.kind, Kind)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Modified cosines (N,) of target cosines (N,)."""
        return self.margin(target_cosine)

    def modulate(self, target_cosine: Tensor, counted: Tensor) -> Modulation:
        """See :class:`fused_arcface.margins.Modulation`."""
        slope = self.t if self.kind == "adaptive" else 1.0
        coefficients = _coefficients(target_cosine, 0, slope, self.t - 1)
        return Modulation(self.margin(target_cosine), coefficients, slope + self.t - 1, slope)


@dataclass(frozen=True)
class InterclassFilter:
    """A margin on the target, and cosine 0 for negatives above a threshold: these may be the same person under another
    label (insightface's ``interclass_filtering_threshold``).

    Args:
        margin: of the target: a function of its cosine alone.
        threshold: in (-1, 1).

    Raises:
        TypeError: a margin that is none, or depends on more than a cosine; a threshold that is not a number.
        ValueError: a threshold out of its range.

    >>> import torch, fused_arcface as fa
    >>> x, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    >>> margin = InterclassFilter(fa.NormSoftmax(), threshold=0.4)
    >>> fa.margin_softmax_loss(x, w, torch.tensor([0]), scale=1.0, margin=margin)  # log(1 + e^(0 - 0.6))
    tensor(0.4375)
    """

    margin: Margin = ArcFace()
    threshold: float = 0.4

    def __post_init__(self) -> None:
        _check_target_margin(self, self.margin)
        check_number(self, "threshold", self.threshold, "(-1, 1)", math.nextafter(-1, 0), 1, closed=False)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Modified cosines (N,) of target cosines (N,)."""
        return self.margin(target_cosine)

    def modulate(self, target_cosine: Tensor, counted: Tensor) -> Modulation:
        """See :class:`fused_arcface.margins.Modulation`."""
        threshold = torch.full_like(target_cosine, self.threshold)
        return Modulation(threshold, _coefficients(target_cosine, 0, 0, 0), 1.0, 1.0)


class CurricularFace(StatefulMargin):
    """ArcFace on the target, and ``s·cos θ_j·(t + cos θ_j)`` for negatives with ``cos θ_j`` above the target's modified
    cosine (CurricularFace, arXiv:2004.00288).

    ``t ← (1 - rate)·t + rate·mean(cos θ_y)`` in training, before a batch is judged, without a gradient; rows that are
    ignored or not finite do not count. It starts at 0, where hard negatives weigh little, and grows as the targets come
    nearer.

    Args:
        margin: of the target, in radians; in [0, π).
        rate: of the running mean, in (0, 1].
        boundary, gradient: as of :class:`fused_arcface.ArcFace`.

    Attributes:
        t: 0-dim fp32 buffer.

    Raises:
        TypeError: an argument that is not a number.
        ValueError: a value out of its range.

    >>> import torch, fused_arcface as fa
    >>> head = fa.MarginHead(8, 100, margin=CurricularFace())
    >>> loss = head(head.weight[:2], torch.tensor([0, 1]))  # cos θ_y = 1
    >>> head.margin.t
    tensor(0.0100)
    """

    t: Tensor

    def __init__(
        self,
        margin: float = 0.5,
        rate: float = 0.01,
        boundary: Boundary = "hard",
        gradient: GradientMode = "exact",
    ) -> None:
        super().__init__()
        check_angle(self, "margin", margin)
        check_number(self, "rate", rate, "(0, 1]", math.ulp(0), 1, closed=True)
        self.of_target, self.rate = ArcFace(margin, boundary, gradient), rate
        self.register_buffer("t", torch.tensor(0.0))

    def forward(self, target_cosine: Tensor) -> Tensor:
        """Modified cosines (N,) of target cosines (N,)."""
        return self.of_target(target_cosine)

    def modulate(self, target_cosine: Tensor, counted: Tensor) -> Modulation:
        """See :class:`fused_arcface.margins.Modulation`."""
        if self.training:
            counted = counted & target_cosine.isfinite()
            mean = target_cosine.masked_fill(~counted, 0).sum() / counted.sum()
            self.t.copy_(torch.where(counted.any(), (1 - self.rate) * self.t + self.rate * mean, self.t))
        # Where t cannot be read without waiting for it, the greatest that it may be.
        t = 1.0 if torch.compiler.is_compiling() or self.t.device.type != "cpu" else abs(float(self.t))
        return Modulation(self.of_target(target_cosine), _coefficients(target_cosine, 1, self.t, 0), 1 + t, 2 + t)

    def extra_repr(self) -> str:
        margin, boundary, gradient = self.of_target.margin, self.of_target.boundary, self.of_target.gradient
        return f"margin={margin}, rate={self.rate}, boundary={boundary!r}, gradient={gradient!r}"
