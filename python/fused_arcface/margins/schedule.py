"""Margins and scales that change from step to step: a rise as a function of the step, and a part of a margin.

Nothing is saved: a resumed training computes the same values from its step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..base import ranges
from ..base.ranges import FROM_0_TO_1, Range
from .angular import ArcFace, CombinedMargin, CosFace, NormSoftmax, SphereFace
from .checks import check_choice, check_number
from .hard_negatives import InterclassFilter, InterTopK, MVSoftmax
from .protocol import Margin

Shape = Literal["exponential", "linear"]


@dataclass(frozen=True)
class Rise:
    """A share that rises from ``start`` to 1 between two steps: ``share = Rise(1000, 5000)(step)``.

    With ``p`` the part of the way from ``begin`` to ``end``, the share is ``start + (1 - start)·r`` with

    - exponential: ``r = 1 - 0.001^p``, fast at first, as in the recipes of WeSpeaker and 3D-Speaker;
    - linear: ``r = p``.

    Before ``begin`` it is ``start``, from ``end`` on it is 1.

    Args:
        begin: first step of the rise, >= 0. Steps are counted from 0.
        end: step from which the share is 1, > begin.
        start: share before the rise, in [0, 1].
        shape: ``"exponential"`` or ``"linear"``.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range.

    >>> rise = Rise(2, 6, shape="linear")
    >>> [rise(step) for step in range(8)]
    [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    begin: float
    end: float
    start: float = 0.0
    shape: Shape = "exponential"

    def __post_init__(self) -> None:
        check_number(self, "begin", self.begin, Range("in [0, 2^53)", 0, 2**53))
        check_number(self, "end", self.end, Range("in (begin, 2^53)", 0, 2**53))
        check_number(self, "start", self.start, FROM_0_TO_1)
        check_choice(self, "shape", self.shape, Shape)
        if self.end <= self.begin:
            raise ValueError(f"Rise: end must be > begin={self.begin}; got {self.end}")

    def __call__(self, step: float) -> float:
        """Return the share in a step."""
        if step >= self.end:
            return 1.0
        part = max(0.0, (step - self.begin) / (self.end - self.begin))
        risen = part if self.shape == "linear" else 1 - 0.001**part
        return self.start + (1 - self.start) * risen


def at_strength(margin: Margin, share: float) -> Margin:
    """Return a margin with a share of its strength: 0 is no margin, 1 is the margin itself.

    Angles and differences are multiplied by the share; a factor m of the angle becomes ``1 + share·(m - 1)``. Give the
    result to a head: ``head.margin = at_strength(fa.ArcFace(0.5), rise(step))``.

    Args:
        margin: ArcFace, CosFace, SphereFace, CombinedMargin or NormSoftmax, alone or inside of MVSoftmax,
            InterclassFilter or InterTopK, whose penalty is an angle as well.
        share: in [0, 1].

    Raises:
        TypeError: if it is another margin.
        ValueError: if the share is out of its range.

    >>> from fused_arcface import ArcFace
    >>> at_strength(ArcFace(0.5, boundary="fold"), 0.5)
    ArcFace(margin=0.25, boundary='fold', gradient='exact')
    """
    ranges.check_number("share", share, FROM_0_TO_1)
    # By exact type: a subclass may mean something else by its arguments.
    if type(margin) is NormSoftmax:
        return margin
    if type(margin) is ArcFace or type(margin) is CosFace:
        return replace(margin, margin=share * margin.margin)
    if type(margin) is SphereFace:
        return replace(margin, margin=1 + share * (margin.margin - 1))
    if type(margin) is CombinedMargin:
        return replace(margin, m1=1 + share * (margin.m1 - 1), m2=share * margin.m2, m3=share * margin.m3)
    if type(margin) is MVSoftmax or type(margin) is InterclassFilter:
        return replace(margin, margin=at_strength(margin.margin, share))
    if type(margin) is InterTopK:
        return replace(margin, margin=at_strength(margin.margin, share), penalty=share * margin.penalty)
    raise TypeError(
        "a margin schedule needs ArcFace, CosFace, SphereFace, CombinedMargin or NormSoftmax, alone or inside of "
        f"MVSoftmax, InterclassFilter or InterTopK; got {type(margin).__name__}"
    )
