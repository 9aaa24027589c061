"""Margins that also change the negatives above a threshold, which depends on the row.

Each has a method ``modulate``, see :class:`fused_arcface.margins.Modulation`. A backend that does not support them
raises an error. On a GPU ``backend="auto"`` then selects plain PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..base.checks import check_size
from ..base.ranges import ABOVE_0_TO_1, Range
from .angular import SIN_FLOOR, ArcFace, Boundary, CombinedMargin, CosFace, Form, GradientMode
from .checks import ANGLE, FACTOR, check_choice, check_number
from .entry import Entry, trained
from .protocol import Margin, Modulation
from .state import StatefulMargin

Kind = Literal["adaptive", "fixed"]


def _check_target_margin(owner: object, margin: object) -> None:
    """Check that a margin inside another is a function of the target's cosine alone."""
    wrong = not callable(margin) or isinstance(margin, (nn.Module, type))
    if wrong or any(hasattr(margin, method) for method in ("for_rows", "for_labels", "modulate")):
        rule = "must be a function of the target's cosine alone, such as ArcFace or CosFace"
        got = f"the class {margin.__name__}" if isinstance(margin, type) else type(margin).__name__
        raise TypeError(f"{type(owner).__name__}: margin {rule}; got {got}")


def _without_boundary(margin: Margin) -> Margin:
    """Return the margin with its formula also past π, as public codes use it in the comparison with negatives."""
    if type(margin) is ArcFace or type(margin) is CombinedMargin:  # a subclass may compute something else
        return replace(margin, boundary="none")
    return margin


def _coefficients(like: Tensor, *numbers: Tensor | float) -> Tensor:
    """Return the coefficients of a :class:`Modulation`, on the device of ``like``."""
    place: dict[str, Any] = {"dtype": torch.float64, "device": like.device}
    # A GPU fills a tensor with a number by itself; for torch.as_tensor the host copies it there, and waits.
    return torch.stack(
        [each.to(**place) if isinstance(each, Tensor) else torch.full((), each, **place) for each in numbers]
    )


@dataclass(frozen=True)
class MVSoftmax:
    """A margin ``f`` on the target, and more weight for the misclassified negatives (MV-Softmax, arXiv:1912.00833).

    Misclassified are negatives with ``cos θ_j > f(θ_y)``. The paper multiplies their exponential ``e^(s·cos θ_j)`` by
    ``h``:

    - adaptive: ``h = e^(s·(t - 1)·(cos θ_j + 1))``, so the logit becomes ``s·(t·cos θ_j + t - 1)``;
    - fixed: ``h = e^(s·(t - 1))``, so the logit becomes ``s·(cos θ_j + t - 1)``.

    With ``t = 1`` nothing changes.

    ``form`` selects one of two published forms of ``f``:

    - ``"code"``, the authors' code in FaceX-Zoo. CosFace leaves its margin off targets with ``cos θ_y <= m``, and
      negatives are compared with ``cos θ_y - m`` there too. Negatives of ArcFace and CombinedMargin are compared with
      the margin's formula without a boundary, such as ``cos(θ_y + m)``. ``MVSoftmax(ArcFace(m, boundary="easy"))`` is
      that code's ``MV_Softmax(is_am=False)``, ``MVSoftmax(CosFace(m))`` its ``MV_Softmax(is_am=True)``.
    - ``"paper"``: the same modified cosine on the target and in the comparison.

    A target at cos θ_y = 0.2, one negative at 0.1, ``CosFace(0.35)``, s = 32 and t = 1.12: the loss is 1.33 with
    ``"code"``, whose target stays 0.2, and 12.22 with ``"paper"``, whose target becomes -0.15.

    Args:
        margin: ``f``, a function of the target's cosine alone.
        t: weight of the hard negatives, in [1, 4].
        kind: ``"adaptive"`` or ``"fixed"``.
        form: ``"code"`` or ``"paper"``.

    Raises:
        TypeError: if ``margin`` is not a function of the cosine alone, or t is not a number.
        ValueError: if t is out of its range, or kind or form is none of those listed.

    >>> import torch, fused_arcface as fa
    >>> x, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    >>> margin = MVSoftmax(fa.CosFace(0.1), t=1.5)
    >>> fa.margin_softmax_loss(x, w, torch.tensor([0]), scale=1.0, margin=margin)  # log(1 + e^(1.7 - 0.5))
    tensor(1.4633)
    """

    margin: Margin = ArcFace()
    t: float = 1.12
    kind: Kind = "adaptive"
    form: Form = "code"

    def __post_init__(self) -> None:
        _check_target_margin(self, self.margin)
        check_number(self, "t", self.t, FACTOR)
        check_choice(self, "kind", self.kind, Kind)
        check_choice(self, "form", self.form, Form)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,)."""
        modified = self.margin(target_cosine)
        if self.form == "code" and type(self.margin) is CosFace:
            return torch.where(target_cosine > self.margin.margin, modified, target_cosine)
        return modified

    def modulate(self, target_cosine: Tensor, counted: Tensor) -> Modulation:
        """Return the batch's :class:`fused_arcface.margins.Modulation`."""
        slope = self.t if self.kind == "adaptive" else 1.0
        coefficients = _coefficients(target_cosine, 0, slope, self.t - 1)
        compared = _without_boundary(self.margin) if self.form == "code" else self.margin
        return Modulation(compared(target_cosine), coefficients, slope + self.t - 1, slope)


