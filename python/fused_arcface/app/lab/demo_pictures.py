"""The demo's pictures: loss curves and ROC. Drawn with matplotlib, into files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fused_arcface.base.extras import pyplot, save_figure
from fused_arcface.evaluation import Verification

from ..data import identity_images
from .demo import ARCFACE, HEADS, REFERENCE, SOFTMAX, Demo, Result
from .problems import CURVE_BOUND, CURVE_STEPS

# Colors that stay apart for color-blind readers (Okabe and Ito's).
COLORS = {
    "pixels, no net": "#BBBBBB",
    SOFTMAX: "#D55E00",
    "NormSoftmax": "#009E73",
    ARCFACE: "#0072B2",
    REFERENCE: "#000000",
}


def draw_pictures(demo: Demo, folder: Path) -> list[Path]:
    """Write the pictures into a folder.

    Returns:
        Their paths.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    plt = pyplot()
    paths = []
    for name, make in (("loss_curves.png", _loss_curves), ("roc.png", _roc), ("identities.png", _identities)):
        with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
            figure = make(plt, demo)
            paths.append(folder / name)
            save_figure(figure, paths[-1], dpi=110, bbox_inches="tight")
            plt.close(figure)
    return paths


def _loss_curves(plt: Any, demo: Demo) -> Any:
    """Above, both ArcFace trainings of the first seed; below, their difference. A column for each problem."""
    figure, axes = plt.subplots(
        2, len(demo.results), figsize=(5.5 * len(demo.results), 6), sharex="col", height_ratios=(2, 1), squeeze=False
    )
    for (curves, differences), result in zip(axes.T, demo.results, strict=True):
        fused, expected = result.of(ARCFACE)[0].losses, result.of(REFERENCE)[0].losses
        steps = np.arange(1, len(fused) + 1)
        curves.plot(steps, fused, color=COLORS[ARCFACE], linewidth=3.5, alpha=0.5, label="fused head")
        curves.plot(steps, expected, color=COLORS[REFERENCE], linewidth=1, label="reference head")
        curves.set(title=f"{result.problem.name}: ArcFace, trained twice", ylabel="loss")
        curves.legend(frameon=False)
        # A difference of nothing has no place on a logarithmic axis: it is drawn at the rounding of fp32.
        gap = np.maximum(np.abs(np.subtract(fused, expected)), 1e-7)
        differences.semilogy(steps, gap, color=COLORS[ARCFACE], linewidth=1)
        differences.hlines(CURVE_BOUND, 1, min(CURVE_STEPS, len(steps)), color="black", linewidth=1, linestyle="--")
        differences.text(1, CURVE_BOUND, "bound", va="bottom")
        differences.set(xlabel="step", ylabel="difference", ylim=(5e-8, 0.1))
    figure.tight_layout()
    return figure


def _roc(plt: Any, demo: Demo) -> Any:
    """True against false accept rate, a thin line for each seed; a column for each problem."""
    figure, axes = plt.subplots(1, len(demo.results), figsize=(5.5 * len(demo.results), 4.8), squeeze=False)
    for axis, result in zip(axes[0], demo.results, strict=True):
        curves = {"pixels, no net": result.pixels}
        for criterion in HEADS:
            if criterion != REFERENCE:
                curves[criterion] = [training.verification for training in result.of(criterion)]
        for name, found in curves.items():
            _plot_curves(axis, name, found)
        axis.axvline(1e-2, color="black", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlim=(_least_rate(result), 1), ylim=(0, 1.01))
        axis.set(
            xlabel="false accept rate", ylabel="true accept rate", title=f"{result.problem.name}: unseen identities"
        )
        # Where no curve is: below good ones, above poor ones. matplotlib's own search takes a second.
        good = max(each.tar[1e-1] for found in curves.values() for each in found) > 0.6
        axis.legend(framealpha=0.8, edgecolor="none", loc="lower right" if good else "upper left", fontsize=10)
    figure.tight_layout()
    return figure


def _plot_curves(axis: Any, name: str, found: list[Verification]) -> None:
    tar = np.mean([each.tar[1e-2] for each in found])
    for index, each in enumerate(found):
        axis.step(
            each.false_accepts,
            each.true_accepts,
            where="post",  # nothing is interpolated
            color=COLORS[name],
            linewidth=1.3,
            alpha=0.8,
            label=f"{name} ({tar:.3f} at FAR 0.01)" if index == 0 else None,
        )


def _least_rate(result: Result) -> float:
    """Where the curve begins: below ten false accepts it tells little."""
    rates = result.trainings[0].verification.false_accepts
    return float(min(1e-2, 10 * rates[rates > 0].min()))


def _identities(plt: Any, demo: Demo) -> Any:
    """What generated identities look like: one in each row."""
    rows, columns = 6, 12
    images = identity_images(rows, columns).images
    side = images.shape[-1]
    sheet = images.view(rows, columns, side, side).permute(0, 2, 1, 3).reshape(rows * side, columns * side)
    figure, axis = plt.subplots(figsize=(8, 4))
    axis.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axis.set_title("generated identities, one in each row")
    axis.axis("off")
    return figure
