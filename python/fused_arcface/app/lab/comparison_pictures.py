"""The comparison's pictures: rates, curves, angles, two-dimensional embeddings, and the margins themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from fused_arcface.margins import angular
from fused_arcface.margins.per_row import AdaFace, ElasticFace, MagFace

from .comparison import Comparison
from .criteria import SCALE, Criterion, criteria
from .pictures import over_seeds, write_pictures
from .record import ANGLE_BINS, ROC_FARS, mean_and_deviation

# Okabe and Ito's colors, which stay apart for color-blind readers; more people than colors repeat them.
_PEOPLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
_GRAY = "#666666"


def draw_pictures(found: Comparison, folder: Path) -> list[Path]:
    """Draw every picture into a folder; return their paths.

    Raises:
        MissingExtra: if matplotlib is not installed.
    """
    pictures = {
        "tar.png": _tar,
        "roc.png": _roc,
        "angles.png": _angles,
        "embeddings_2d.png": _embeddings,
        "target_logits.png": _target_logits,
    }
    return write_pictures(pictures, found, folder)


def _shown(found: Comparison) -> list[Criterion]:
    names = {row.criterion for row in found.rows}
    return [criterion for name, criterion in criteria().items() if name in names]


def _title(found: Comparison, several: str = "") -> str:
    seeds = len(found.plan.seeds)
    return f"people never seen in training, {several if seeds > 1 else ''}{over_seeds(seeds)}"


def _tar(plt: Any, found: Comparison) -> Any:
    """Draw a line for each criterion: its seeds as dots, their mean and deviation as a bar."""
    shown = _shown(found)
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(shown) + 1.8), layout="constrained")
    for place, criterion in enumerate(shown):
        rates = [row.tar["0.01"] for row in found.of(criterion.name)]
        over = mean_and_deviation(rates)
        # Of one seed there is no deviation to draw.
        bar = {"xerr": over["deviation"], "capsize": 4} if len(rates) > 1 else {}
        axis.errorbar(over["mean"], place, color=criterion.color, fmt="|", ms=16, **bar)
        axis.plot(rates, [place] * len(rates), "o", color=criterion.color, alpha=0.5, ms=5)
    axis.set_yticks(range(len(shown)), [criterion.name for criterion in shown])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.plot([], [], "o", color=_GRAY, alpha=0.5, ms=5, label="one seed")
    if len(found.plan.seeds) > 1:
        axis.errorbar([], [], xerr=[], color=_GRAY, fmt="|", ms=16, capsize=4, label="mean ± standard deviation")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axis.set(xlabel="true accept rate at a false accept rate of 0.01", title=_title(found))
    return figure


def _roc(plt: Any, found: Comparison) -> Any:
    """Draw the true against the false accept rate, the mean over the seeds."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for criterion in _shown(found):
        mean = np.mean([row.roc for row in found.of(criterion.name)], axis=0)
        style = {"color": criterion.color, "linestyle": criterion.line, "label": criterion.name}
        axis.step(ROC_FARS, mean, where="post", **style)
    # Below one false accept there is nothing to see.
    least = max(ROC_FARS[0], *(1 / sum(row.different_angles) for row in found.rows))
    axis.set(xscale="log", xlim=(least, 1), ylim=(0, 1.01))
    axis.set(xlabel="false accept rate", ylabel="true accept rate", title=_title(found, "mean over "))
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
    """Draw the angles of pairs of one person and of two, on people never seen in training."""
    shown = _shown(found)
    figure, axes = _grid(plt, len(shown), 2.9, sharex=True)
    edges = np.linspace(0, 180, ANGLE_BINS + 1)
    for axis, criterion in zip(axes, shown, strict=True):
        rows = found.of(criterion.name)
        kinds = {"one person": [row.same_angles for row in rows], "two people": [row.different_angles for row in rows]}
        for (name, counts), color in zip(kinds.items(), ("#0072B2", "#D55E00"), strict=True):
            density = np.sum(counts, axis=0) / np.sum(counts)
            axis.stairs(density, edges, fill=True, color=color, alpha=0.55, label=name)
        axis.set_title(criterion.name, fontsize=10)
        axis.set(xlim=(0, 150), yticks=[], xticks=range(0, 151, 30))
        axis.tick_params(labelbottom=True)  # also above an empty place of the grid
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel(f"angle between two embeddings, degrees; {_title(found)}", fontsize=10)
    figure.supylabel("share of the pairs", fontsize=10)
    return figure


