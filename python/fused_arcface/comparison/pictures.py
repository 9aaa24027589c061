"""The comparison's pictures, drawn with matplotlib into files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import margins
from ..extras import pyplot
from .criteria import SCALE, Criterion, criteria
from .experiment import Comparison
from .record import ANGLE_BINS, ROC_FARS, spread

_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
# Okabe and Ito's, which stay apart for colour-blind readers; more people than colours repeat them.
_PEOPLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")


def draw_pictures(found: Comparison, folder: Path) -> list[Path]:
    """Write every picture into a folder.

    Returns:
        Their paths.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    plt = pyplot()
    pictures: dict[str, Callable[[Any, Comparison], Any]] = {
        "tar.png": _tar,
        "roc.png": _roc,
        "angles.png": _angles,
        "embeddings_2d.png": _embeddings,
        "target_logits.png": _target_logits,
    }
    paths = []
    for name, draw in pictures.items():
        with plt.rc_context(_STYLE):
            figure = draw(plt, found)
            paths.append(folder / name)
            figure.savefig(paths[-1], dpi=120)
            plt.close(figure)
    return paths


def _shown(found: Comparison) -> list[Criterion]:
    names = {row.criterion for row in found.rows}
    return [criterion for name, criterion in criteria().items() if name in names]


def _tar(plt: Any, found: Comparison) -> Any:
    """A line for each criterion: its seeds as dots, mean and deviation as a bar."""
    shown = _shown(found)
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(shown) + 1.4), layout="constrained")
    for place, criterion in enumerate(shown):
        rates = [row.tar["0.01"] for row in found.of(criterion.name)]
        over_seeds = spread(rates)
        axis.errorbar(
            over_seeds["mean"], place, xerr=over_seeds["deviation"], color=criterion.colour, fmt="|", ms=16, capsize=4
        )
        axis.plot(rates, [place] * len(rates), "o", color=criterion.colour, alpha=0.5, ms=5)
    axis.set_yticks(range(len(shown)), [criterion.name for criterion in shown])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    seeds = f"{len(found.plan.seeds)} seed{'s' if len(found.plan.seeds) > 1 else ''}"
    axis.set(xlabel=f"true accept rate at FAR 0.01: {seeds}, mean and deviation", title="people never seen in training")
    return figure


def _roc(plt: Any, found: Comparison) -> Any:
    """True against false accept rate, the mean over the seeds."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for criterion in _shown(found):
        mean = np.mean([row.roc for row in found.of(criterion.name)], axis=0)
        axis.plot(ROC_FARS, mean, color=criterion.colour, linestyle=criterion.line, label=criterion.name)
    axis.set(xscale="log", xlim=(ROC_FARS[0], 1), ylim=(0, 1.01))
    axis.set(xlabel="false accept rate", ylabel="true accept rate", title="people never seen in training")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _grid(plt: Any, count: int, side: float, **options: Any) -> tuple[Any, list[Any]]:
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(side * columns, side * rows), squeeze=False, layout="constrained", **options
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.axis("off")
    return figure, flat[:count]


def _angles(plt: Any, found: Comparison) -> Any:
    """Angles of pairs of one person and of two, on people never seen in training."""
    shown = _shown(found)
    figure, axes = _grid(plt, len(shown), 2.9, sharex=True)
    edges = np.linspace(0, 180, ANGLE_BINS + 1)
    for axis, criterion in zip(axes, shown, strict=True):
        rows = found.of(criterion.name)
        kinds = {"one person": [row.same_angles for row in rows], "two people": [row.different_angles for row in rows]}
        for (name, counts), colour in zip(kinds.items(), ("#0072B2", "#D55E00"), strict=True):
            density = np.sum(counts, axis=0) / np.sum(counts)
            axis.stairs(density, edges, fill=True, color=colour, alpha=0.55, label=name)
        axis.set_title(criterion.name, fontsize=10)
        axis.set(xlim=(0, 150), yticks=[], xticks=range(0, 151, 30))
    axes[0].legend(frameon=False, fontsize=9)
    figure.supxlabel("angle between two embeddings, degrees")
    return figure


def _embeddings(plt: Any, found: Comparison) -> Any:
    """Nets with two dimensions, on the few people that they were trained on: embeddings, and their directions on a
    circle with each person's mean."""
    shown = [criterion for name, criterion in criteria().items() if name in found.toys]
    figure, axes = _grid(plt, len(shown), 2.9)
    for axis, criterion in zip(axes, shown, strict=True):
        embeddings, labels = found.toys[criterion.name]
        unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        radius = 1.25 * float(np.quantile(np.linalg.norm(embeddings, axis=1), 0.98))
        for person in np.unique(labels):
            own, colour = labels == person, _PEOPLE[person % len(_PEOPLE)]
            axis.plot(*embeddings[own].T, ".", color=colour, ms=3.5, alpha=0.6)
            axis.plot(*(radius * unit[own]).T, "o", color=colour, ms=3, alpha=0.3, mew=0)
            mean = unit[own].mean(0)
            mean /= max(float(np.linalg.norm(mean)), 1e-12)
            axis.plot(*np.stack([np.zeros(2), radius * mean]).T, color=colour, linewidth=1)
        axis.set_title(criterion.name, fontsize=10)
        axis.set(xlim=(-1.1 * radius, 1.1 * radius), ylim=(-1.1 * radius, 1.1 * radius), aspect="equal")
        axis.axis("off")
    return figure


def _target_logits(plt: Any, found: Comparison) -> Any:
    """``s·ψ(θ)`` of every margin, beside ``s·cos θ``; and what ArcFace's boundaries do past π."""
    figure, (families, boundaries) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    degrees = torch.linspace(0, 180, 721)
    cosine = degrees.deg2rad().cos()

    def plot(axis: Any, margin: margins.Margin, label: str, **style: Any) -> None:
        axis.plot(degrees, SCALE * margin(cosine).detach(), label=label, **style)

    plot(families, margins.NormSoftmax(), "NormSoftmax: cos θ", color="#000000")
    plot(families, margins.SphereFace(1.7), "SphereFace, 1.7: cos 1.7θ, folded", color="#56B4E9")
    plot(families, margins.CosFace(0.35), "CosFace, 0.35: cos θ − 0.35", color="#009E73")
    plot(families, margins.ArcFace(0.5, "clip"), "ArcFace, 0.5: cos(θ + 0.5)", color="#0072B2")
    combined = margins.CombinedMargin(1.0, 0.3, 0.2, "clip")
    plot(families, combined, "combined: cos(θ + 0.3) − 0.2", color="#CC79A7", linestyle="--")
    for boundary, line in (("none", ":"), ("hard", "-"), ("fold", "--"), ("clip", "-."), ("easy", "-")):
        colour = "#D55E00" if boundary == "easy" else "#0072B2"
        plot(boundaries, margins.ArcFace(0.5, boundary), boundary, color=colour, linestyle=line)  # type: ignore[arg-type]
    families.set_title("the target's logit by margin")
    boundaries.set_title("ArcFace's boundaries past θ + 0.5 = π")
    for axis in (families, boundaries):
        axis.set(xlabel="θ, degrees", xlim=(0, 180), xticks=range(0, 181, 30), ylim=(-2.6 * SCALE, 1.05 * SCALE))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="lower left")
    families.set_ylabel(f"target logit at scale {SCALE:g}")
    return figure
