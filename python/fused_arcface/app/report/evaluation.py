"""Pictures of one evaluation: ROC, DET and CMC curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fused_arcface.base.extras import pyplot, require, save_figure
from fused_arcface.evaluation.identification import Identification
from fused_arcface.evaluation.verification import Verification

_STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
_COLOR = "#0072B2"


def draw_verification(found: Verification, folder: Path, name: str) -> list[Path]:
    """Draw ``roc.png`` and ``det.png`` into a folder; return their paths.

    The first shows the true over the false accept rate, the second the false reject over the false accept rate on
    normal-deviate axes.

    Args:
        found: figures of the verification.
        folder: folder for the pictures, made if it is missing.
        name: title of the pictures.

    Raises:
        MissingExtra: if matplotlib or scikit-learn is not installed.
    """
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    least = 1 / found.num_pairs[1]  # there are no false accepts below it
    with plt.rc_context(_STYLE):
        roc, axis = plt.subplots(figsize=(6, 4.6), layout="constrained")
        # Nothing is interpolated: a rate holds until the next point.
        axis.step(found.false_accepts, found.true_accepts, where="post", color=_COLOR)
        for far, tar in found.tar.items():
            if far >= least:
                axis.plot(far, tar, "o", color=_COLOR, ms=5)
                axis.annotate(f"{tar:.3f}", (far, tar), (4, -13), textcoords="offset points", fontsize=9)
        axis.set(xscale="log", xlim=(least, 1), ylim=(0, 1.02), xlabel="false accept rate", ylabel="true accept rate")
        _set_title(axis, name)
        axis.grid(alpha=0.3)

        det, axis = plt.subplots(figsize=(5.4, 5), layout="constrained")
        rejects = 1 - found.true_accepts
        inner = (found.false_accepts > 0) & (rejects > 0)  # the ends lie infinitely far
        curve = require("sklearn.metrics", "eval").DetCurveDisplay(fpr=found.false_accepts[inner], fnr=rejects[inner])
        curve.plot(ax=axis, color=_COLOR)
        if 0 < found.eer < 1:
            deviate = require("scipy.stats", "eval").norm.ppf(found.eer)
            axis.plot(deviate, deviate, "o", color=_COLOR, ms=5)
            axis.annotate(f"equal, {found.eer:.3f}", (deviate, deviate), (6, 6), textcoords="offset points", fontsize=9)
        axis.set(xlabel="false accept rate", ylabel="false reject rate")
        _set_title(axis, name)
        axis.grid(alpha=0.3)
        if axis.get_legend() is not None:
            axis.get_legend().remove()
        paths = [folder / "roc.png", folder / "det.png"]
        for figure, path in zip((roc, det), paths, strict=True):
            save_figure(figure, path, dpi=120)
            plt.close(figure)
    return paths


def draw_identification(found: Identification, folder: Path, name: str) -> list[Path]:
    """Draw ``cmc.png``, the identification rate by rank, into a folder; return its path.

    Raises:
        MissingExtra: if matplotlib is not installed.
    """
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(6, 4.6), layout="constrained")
        ranks = np.arange(1, len(found.cmc) + 1)
        axis.plot(ranks, found.cmc, "o-", color=_COLOR, ms=4)
        axis.set(xlabel="rank", ylabel="identification rate", xlim=(0.5, len(ranks) + 0.5), ylim=(0, 1.02))
        _set_title(axis, name)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        path = folder / "cmc.png"
        save_figure(figure, path, dpi=120)
        plt.close(figure)
    return [path]


def _set_title(axis: Any, name: str) -> None:
    """Set a file's name as title, with bytes that are not text as escapes, and dollars not read as formulas."""
    axis.set_title(name.encode(errors="backslashreplace").decode(), parse_math=False)
