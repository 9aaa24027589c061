"""Rises of margin and scale: values worked out by hand, and the formula of WeSpeaker's and 3D-Speaker's schedulers."""

from __future__ import annotations

import math

import pytest

import fused_arcface as fa
from fused_arcface.margins import Rise, at_strength


def wespeaker_margin(step: int, begin: int, end: int, initial: float, final: float, shape: str) -> float:
    """``MarginScheduler`` of WeSpeaker and 3D-Speaker, as its code computes it."""
    if step >= end:
        return final
    if step < begin:
        return initial
    part = (step - begin) / (end - begin)
    ratio = 1.0 - math.exp(part * math.log(1e-3 / (1.0 + 1e-6))) * 1.0 if shape == "exp" else part
    return initial + (final - initial) * ratio


@pytest.mark.parametrize("shape", ["exponential", "linear"])
def test_the_margins_are_those_of_the_speaker_recipes(shape: str) -> None:
    """The shared recipe: no margin until epoch 20, 0.2 from epoch 40 on, of 100 steps each."""
    rise = Rise(1900, 3900, shape=shape)
    for step in (0, 1899, 1900, 1901, 2500, 3000, 3899, 3900, 9999):
        margin = at_strength(fa.ArcFace(0.2), rise(step))
        expected = wespeaker_margin(step, 1900, 3900, 0.0, 0.2, shape[:3])
        assert margin.margin == pytest.approx(expected, abs=2e-6 * 0.2)


def test_values_by_hand() -> None:
    """A third of the way: 1 - 0.001^(1/3) = 0.9; from a half, 0.5 + 0.5·0.9."""
    assert Rise(3, 6)(4) == pytest.approx(0.9, abs=1e-12)
    assert Rise(3, 6, start=0.5)(4) == pytest.approx(0.95, abs=1e-12)
    assert [Rise(0, 4, 0.2, "linear")(step) for step in (0, 1, 4, 5)] == [0.2, pytest.approx(0.4), 1.0, 1.0]


def test_a_part_of_each_margin() -> None:
    expected = {
        fa.ArcFace(0.4, "fold"): fa.ArcFace(0.1, "fold"),
        fa.CosFace(0.4): fa.CosFace(0.1),
        fa.SphereFace(3.0, "straight_through"): fa.SphereFace(1.5, "straight_through"),
        fa.CombinedMargin(2.0, 0.4, 0.8, "clip"): fa.CombinedMargin(1.25, 0.1, 0.2, "clip"),
        fa.NormSoftmax(): fa.NormSoftmax(),
        fa.MVSoftmax(fa.CosFace(0.4), t=1.5): fa.MVSoftmax(fa.CosFace(0.1), t=1.5),
        fa.InterclassFilter(fa.ArcFace(0.4)): fa.InterclassFilter(fa.ArcFace(0.1)),
        fa.InterTopK(fa.ArcFace(0.4), penalty=0.08, k=3): fa.InterTopK(fa.ArcFace(0.1), penalty=0.02, k=3),
    }
    for whole, part in expected.items():
        assert at_strength(whole, 0.25) == part
        assert at_strength(whole, 1.0) == whole


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"Rise: end must be > begin=5; got 5"):
        Rise(5, 5)
    with pytest.raises(ValueError, match=r"Rise: start must be in \[0, 1\]; got 1.5"):
        Rise(0, 5, 1.5)
    with pytest.raises(ValueError, match=r"Rise: shape must be one of 'exponential', 'linear'; got 'cosine'"):
        Rise(0, 5, shape="cosine")
    with pytest.raises(TypeError, match=r"a margin schedule needs ArcFace, .*; got AdaFace"):
        at_strength(fa.AdaFace(), 0.5)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]; got -0.1"):
        at_strength(fa.ArcFace(), -0.1)
