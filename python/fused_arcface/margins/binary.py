"""Losses that judge each class by itself, with a logistic loss of its own: a sum over the classes, and no softmax.

Each has the methods ``binary`` and ``row_losses``, see :class:`fused_arcface.margins.BinaryLosses`. Their bias is a
parameter that is trained with the backbone: give ``head.margin.parameters()`` to its optimizer. The backends of GPUs
refuse them; ``backend="auto"`` then takes plain PyTorch, by blocks of classes and without N×C logits.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import ranges
from ..base.checks import check_size
from ..base.ranges import FROM_0_TO_1, POSITIVE, Range
from .angular import CombinedMargin
from .checks import ABOVE_0, ANGLE, DIFFERENCE, FINITE, check_choice, check_number
from .entry import Entry
from .protocol import BinaryLosses
from .state import KeepsValues

Kind = Literal["cos", "arc"]


def _sharpened(cosine: Tensor, exponent: float) -> Tensor:
    """Return ``g(z) = 2·((z + 1)/2)^exponent - 1``: it keeps -1 and 1, and lowers what lies between."""
    return 2 * ((cosine + 1) / 2).clamp(min=0) ** exponent - 1


class SphereFace2(KeepsValues):
    """Binary classification of each class, with a margin on both sides (SphereFace2, arXiv:2108.01513, eq. 5 to 7).

    With r the head's scale, b the bias and ``g(z) = 2·((z + 1)/2)^t - 1``, a row's loss is

    ``share·softplus(-r·(g(cos θ_y) - m) - b) + (1 - share)·Σ_j softplus(r·(g(cos θ_j) + m) + b)``.

    ``kind="arc"`` has the margin on the angles: ``g(cos(θ_y + m))`` and ``g(cos(θ_j - m))``; past ``θ_y + m = π`` it
    has the boundary ``"continuous"``. WeSpeaker's ``SphereFace2`` is the same. The paper also divides by r: multiply
    the loss by ``1 / scale`` for its size.

    Args:
        margin: ``m``, in [0, 2) for ``kind="cos"``, an angle in [0, π) radians for ``kind="arc"``.
        exponent: ``t`` in [1, 16]; 3 in the paper.
        share: ``λ`` in [0, 1], the weight of the target's loss; 0.7 in the paper.
        kind: ``"cos"`` or ``"arc"``, WeSpeaker's margin types C and A.
        bias: initial bias. With 0, WeSpeaker's, the first losses are large, as C negatives have a loss of some tenths
            each. :meth:`bias_for` returns that of the paper's authors.

    Attributes:
        bias: 0-dim parameter.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range.

    >>> import torch, fused_arcface as fa
    >>> head = fa.MarginHead(8, 100, margin=SphereFace2(bias=SphereFace2().bias_for(100, 32.0)), scale=32.0)
    >>> loss = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 99]))
    >>> loss.backward(); head.margin.bias.grad.shape
    torch.Size([])
    """

    def __init__(
        self, margin: float = 0.2, exponent: float = 3.0, share: float = 0.7, kind: Kind = "cos", bias: float = 0.0
    ) -> None:
        super().__init__()
        check_choice(self, "kind", kind, Kind)
        check_number(self, "margin", margin, ANGLE if kind == "arc" else DIFFERENCE)
        check_number(self, "exponent", exponent, Range("in [1, 16]", 1, 16, has_high=True))
        check_number(self, "share", share, FROM_0_TO_1)
        check_number(self, "bias", bias, FINITE)
        self.margin, self.exponent, self.share, self.kind = margin, exponent, share, kind
        self.initial_bias = bias
        self.bias = nn.Parameter(self._initial("bias", bias))

    def bias_for(self, num_classes: int, scale: float) -> float:
        """Return the authors' initial bias: a row whose cosines are all 0 does not change it.

        The gradient by the target's logit, ``share·sigmoid(-u_y)``, then equals that of its ``C - 1`` negatives.

        Raises:
            TypeError, ValueError: if an argument has a wrong type or is out of its range, or ``share`` is 0 or 1.
        """
        negatives = check_size("num_classes", num_classes, least=2) - 1
        check_number(self, "scale", scale, ABOVE_0)
        check_number(self, "share", self.share, Range("in (0, 1) for bias_for", 0, 1, has_low=False))
        with torch.no_grad():
            zero = torch.zeros((), dtype=torch.float64, device="cpu")
            own = scale * float(self(zero))
            other = scale * float(_sharpened(zero + math.sin(self.margin), self.exponent))
            if self.kind == "cos":
                other = scale * (float(_sharpened(zero, self.exponent)) + self.margin)
        # share/(1 + e^(own + b)) = (1 - share)·(C - 1)/(1 + e^-(other + b)), a quadratic equation in e^b.
        z = self.share / ((1 - self.share) * negatives)
        root = math.sqrt((1 - z) ** 2 + 4 * z * math.exp(min(own - other, 700.0)))
        return math.log(2 * z) - other - math.log(1 - z + root)

    def forward(self, target_cosine: Tensor) -> Tensor:
        """Return ``g`` of target cosines (N,) with the margin, (N,)."""
        if self.kind == "arc":
            turned = CombinedMargin(1.0, self.margin, 0.0, "continuous")(target_cosine)
            return _sharpened(turned, self.exponent)
        return _sharpened(target_cosine, self.exponent) - self.margin

    def binary(self) -> BinaryLosses:
        """Return the :class:`fused_arcface.margins.BinaryLosses` of the negatives."""
        angle, offset = (self.margin, 0.0) if self.kind == "arc" else (0.0, self.margin)
        return BinaryLosses(self.exponent, angle, offset, self.bias)

    def row_losses(self, target_cosine: Tensor, negative_sum: Tensor, scale: float) -> Tensor:
        """Return the rows' losses (N,)."""
        logit = scale * self(target_cosine) + self.bias.to(target_cosine.dtype)
        return self.share * F.softplus(-logit, threshold=40) + (1 - self.share) * negative_sum

    def extra_repr(self) -> str:
        names = ("margin", "exponent", "share", "kind")
        return ", ".join([*(f"{name}={getattr(self, name)!r}" for name in names), f"bias={self.initial_bias}"])


