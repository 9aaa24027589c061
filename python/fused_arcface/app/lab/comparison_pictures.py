"""The comparison's pictures: rates, curves, angles, losses, two-dimensional embeddings, and the margins themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fused_arcface.base.text import counted

from ..drawing import COLORS, WIDTH, Drawing, panel, plain_ticks
from ..report.digest import BINS
from ..report.evaluation import draw_histograms
from .comparison import Comparison
from .criteria import SCALE, Criterion, criteria
from .margin_pictures import margin_drawings
from .record import ROC_FARS, mean_and_deviation

_GRAY = "#666666"


def comparison_drawings(found: Comparison) -> list[Drawing]:
    """Return every picture of a comparison."""
    seeds = counted(len(found.plan.seeds), "seed")
    several = len(found.plan.seeds) > 1
    mean = f"Mean over {seeds}." if several else f"Of {seeds}."
    bars = "A bar is the mean of the seeds ± their standard deviation." if several else ""
    return [
        Drawing("tar", f"True accept rate at a false accept rate of 0.01. {bars}", lambda plt: _tar(plt, found)),
        Drawing("roc", f"ROC of people never seen in training. {mean}", lambda plt: _roc(plt, found)),
        Drawing("loss", f"Loss of each training as a share of its first loss. {mean}", lambda plt: _loss(plt, found)),
        Drawing(
            "angles",
            f"Angles between two embeddings, of one person and of two, on people never seen in training. Of {seeds}.",
            lambda plt: _angles(plt, found),
        ),
        Drawing(
            "embeddings_2d",
            "Nets with two dimensions on the people that they were trained on, a color for each: embeddings are "
            "points, their directions lie on the ring, and a ray points to each person's mean direction.",
            lambda plt: _embeddings(plt, found),
        ),
        *margin_drawings(SCALE),
    ]


def _shown(found: Comparison) -> list[Criterion]:
    return [criterion for name, criterion in criteria().items() if name in found.rows]


def _title(found: Comparison, several: str = "") -> str:
    seeds = len(found.plan.seeds)
    return f"people never seen in training, {several if seeds > 1 else ''}{counted(seeds, 'seed')}"


def _tar(plt: Any, found: Comparison) -> Any:
    """Draw a line for each criterion: its seeds as dots, their mean and deviation as a bar."""
    shown = _shown(found)
    figure, axis = plt.subplots(figsize=(WIDTH, 0.36 * len(shown) + 1.6), layout="constrained")
    for place, criterion in enumerate(shown):
        rates = [row.tar["0.01"] for row in found.rows[criterion.name]]
        over = mean_and_deviation(rates)
        # One seed has no deviation.
        bar = {"xerr": over["deviation"], "capsize": 4} if len(rates) > 1 else {}
        axis.errorbar(over["mean"], place, color=criterion.color, fmt="|", ms=12, **bar)
        axis.plot(rates, [place] * len(rates), "o", color=criterion.color, alpha=0.5, ms=5)
    axis.set_yticks(range(len(shown)), [criterion.name for criterion in shown])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.plot([], [], "o", color=_GRAY, alpha=0.5, ms=5, label="one seed")
    if len(found.plan.seeds) > 1:
        # A point that is not a number is drawn in the legend only.
        axis.errorbar(
            [math.nan], [math.nan], xerr=[1], color=_GRAY, fmt="|", ms=12, capsize=4, label="mean ± deviation"
        )
    figure.legend(loc="outside lower center", ncols=2)
    axis.set_xlabel("true accept rate at FAR 0.01")
    figure.suptitle(_title(found), fontsize=10)
    return figure


def _roc(plt: Any, found: Comparison) -> Any:
    """Draw the true against the false accept rate, the mean over the seeds."""
    # Below one false accept there is nothing to see.
    least = max(ROC_FARS[0], *(1 / sum(row.different_angles) for rows in found.rows.values() for row in rows))
    labels = {"xlabel": "false accept rate", "ylabel": "true accept rate"}
    figure, axis = panel(plt, 5, xscale="log", xlim=(least, 1), ylim=(0, 1.01), **labels)
    plain_ticks(axis.xaxis)
    for criterion in _shown(found):
        mean = np.mean([row.roc for row in found.rows[criterion.name]], axis=0)
        style = {"color": criterion.color, "linestyle": criterion.line, "label": criterion.name}
        axis.step(ROC_FARS, mean, where="post", **style)
    figure.suptitle(_title(found, "mean over "), fontsize=10)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _loss(plt: Any, found: Comparison) -> Any:
    """Draw each training's loss as a share of its first: the losses have no common unit."""
    figure, axis = panel(plt, 4.6, "loss of the training", xlabel="step", ylabel="loss ÷ first loss")
    (task,) = found.plan.tasks
    for criterion in _shown(found):
        curves = [row.losses for row in found.rows[criterion.name] if row.losses]
        if curves:
            mean = np.mean([np.divide(curve, curve[0]) for curve in curves], axis=0)
            steps = (np.arange(len(mean)) + 0.5) * task.recipe.steps / len(mean)
            axis.plot(steps, mean, color=criterion.color, linestyle=criterion.line, label=criterion.name, lw=1.3)
    axis.set_ylim(bottom=0)
    if axis.lines:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _grid(plt: Any, count: int, most: int, height: float) -> tuple[Any, list[Any]]:
    """Return a figure of ``count`` panels, at most ``most`` beside each other, and their axes."""
    columns = min(most, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height * rows + 1), squeeze=False, layout="constrained")
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.axis("off")
    return figure, flat[:count]