@dataclass(frozen=True)
class InterclassFilter:
    """A margin on the target, and cosine 0 for negatives above a threshold.

    Such negatives may be the same person under another label. insightface calls the threshold
    ``interclass_filtering_threshold``.

    Args:
        margin: margin of the target, a function of its cosine alone.
        threshold: cosine in (-1, 1).

    Raises:
        TypeError: if ``margin`` is not a function of the cosine alone, or the threshold is not a number.
        ValueError: if the threshold is out of its range.

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
        check_number(self, "threshold", self.threshold, Range("in (-1, 1)", -1, 1, has_low=False))

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,)."""
        return self.margin(target_cosine)

    def modulate(self, target_cosine: Tensor, counted: Tensor) -> Modulation:
        """Return the batch's :class:`fused_arcface.margins.Modulation`."""
        threshold = torch.full_like(target_cosine, self.threshold)
        return Modulation(threshold, _coefficients(target_cosine, 0, 0, 0), 1.0, 1.0)


@dataclass(frozen=True)
class InterTopK:
    """A margin on the target, and a penalty on the row's k hardest negatives (Inter-TopK, arXiv:2110.05042).

    The k negatives with the greatest cosines get the logit ``s·cos(θ_j - penalty)``: they look nearer than they are.
    The speaker toolkits WeSpeaker and ESPnet call penalty ``mp`` and k ``k_top``. With sub-centers a negative's cosine
    is that of its class's nearest center.

    To find the k greatest cosines costs one more product with the class centers in the forward pass, in blocks of
    classes. Negatives whose cosines differ by less than the rounding of a product may change
    places. If the k-th and the next one are equal, neither they nor others equal to them have the penalty.

    Args:
        margin: margin of the target, a function of its cosine alone.
        penalty: angle in radians that is subtracted, in [0, π).
        k: number of negatives with the penalty, at least 1; all, if there are fewer.

    Attributes:
        num_hardest: ``k + 1``, see :class:`fused_arcface.margins.Modulation`.

    Raises:
        TypeError: if ``margin`` is not a function of the cosine alone, penalty is not a number or k not an int.
        ValueError: if penalty or k is out of its range.

    >>> import torch, fused_arcface as fa
    >>> x, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    >>> margin = InterTopK(fa.NormSoftmax(), penalty=0.1, k=1)
    >>> fa.margin_softmax_loss(x, w, torch.tensor([0]), scale=1.0, margin=margin)  # 0.8 becomes cos(acos 0.8 - 0.1)
    tensor(0.9306)
    """

    margin: Margin = ArcFace()
    penalty: float = 0.06
    k: int = 5

    def __post_init__(self) -> None:
        _check_target_margin(self, self.margin)
        check_number(self, "penalty", self.penalty, ANGLE)
        check_size("InterTopK: k", self.k)

    turns_negatives: ClassVar[bool] = True

    @property
    def num_hardest(self) -> int:
        return self.k + 1

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,)."""
        return self.margin(target_cosine)

    def modulate(self, target_cosine: Tensor, counted: Tensor, hardest: Tensor) -> Modulation:
        """Return the batch's :class:`fused_arcface.margins.Modulation`; ``hardest`` is (N, k + 1)."""
        threshold = hardest[:, -2:].mean(1)  # in the middle, so that rounding does not move a negative over it
        cosine, sine = math.cos(self.penalty), math.sin(self.penalty)
        # A bound for all penalties: with one for each penalty, torch.compile would make a graph for each value.
        steepest = math.hypot(1, 1 / SIN_FLOOR)
        return Modulation(threshold, _coefficients(target_cosine, 0, cosine, 0, sine), 1.0, steepest)


