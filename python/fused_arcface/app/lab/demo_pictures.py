"""The demo's pictures: loss curves, ROC, and the images."""

from __future__ import annotations

from typing import Any

import numpy as np

from fused_arcface.base.text import counted

from ..data import identity_images
from ..drawing import WIDTH, Drawing, plain_ticks
from .agreement import CURVE_BOUND, CURVE_STEPS
from .criteria import ARCFACE, criteria
from .demo import PIXELS, REFERENCE, Demo


def demo_drawings(demo: Demo) -> list[Drawing]:
    """Return every picture of a demo."""
    return [
        Drawing("loss_curves", "ArcFace trained twice, and the difference.", lambda plt: _loss_curves(plt, demo)),
        Drawing("roc", "ROC of unseen identities, a line for each seed.", lambda plt: _roc(plt, demo)),
        Drawing("identities", "Generated identities, one in each row.", _identities),
    ]


def _loss_curves(plt: Any, demo: Demo) -> Any:
    """Draw both ArcFace trainings of the first seed, below them their difference; a pair of panels for each task."""
    rows = 2 * len(demo.results)
    figure, axes = plt.subplots(
        rows, 1, figsize=(WIDTH, 2.5 * rows), height_ratios=(2, 1.2) * len(demo.results), layout="constrained"
    )
    color = criteria()[ARCFACE].color
    for (curves, differences), result in zip(axes.reshape(-1, 2), demo.results, strict=True):
        fused, expected = (result.nets[name][0].trained.losses for name in (ARCFACE, REFERENCE.name))
        steps = np.arange(1, len(fused) + 1)
        curves.plot(steps, fused, color=color, linewidth=3.5, alpha=0.5, label="fused head")
        curves.plot(steps, expected, color=REFERENCE.color, linewidth=1, label="reference head")
        curves.set(title=f"{result.task.name}: ArcFace trained twice, seed {demo.plan.seeds[0]}", ylabel="loss")
        curves.legend()
        # A logarithmic axis has no zero: no difference is drawn as the rounding of fp32.
        gap = np.maximum(np.abs(np.subtract(fused, expected)), 1e-7)
        differences.semilogy(steps, gap, color=color, linewidth=1, label="difference, at least 1e-7")
        bound = f"bound, {CURVE_BOUND:g} in the first {CURVE_STEPS} steps"
        end = min(CURVE_STEPS, len(steps))
        differences.hlines(CURVE_BOUND, 1, end, color="black", linewidth=1, linestyle="--", label=bound)
        # The axis ends at the bound or the largest difference, so that no decade is empty.
        differences.set(xlabel="step", ylabel="difference", ylim=(5e-8, 2 * max(CURVE_BOUND, gap.max())))
        differences.set_title(f"{result.task.name}: difference of the two losses")
        differences.legend(loc="center right", fontsize=8)
    return figure


def _roc(plt: Any, demo: Demo) -> Any:
    """Draw the true against the false accept rate, a line for each seed; a panel for each task."""
    rows = len(demo.results)
    figure, axes = plt.subplots(rows, 1, figsize=(WIDTH, 4.2 * rows), squeeze=False, layout="constrained")
    colors = {PIXELS: "#BBBBBB", **{name: criterion.color for name, criterion in criteria().items()}}
    for axis, result in zip(axes[:, 0], demo.results, strict=True):
        curves = result.verifications()
        del curves[REFERENCE.name]  # it would hide the fused head's
        for name, found in curves.items():
            tar = np.mean([each.tar[1e-2] for each in found])
            style = {"color": colors[name], "linewidth": 1.3, "alpha": 0.8, "where": "post"}
            for index, each in enumerate(found):
                # Nothing is interpolated: a rate holds until the next point.
                label = f"{name}: {tar:.3f}" if index == 0 else None
                axis.step(each.false_accepts, each.true_accepts, label=label, **style)
        # Below ten false accepts the curve is mostly noise.
        least = min(1e-2, 10 / result.pixels[0].num_pairs[1])
        axis.axvline(1e-2, color="black", linewidth=0.8, linestyle=":", label="FAR 0.01")
        axis.set(xscale="log", xlim=(least, 1), ylim=(0, 1.01))
        plain_ticks(axis.xaxis)
        seeds = len(demo.plan.seeds)
        several = ", a line for each" if seeds > 1 else ""
        title = f"{result.task.name}: unseen identities, {counted(seeds, 'seed')}{several}"
        axis.set(xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)", title=title)
        axis.grid(alpha=0.3)
        # The legend is below good curves and above poor ones. matplotlib's own search for a place takes a second.
        good = max(each.tar[1e-1] for found in curves.values() for each in found) > 0.6
        legend = {"title": "mean TAR at FAR 0.01", "title_fontsize": 8, "fontsize": 8, "framealpha": 0.8}
        axis.legend(frameon=True, edgecolor="none", loc="lower right" if good else "upper left", **legend)
    return figure


def _identities(plt: Any) -> Any:
    """Draw some generated identities, one in each row."""
    rows, columns = 6, 12
    images = identity_images(rows, columns).images
    side = images.shape[-1]
    sheet = images.view(rows, columns, side, side).permute(0, 2, 1, 3).reshape(rows * side, columns * side)
    figure, axis = plt.subplots(figsize=(WIDTH, 2.7), layout="constrained")
    axis.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axis.set_title("generated identities, one in each row")
    axis.axis("off")
    return figure
