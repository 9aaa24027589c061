"""The pictures of the margins: each margin of the registry is drawn as it is without arguments."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

import matplotlib.pyplot as plt

from fused_arcface.app.lab.margin_pictures import NORMS, entries, label, margin_drawings
from fused_arcface.margins import angular
from fused_arcface.margins.registry import REGISTRY

SCALE = 10.0


def lines_of(place: int) -> tuple[dict[str, Any], list[Any]]:
    figure = margin_drawings(SCALE)[place].draw(plt)
    handles, names = figure.axes[0].get_legend_handles_labels()
    plt.close(figure)
    assert all(axis.get_xlabel() and axis.get_ylabel() and axis.get_title() for axis in figure.axes)
    return dict(zip(names, handles, strict=True)), figure.axes


def test_every_margin_is_drawn() -> None:
    named = {name for place in range(3) for name in lines_of(place)[0]}
    assert {label(entry) for entry in REGISTRY} <= named


def test_lines_are_those_of_the_defaults() -> None:
    lines, (_, slopes) = lines_of(0)
    for entry, slope in zip(entries("angular"), slopes.lines, strict=False):
        degrees, logits = lines[label(entry)].get_data()
        expected = SCALE * entry.margin()(torch.as_tensor(degrees, dtype=torch.float64).deg2rad().cos())
        jumps = np.abs(np.diff(expected)) > 0.5  # at a jump half a step decides
        near = ~(np.r_[jumps, False] | np.r_[False, jumps])
        assert near.sum() > 700 and logits[near] == pytest.approx(np.asarray(expected)[near], abs=1e-4)
        # Apart from jumps and kinks, the derivative is the quotient of differences on both sides.
        cosines = np.cos(np.deg2rad(degrees))
        quotients = (expected[2:] - expected[:-2]).numpy() / (SCALE * (cosines[2:] - cosines[:-2]))
        smooth = (near[1:-1] & (np.abs(np.diff(quotients, prepend=quotients[0])) < 0.02))[4:-4]
        assert smooth.sum() > 500 and slope.get_ydata()[smooth] == pytest.approx(quotients[4:-4][smooth], abs=0.02)


def test_negatives_by_hand() -> None:
    """Beside a target at 60°: cos(60° + 0.5) is 0.024, and CurricularFace begins with t = 0."""
    lines, _ = lines_of(2)
    degrees, curricular = lines["CurricularFace(margin=0.5, rate=0.01)"].get_data()
    at = {float(angle): place for place, angle in enumerate(degrees)}
    assert curricular[at[45.0]] == pytest.approx(SCALE * 0.5)  # c·(t + c), c² = 0.5
    assert curricular[at[120.0]] == pytest.approx(SCALE * -0.5)  # easy: as it is
    filtered = lines["InterclassFilter(threshold=0.4)"].get_data()[1]
    assert filtered[at[60.0]] == 0 and filtered[at[90.0]] == pytest.approx(0, abs=1e-5)
    # t·c + t − 1 with t = 1.12
    assert lines["MVSoftmax(t=1.12)"].get_data()[1][at[60.0]] == pytest.approx(SCALE * (1.12 * 0.5 + 0.12))


def test_rows_and_boundaries() -> None:
    lines, (axis,) = lines_of(1)
    assert {f"embedding of norm {norm:g}" for norm in NORMS} <= set(lines)
    # A line for no margin, three for each margin, three in the legend; ElasticFace alone is a band.
    assert len(axis.lines) == 1 + 3 * (len(entries("row")) - 1) + 3 and len(axis.collections) == 1
    lines, _ = lines_of(3)
    default = angular.ArcFace().boundary
    names = {f"{name} (default)" if name == default else name for name in get_args(angular.Boundary)}
    assert set(lines) == names