class CurricularFace(StatefulMargin):
    """ArcFace on the target, and a weight for hard negatives that grows in training (CurricularFace, arXiv:2004.00288).

    Negatives with ``cos θ_j > cos(θ_y + m)`` get the logit ``s·cos θ_j·(t + cos θ_j)``. The comparison uses
    ``cos(θ_y + m)`` past π as well, whatever the boundary gives the target there. Both public codes, the authors' and
    FaceX-Zoo's, do so.

    In training each batch first updates ``t ← (1 - rate)·t + rate·mean(cos θ_y)``, without a gradient. The mean leaves
    out rows that are ignored or not finite. t starts at 0, where hard negatives have little weight, and grows as the
    embeddings approach their centers.

    Args:
        margin: angle in radians that is added to the target's, in [0, π).
        rate: rate of the running mean, in (0, 1].
        boundary: as for :class:`fused_arcface.ArcFace`.
        gradient: as for :class:`fused_arcface.ArcFace`.

    Attributes:
        t: 0-dim fp32 buffer, the running mean.

    Raises:
        TypeError: if margin or rate is not a number.
        ValueError: if an argument is out of its range.

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
        check_number(self, "margin", margin, ANGLE)
        check_number(self, "rate", rate, ABOVE_0_TO_1)
        self.of_target, self.rate = ArcFace(margin, boundary, gradient), rate
        self.register_buffer("t", self._initial("t", 0.0))

    def forward(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,)."""
        return self.of_target(target_cosine)

    def modulate(self, target_cosine: Tensor, counted: Tensor) -> Modulation:
        """Return the batch's :class:`fused_arcface.margins.Modulation`."""
        if self.training:
            counted = counted & target_cosine.isfinite()
            mean = target_cosine.masked_fill(~counted, 0).sum() / counted.sum()
            self.t.copy_(torch.where(counted.any(), (1 - self.rate) * self.t + self.rate * mean, self.t))
        # If reading t would wait for a GPU, its upper bound.
        t = 1.0 if torch.compiler.is_compiling() or self.t.device.type != "cpu" else abs(float(self.t))
        threshold = _without_boundary(self.of_target)(target_cosine)
        return Modulation(threshold, _coefficients(target_cosine, 1, self.t, 0), 1 + t, 2 + t)

    def extra_repr(self) -> str:
        margin, boundary, gradient = self.of_target.margin, self.of_target.boundary, self.of_target.gradient
        return f"margin={margin}, rate={self.rate}, boundary={boundary!r}, gradient={gradient!r}"


ENTRIES = (
    Entry(
        CurricularFace,
        "cos(θ + m); negatives above it c·(t + c)",
        "CurricularFace, 2004.00288",
        lambda: [trained(CurricularFace(), t=0.4)],
    ),
    Entry(
        MVSoftmax,
        "f(θ); negatives above it t·c + t − 1 or c + t − 1",
        "MV-Softmax, 1912.00833",
        lambda: [MVSoftmax(CosFace(0.35), t=1.5), MVSoftmax(t=1.5, kind="fixed")],
        "FaceX-Zoo's, the authors' code; the paper's formulas are form=\"paper\"",
    ),
    Entry(
        InterclassFilter,
        "f(θ); negatives above a threshold 0",
        "insightface, interclass_filtering_threshold",
        lambda: [InterclassFilter(ArcFace(), 0.2)],
        "threshold 0.4; insightface filters only if a threshold is given",
    ),
    Entry(
        InterTopK,
        "f(θ); the k greatest negatives cos(θ − penalty)",
        "Inter-TopK, 2110.05042",
        lambda: [InterTopK(ArcFace(0.2, "continuous"), penalty=0.06, k=2)],
        'ArcFace(0.5) on the target; WeSpeaker\'s recipes have ArcFace(0.2, "continuous")',
    ),
)
"""The rows of :mod:`.registry` for the margins of this module."""