def _embeddings(plt: Any, found: Comparison) -> Any:
    """Draw nets with two dimensions on the few people that they were trained on.

    Embeddings are points, their directions lie on a ring, and a ray points to each person's mean direction.
    """
    shown = [criterion for name, criterion in criteria().items() if name in found.toys]
    figure, axes = _grid(plt, len(shown), 2.9)
    people = 0
    for axis, criterion in zip(axes, shown, strict=True):
        embeddings, labels = found.toys[criterion.name]
        people = len(np.unique(labels))
        unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        radius = 1.25 * float(np.quantile(np.linalg.norm(embeddings, axis=1), 0.98))
        axis.add_patch(plt.Circle((0, 0), radius, fill=False, color="#DDDDDD", linewidth=0.8))
        for person in np.unique(labels):
            own, color = labels == person, _PEOPLE[person % len(_PEOPLE)]
            axis.plot(*embeddings[own].T, ".", color=color, ms=3.5, alpha=0.6)
            axis.plot(*(radius * unit[own]).T, "o", color=color, ms=3, alpha=0.3, mew=0)
            mean = unit[own].mean(0)
            mean /= max(float(np.linalg.norm(mean)), 1e-12)
            axis.plot(*np.stack([np.zeros(2), radius * mean]).T, color=color, linewidth=1)
        axis.set_title(criterion.name, fontsize=10)
        axis.set(xlim=(-1.1 * radius, 1.1 * radius), ylim=(-1.1 * radius, 1.1 * radius), aspect="equal")
        axis.axis("off")
    keys = {
        "embedding": plt.Line2D([], [], color=_GRAY, marker=".", ls="", ms=6),
        "its direction, on the ring": plt.Line2D([], [], color=_GRAY, marker="o", ls="", ms=5, alpha=0.4, mew=0),
        "a person's mean direction": plt.Line2D([], [], color=_GRAY, lw=1),
    }
    columns = min(3, len(shown))
    figure.legend(list(keys.values()), list(keys), loc="outside lower center", ncols=columns, frameon=False)
    title = f"embeddings in two dimensions of the {people} people of the training, a color for each"
    figure.suptitle(title if len(shown) > 2 else title.replace(" of the", "\nof the"), fontsize=11)
    return figure


def _target_logits(plt: Any, found: Comparison) -> Any:
    """Draw ``s·ψ(θ)`` of every margin's default beside ``s·cos θ``, and each boundary of ArcFace past π.

    One panel shows margins of the angle alone, one those that differ from row to row, one the boundaries.
    """
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.2), sharey=True, layout="constrained")
    degrees = torch.linspace(0, 180, 721)
    cosine = degrees.deg2rad().cos()

    def plot(axis: Any, margin: angular.Margin, label: str, color: str, line: Any = "-", width: float = 1.5) -> None:
        axis.plot(degrees, SCALE * margin(cosine), label=label, color=color, linestyle=line, linewidth=width)

    for axis in axes[:2]:
        plot(axis, angular.NormSoftmax(), "NormSoftmax: cos θ", "#000000")
    sphere, cos, arc = angular.SphereFace(), angular.CosFace(), angular.ArcFace()
    plot(axes[0], sphere, f"SphereFace: cos {sphere.margin:g}θ, folded", "#56B4E9")
    plot(axes[0], cos, f"CosFace: cos θ − {cos.margin:g}", "#009E73")
    plot(axes[0], arc, f"ArcFace: cos(θ + {arc.margin:g}), boundary {arc.boundary}", "#0072B2")
    combined = angular.CombinedMargin(1.0, 0.3, 0.2)
    plot(axes[0], combined, f"CombinedMargin: cos(θ + 0.3) − 0.2, {combined.boundary}", "#CC79A7", "--")

    # Of these norms an h of 10 makes the least, the mean and the greatest quality.
    ada, mag, elastic = AdaFace(h=10.0).eval(), MagFace(), ElasticFace()
    for what, norm, line in (("poorest", 0.0, ":"), ("mean", 20.0, "-"), ("best", 100.0, "--")):
        plot(axes[1], _of_norm(ada, norm), f"AdaFace, {ada.margin:g}: {what} image", "#8C6D00", line)
    for norm, line in ((mag.lower_norm, ":"), (mag.upper_norm, "--")):
        plot(axes[1], _of_norm(mag, norm), f"MagFace: norm {norm:g}, {mag.boundary}", "#D55E00", line)
    few, many = (
        SCALE * angular.ArcFace(elastic.margin + 2 * side * elastic.std, elastic.boundary)(cosine) for side in (-1, 1)
    )
    band = f"ElasticFace: {elastic.margin:g} ± 2·{elastic.std:g}"
    axes[1].fill_between(degrees, many, few, color="#0072B2", alpha=0.3, label=band, lw=0)

    lines = (":", "-", "--", "-.", (0, (1, 1, 4, 1)), (0, (6, 2)))
    for boundary, style, color in zip(get_args(angular.Boundary), lines, _PEOPLE, strict=False):
        default = boundary == arc.boundary
        label = f"{boundary} (default)" if default else boundary
        plot(axes[2], angular.ArcFace(boundary=boundary), label, color, style, 2.5 if default else 1.5)
    titles = ("margins of the angle, defaults", "margins of the row, defaults", "ArcFace past θ + 0.5 = π, by boundary")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="θ, degrees", xlim=(0, 180), xticks=range(0, 181, 30), ylim=(-3 * SCALE, 1.05 * SCALE))
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="lower left", fontsize=9)
    axes[0].set_ylabel(f"target logit at scale {SCALE:g}")
    return figure


def _of_norm(margin: AdaFace | MagFace, norm: float) -> angular.Margin:
    """Return the margin of rows with embeddings of one norm."""

    def modify(cosine: Tensor) -> Tensor:
        norms = torch.full_like(cosine, norm)
        return margin.for_rows(norms, torch.ones_like(norms, dtype=torch.bool)).modify(cosine)

    return modify