class UniFace(KeepsValues):
    """The unified cross-entropy with a margin: one threshold b for the cosines of all pairs (UniFace, ICCV 2023).

    A row's loss is ``softplus(-(s·(cos θ_y - m) - b)) + weight·Σ_j softplus(s·cos θ_j - b)``, with s the head's scale.
    The authors' code (CVI-SZU/UniFace) also cuts both logits to [-s, s]; a target beyond the cut has no gradient there,
    and has one here.

    Args:
        margin: ``m``, in [0, 2); 0.4 in the paper.
        weight: ``λ``, weight of the negatives' losses, finite and > 0.
        bias: initial ``b``; the authors' is ``UniFace.bias_for(C)``. With 0 the C negatives dominate the first steps.

    Attributes:
        bias: 0-dim parameter.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range.

    >>> import torch, fused_arcface as fa
    >>> head = fa.MarginHead(8, 100, margin=UniFace(bias=UniFace.bias_for(100)))
    >>> loss = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 99]))
    >>> loss.backward(); head.margin.bias.grad.shape
    torch.Size([])
    """

    def __init__(self, margin: float = 0.4, weight: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        check_number(self, "margin", margin, DIFFERENCE)
        check_number(self, "weight", weight, ABOVE_0)
        check_number(self, "bias", bias, FINITE)
        self.margin, self.weight, self.initial_bias = margin, weight, bias
        self.bias = nn.Parameter(self._initial("bias", bias))

    @staticmethod
    def bias_for(num_classes: int, r: float = 1.0) -> float:
        """Return the authors' initial bias, ``ln(10·r·C)``, with r finite and > 0."""
        ranges.check_number("UniFace: r", r, POSITIVE)
        return math.log(10 * r * check_size("num_classes", num_classes))

    def forward(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,)."""
        return target_cosine - self.margin

    def binary(self) -> BinaryLosses:
        """Return the :class:`fused_arcface.margins.BinaryLosses` of the negatives."""
        return BinaryLosses(1.0, 0.0, 0.0, -self.bias)

    def row_losses(self, target_cosine: Tensor, negative_sum: Tensor, scale: float) -> Tensor:
        """Return the rows' losses (N,)."""
        logit = scale * self(target_cosine) - self.bias.to(target_cosine.dtype)
        return F.softplus(-logit, threshold=40) + self.weight * negative_sum

    def extra_repr(self) -> str:
        return f"margin={self.margin}, weight={self.weight}, bias={self.initial_bias}"


ENTRIES = (
    Entry(
        SphereFace2,
        "no softmax: a logistic loss for each class, of g(θ) − m and g(θ) + m",
        "SphereFace2, 2108.01513",
        lambda: [SphereFace2(0.2, bias=-4.0), SphereFace2(0.2, 2.0, 0.6, kind="arc", bias=-2.0)],
        "as WeSpeaker's; the paper's loss is divided by the scale",
    ),
    Entry(
        UniFace,
        "no softmax: a logistic loss for each class, of cos θ − m − b/s and cos θ − b/s",
        "UniFace, ICCV 2023",
        lambda: [UniFace(0.4, bias=3.0), UniFace(0.1, 0.5, bias=6.0)],
        "bias 0; the authors begin with ln(10·C)",
    ),
)
"""The rows of :mod:`.registry` for the margins of this module."""
