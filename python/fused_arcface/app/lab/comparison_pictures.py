"""The comparison's pictures, drawn with matplotlib into files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_arcface.base.extras import pyplot, save_figure
from fused_arcface.margins import angular
from fused_arcface.margins.per_row import AdaFace, MagFace

from .comparison import Comparison
from .comparison_record import ANGLE_BINS, ROC_FARS, mean_and_deviation
from .criteria import SCALE, Criterion, criteria

_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
# Okabe and Ito's, which stay apart for color-blind readers; more people than colors repeat them.
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
            save_figure(figure, paths[-1], dpi=120)
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
        over_seeds = mean_and_deviation(rates)
        axis.errorbar(
            over_seeds["mean"], place, xerr=over_seeds["deviation"], color=criterion.color, fmt="|", ms=16, capsize=4
        )
        axis.plot(rates, [place] * len(rates), "o", color=criterion.color, alpha=0.5, ms=5)
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
        axis.plot(ROC_FARS, mean, color=criterion.color, linestyle=criterion.line, label=criterion.name)
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
        for (name, counts), color in zip(kinds.items(), ("#0072B2", "#D55E00"), strict=True):
            density = np.sum(counts, axis=0) / np.sum(counts)
            axis.stairs(density, edges, fill=True, color=color, alpha=0.55, label=name)
        axis.set_title(criterion.name, fontsize=10)
        axis.set(xlim=(0, 150), yticks=[], xticks=range(0, 151, 30))
        axis.tick_params(labelbottom=True)  # also above an empty place of the grid
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
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
            own, color = labels == person, _PEOPLE[person % len(_PEOPLE)]
            axis.plot(*embeddings[own].T, ".", color=color, ms=3.5, alpha=0.6)
            axis.plot(*(radius * unit[own]).T, "o", color=color, ms=3, alpha=0.3, mew=0)
            mean = unit[own].mean(0)
            mean /= max(float(np.linalg.norm(mean)), 1e-12)
            axis.plot(*np.stack([np.zeros(2), radius * mean]).T, color=color, linewidth=1)
        axis.set_title(criterion.name, fontsize=10)
        axis.set(xlim=(-1.1 * radius, 1.1 * radius), ylim=(-1.1 * radius, 1.1 * radius), aspect="equal")
        axis.axis("off")
    return figure


def _target_logits(plt: Any, found: Comparison) -> Any:
    """``s·ψ(θ)`` of every margin, beside ``s·cos θ``: those of the angle alone, those that differ from row to row, and
    what ArcFace's boundaries do past π."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8), sharey=True, layout="constrained")
    degrees = torch.linspace(0, 180, 721)
    cosine = degrees.deg2rad().cos()

    def plot(axis: Any, margin: angular.Margin, label: str, color: str, line: str = "-") -> None:
        axis.plot(degrees, SCALE * margin(cosine), label=label, color=color, linestyle=line)

    for axis in axes[:2]:
        plot(axis, angular.NormSoftmax(), "NormSoftmax: cos θ", "#000000")
    plot(axes[0], angular.SphereFace(1.7), "SphereFace: cos 1.7θ, folded", "#56B4E9")
    plot(axes[0], angular.CosFace(0.35), "CosFace: cos θ − 0.35", "#009E73")
    plot(axes[0], angular.ArcFace(0.5, "clip"), "ArcFace: cos(θ + 0.5)", "#0072B2")
    plot(axes[0], angular.CombinedMargin(1.0, 0.3, 0.2, "clip"), "combined: cos(θ + 0.3) − 0.2", "#CC79A7", "--")

    for what, norm, line in (("poor", 0.0, ":"), ("mean", 20.0, "-"), ("good", 100.0, "--")):
        plot(axes[1], _of_norm(AdaFace(0.4, h=10.0).eval(), norm), f"AdaFace, 0.4: {what} image", "#8C6D00", line)
    for norm, line in ((10.0, ":"), (110.0, "--")):
        plot(axes[1], _of_norm(MagFace(boundary="clip"), norm), f"MagFace: norm {norm:g}", "#D55E00", line)
    few, many = (SCALE * angular.ArcFace(0.5 + 2 * side * 0.05, "clip")(cosine) for side in (-1, 1))
    axes[1].fill_between(degrees, many, few, color="#0072B2", alpha=0.3, label="ElasticFace: 0.5 ± 2·0.05", lw=0)

    for boundary, line in (("none", ":"), ("hard", "-"), ("fold", "--"), ("clip", "-."), ("easy", "-")):
        margin = angular.ArcFace(0.5, boundary)  # type: ignore[arg-type]
        plot(axes[2], margin, boundary, "#D55E00" if boundary == "easy" else "#0072B2", line)
    titles = ("margins of the angle", "margins of the row", "ArcFace past θ + 0.5 = π, by boundary")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="θ, degrees", xlim=(0, 180), xticks=range(0, 181, 30), ylim=(-2.6 * SCALE, 1.05 * SCALE))
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="lower left", fontsize=9)
    axes[0].set_ylabel(f"target logit at scale {SCALE:g}")
    return figure


def _of_norm(margin: AdaFace | MagFace, norm: float) -> angular.Margin:
    """The margin of rows whose embeddings have one norm."""

    def modify(cosine: Tensor) -> Tensor:
        norms = torch.full_like(cosine, norm)
        return margin.for_rows(norms, torch.ones_like(norms, dtype=torch.bool)).modify(cosine)

    return modify
