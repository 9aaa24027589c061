"""The list of the margins, one row for each. A new margin is added here, and everything that lists margins follows.

Only margins of a number for each class (:mod:`.by_label`) are left out: they fit one number of classes, and no text.

The command line's margin text, gradcheck, the tests and the table in ``docs/margins.md`` are made of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from .angular import ArcFace, Boundary, CombinedMargin, CosFace, GradientMode, NormSoftmax, SphereFace
from .binary import SphereFace2, UniFace
from .hard_negatives import CurricularFace, InterclassFilter, InterTopK, MVSoftmax
from .per_row import AdaFace, ElasticFace, MagFace
from .protocol import Margin


@dataclass(frozen=True)
class Entry:
    """One margin."""

    margin: type
    formula: str
    """The logit without the scale."""
    source: str
    """The paper, with its number at arXiv."""
    examples: Callable[[], list[Any]]
    """Instances that cover the options, for gradcheck and the tests.

    They are made anew in each call, since a margin may have a state. Embeddings have norms from 0.5 to 7.
    """
    default: str = ""
    """How the default differs from a paper's or another code's."""

    @property
    def name(self) -> str:
        """The class's name."""
        return self.margin.__name__

    @property
    def kind(self) -> str:
        """``"angular"``, ``"row"``, ``"negatives"`` or ``"binary"``: what the margin depends on or changes."""
        if hasattr(self.margin, "binary"):
            return "binary"
        if hasattr(self.margin, "modulate"):
            return "negatives"
        return "row" if hasattr(self.margin, "for_rows") else "angular"

    def options(self) -> str:
        """Return the constructor's arguments with their defaults, as in a call."""
        signature = inspect.signature(self.margin)
        return ", ".join(f"{each.name}={each.default!r}" for each in signature.parameters.values())


def trained(margin: nn.Module, **buffers: float) -> Margin:
    """Return a margin with a state, set to these values as training would."""
    for name, value in buffers.items():
        margin.get_buffer(name).fill_(value)
    return margin


_MODES = [(boundary, gradient) for gradient in get_args(GradientMode) for boundary in get_args(Boundary)]

REGISTRY = (
    Entry(
        NormSoftmax,
        "cos θ",
        "NormFace, 1704.06369",
        lambda: [NormSoftmax()],
    ),
    Entry(
        SphereFace,
        "cos(m·θ), continued by (−1)^k·cos(m·θ) − 2k",
        "SphereFace, 1704.08063",
        lambda: [SphereFace(1.7, gradient) for gradient in get_args(GradientMode)],
        "m = 1.7; the paper's 4 is trained with an annealed mixture",
    ),
    Entry(
        CosFace,
        "cos θ − m",
        "CosFace, 1801.09414",
        lambda: [CosFace(0.35)],
    ),
    Entry(
        ArcFace,
        "cos(θ + m)",
        "ArcFace, 1801.07698",
        lambda: [ArcFace(0.5, *mode) for mode in _MODES],
        'boundary "hard" as in most published heads; insightface has boundary="none", gradient="straight_through"',
    ),
    Entry(
        CombinedMargin,
        "cos(m1·θ + m2) − m3",
        "ArcFace, 1801.07698, eq. 4",
        lambda: [CombinedMargin(1.2, 0.4, 0.1, *mode) for mode in _MODES],
        'as ArcFace; insightface has boundary="none", gradient="straight_through"',
    ),
    Entry(
        AdaFace,
        "cos(θ − m·ẑ) − (m + m·ẑ), ẑ from the norm",
        "AdaFace, 2204.00964",
        lambda: [trained(AdaFace(), norm_mean=3.0, norm_std=2.0)],
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
"""Every margin of this package, angular ones first."""


def examples(kind: str | None = None) -> list[Any]:
    """Return the examples of all margins, or of one :attr:`Entry.kind`."""
    return [margin for entry in REGISTRY if kind in (None, entry.kind) for margin in entry.examples()]


def as_markdown() -> str:
    """Return the table of the margins in ``docs/margins.md``."""
    lines = ["| Margin | Logit, without the scale | Source | Default |", "|---|---|---|---|"]
    for entry in REGISTRY:
        call = f"`{entry.name}({entry.options()})`"
        lines.append(f"| {call} | {entry.formula} | {entry.source} | {entry.default} |")
    return "\n".join(lines) + "\n"