def _angles(plt: Any, found: Comparison) -> Any:
    """Draw the angles of pairs of one person and of two, on people never seen in training."""
    shown = _shown(found)
    figure, axes = _grid(plt, len(shown), 2, 1.6)
    edges = np.linspace(0, 180, BINS + 1)
    for axis, criterion in zip(axes, shown, strict=True):
        rows = found.rows[criterion.name]
        counts = {"one person": [row.same_angles for row in rows], "two people": [row.different_angles for row in rows]}
        draw_histograms(axis, edges, {name: np.sum(each, axis=0) for name, each in counts.items()})
        axis.set(title=criterion.name, xlim=(0, 150), yticks=[], xticks=range(0, 151, 30))
    keys = axes[0].get_legend_handles_labels()
    figure.legend(*keys, loc="outside lower center", ncols=2, title="angle between two embeddings, degrees")
    figure.suptitle(_title(found), fontsize=10)
    figure.supylabel("share of the pairs", fontsize=10)
    return figure


def _embeddings(plt: Any, found: Comparison) -> Any:
    """Draw nets with two dimensions on the few people that they were trained on.

    Embeddings are points, their directions lie on a ring, and a ray points to each person's mean direction.
    """
    shown = _shown(found)
    figure, axes = _grid(plt, len(shown), 3, 1.6)
    for axis, criterion in zip(axes, shown, strict=True):
        embeddings, labels = found.toys[criterion.name]
        people = np.unique(labels)
        unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        radius = 1.25 * float(np.quantile(np.linalg.norm(embeddings, axis=1), 0.98))
        axis.add_patch(plt.Circle((0, 0), radius, fill=False, color="#DDDDDD", linewidth=0.8))
        for person in people:
            own, color = labels == person, COLORS[person % len(COLORS)]
            axis.plot(*embeddings[own].T, ".", color=color, ms=3, alpha=0.6, mew=0)
            axis.plot(*(radius * unit[own]).T, "o", color=color, ms=3, alpha=0.3, mew=0)
            mean = unit[own].mean(0)
            mean /= max(float(np.linalg.norm(mean)), 1e-12)
            axis.plot(*np.stack([np.zeros(2), radius * mean]).T, color=color, linewidth=1)
        axis.set_title(criterion.name, fontsize=9)
        axis.set(xlim=(-1.1 * radius, 1.1 * radius), ylim=(-1.1 * radius, 1.1 * radius), aspect="equal")
        axis.axis("off")
    keys = {
        "an embedding": plt.Line2D([], [], color=_GRAY, marker=".", ls="", ms=6),
        "its direction, on the ring": plt.Line2D([], [], color=_GRAY, marker="o", ls="", ms=5, alpha=0.4, mew=0),
        "ray: a person's mean direction": plt.Line2D([], [], color=_GRAY, lw=1),
    }
    figure.legend(list(keys.values()), list(keys), loc="outside lower center", ncols=2)
    figure.suptitle(f"two dimensions, {len(people)} people of the training, a color for each", fontsize=10)
    return figure
