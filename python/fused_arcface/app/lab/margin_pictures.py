"""Pictures of the margins: each margin of the registry with its default arguments.

``compare`` and ``docs/update.py`` draw them.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fused_arcface.base.text import listed
from fused_arcface.margins import angular
from fused_arcface.margins.entry import Entry, trained
from fused_arcface.margins.per_row import AdaFace, ElasticFace
from fused_arcface.margins.protocol import modulation
from fused_arcface.margins.registry import REGISTRY

from ..drawing import COLORS, WIDTH, Drawing, panel

_ANGLES: dict[str, Any] = {"xlabel": "angle θ, degrees", "xlim": (0, 180), "xticks": range(0, 181, 30)}
_LINES: tuple[Any, ...] = ("-", "-", "--", "-", "--", "-.", ":")
NORMS = (5.0, 20.0, 110.0)
"""Norms of a poor, a mean and a good image, where AdaFace has seen a mean of 20 and a deviation of 5. MagFace's own
range is 10 to 110."""
TARGET_ANGLE = 60.0
"""Degrees between the embedding and its own class center, beside which negatives are drawn."""


def margin_drawings(scale: float) -> list[Drawing]:
    """Return pictures of the logits at a scale: of the angle alone, of the row, of negatives, and past the boundary."""
    return [
        Drawing(
            "margins_of_the_angle",
            f"Logit of the target at scale {scale:g}, by the angle to its class center, and its derivative by the "
            "scaled cosine: margins of the angle alone, each with its defaults. SphereFace2 and UniFace also add a "
            "bias, which is 0 here.",
            lambda plt: _angle_figure(plt, scale),
        ),
        Drawing(
            "margins_of_the_row",
            f"The same of margins that differ from row to row, for embeddings of norm {listed(NORMS)}. AdaFace has "
            "seen norms of 20 ± 5; ElasticFace draws its margin anew for each row, and the band is two deviations.",
            lambda plt: _row_figure(plt, scale),
        ),
        Drawing(
            "margins_of_negatives",
            f"Logit of a negative at scale {scale:g}, by its angle, beside a target at {TARGET_ANGLE:g}°: margins that "
            "change the hard negatives, each with its defaults.",
            lambda plt: _negative_figure(plt, scale),
        ),
        Drawing(
            "boundaries",
            f"ArcFace where θ + {angular.ArcFace().margin:g} passes π, by boundary.",
            lambda plt: _boundary_figure(plt, scale),
        ),
    ]


def entries(kind: str) -> list[Entry]:
    """Return the registry's margins of one :attr:`~fused_arcface.margins.entry.Entry.kind`."""
    return [entry for entry in REGISTRY if entry.kind == kind]


def default(entry: Entry) -> Any:
    """Return a margin made without arguments; drawing does not change its statistics."""
    margin = entry.margin()
    return margin.eval() if isinstance(margin, nn.Module) else margin


def label(entry: Entry) -> str:
    """Return a margin's name with its first numbers, at most three.

    >>> label(entries("angular")[3])
    'ArcFace(margin=0.5)'
    """
    parameters = inspect.signature(entry.margin).parameters.values()
    numbers = [f"{each.name}={each.default:g}" for each in parameters if type(each.default) is float]
    return f"{entry.name}({', '.join(numbers[:3])}{', …' if len(numbers) > 3 else ''})"


def styles() -> Iterator[dict[str, Any]]:
    """Yield styles of lines that differ in color and dashes. The first are wide, because later ones may cover them."""
    for place in itertools.count():
        width = max(1.2, 3.4 - 0.5 * place)
        yield {"color": COLORS[place % len(COLORS)], "linestyle": _LINES[place % len(_LINES)], "linewidth": width}


def _cosines() -> tuple[Tensor, Tensor]:
    """Return angles in degrees and their cosines, (721,)."""
    degrees = torch.linspace(0, 180, 721)
    return degrees, degrees.deg2rad().cos()


def _angle_figure(plt: Any, scale: float) -> Any:
    degrees, cosines = _cosines()
    cosines.requires_grad_()
    figure, (logits, slopes) = plt.subplots(2, 1, figsize=(WIDTH, 7.6), sharex=True, layout="constrained")
    for entry, style in zip([*entries("angular"), *entries("binary")], styles(), strict=False):
        modified = default(entry)(cosines)
        (slope,) = torch.autograd.grad(modified.sum(), cosines)
        logits.plot(degrees, scale * modified.detach(), label=label(entry), **style)
        slopes.plot(degrees[5:-5], slope[5:-5], **style)  # nearer to the ends the margins bound it
    logits.set(**_ANGLES, title="margins of the angle", ylabel=f"target logit at scale {scale:g}")
    slopes.set(**_ANGLES, title="derivative", ylabel="d logit / d (scale · cos θ)", ylim=(-0.2, 6))
    for axis in (logits, slopes):
        axis.grid(alpha=0.3)
    return _finish(figure)


def _row_figure(plt: Any, scale: float) -> Any:
    degrees, cosines = _cosines()
    figure, axis = _panel(plt, "margins of the row", f"target logit at scale {scale:g}")
    axis.plot(degrees, scale * cosines, color="black", linewidth=1, label="no margin")
    for entry, style in zip(entries("row"), styles(), strict=False):
        margin = default(entry)
        if isinstance(margin, ElasticFace):
            bounds = (margin.margin + 2 * side * margin.std for side in (-1, 1))
            few, many = (scale * angular.ArcFace(bound, margin.boundary)(cosines) for bound in bounds)
            axis.fill_between(degrees, many, few, color=style["color"], alpha=0.3, lw=0, label=label(entry))
            continue
        if isinstance(margin, AdaFace):
            margin = trained(margin, norm_mean=20.0, norm_std=5.0)
        for norm, line in zip(NORMS, (":", "-", "--"), strict=True):
            name = label(entry) if line == "-" else None
            values = scale * _of_norm(margin, norm)(cosines)
            axis.plot(degrees, values, color=style["color"], linestyle=line, linewidth=1.6, label=name)
    for norm, line in zip(NORMS, (":", "-", "--"), strict=True):
        axis.plot([], [], color="#666666", linestyle=line, label=f"embedding of norm {norm:g}")
    return _finish(figure)


def _negative_figure(plt: Any, scale: float) -> Any:
    degrees, cosines = _cosines()
    figure, axis = _panel(plt, f"negatives beside a target at {TARGET_ANGLE:g}°", f"negative logit at scale {scale:g}")
    axis.plot(degrees, scale * cosines, color="black", linewidth=1, label="unchanged")
    target = torch.tensor([TARGET_ANGLE]).deg2rad().cos()
    for entry, style in zip(entries("negatives"), styles(), strict=False):
        change = modulation(default(entry), target, torch.tensor([True]), _hardest)
        assert change is not None
        a, b, d, e = change.coefficients.tolist()
        hard = cosines > change.threshold
        sine = (1 - cosines**2).clamp(min=0).sqrt()
        values = torch.where(hard, a * cosines**2 + b * cosines + d + e * sine, cosines)
        axis.plot(degrees, scale * values, label=label(entry), **style)
    axis.axvline(TARGET_ANGLE, color="#666666", linewidth=0.8, linestyle=":", label="angle of the target")
    return _finish(figure)


def _hardest(count: int) -> torch.Tensor:
    """Return the largest cosines (1, count) of the drawn row's negatives, with angles evenly spaced up to 75°."""
    return torch.linspace(TARGET_ANGLE, 75, count).deg2rad().cos()[None]


def _boundary_figure(plt: Any, scale: float) -> Any:
    degrees, cosines = _cosines()
    default = angular.ArcFace()
    figure, axis = _panel(plt, f"ArcFace past θ + {default.margin:g} = π", f"target logit at scale {scale:g}")
    for boundary, style in zip(get_args(angular.Boundary), styles(), strict=False):
        name = f"{boundary} (default)" if boundary == default.boundary else boundary
        axis.plot(degrees, scale * angular.ArcFace(boundary=boundary)(cosines), label=name, **style)
    return _finish(figure, columns=2)


def _panel(plt: Any, title: str, unit: str) -> tuple[Any, Any]:
    return panel(plt, 4.4, title, ylabel=unit, **_ANGLES)


def _finish(figure: Any, columns: int = 1) -> Any:
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8.5)
    return figure


def _of_norm(margin: Any, norm: float) -> Callable[[Tensor], Tensor]:
    """Return the margin of rows with embeddings of one norm."""

    def modify(cosines: Tensor) -> Tensor:
        norms = torch.full_like(cosines, norm)
        return margin.for_rows(norms, torch.ones_like(norms, dtype=torch.bool)).modify(cosines)

    return modify
