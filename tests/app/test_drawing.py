"""The way from a drawing to a file: fonts, ticks, and names that no font has."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from PIL import Image

from fused_arcface.app.drawing import WIDTH, Drawing, as_svg, plain_ticks, set_title, write_pictures
from fused_arcface.app.report.evaluation import draw_histograms, roc_drawing


def test_names_of_any_script_are_drawn_without_a_warning(tmp_path: Path) -> None:
    name = "人物 一, $x_1^2$ & <b>, a\u202eb\x1b, ཨོཾ"
    drawing = roc_drawing([0.0, 0.5, 1.0], [0.2, 0.8, 1.0], 10, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (path,) = write_pictures([drawing], tmp_path)
        svg = as_svg(drawing).decode()
    assert Image.open(path).size[0] == round(WIDTH * 180)
    assert "人物 一, $x_1^2$ &amp; &lt;b&gt;, a\\u202eb\\x1b" in svg


def test_the_same_drawing_is_the_same_file() -> None:
    drawing = roc_drawing([0.0, 0.5, 1.0], [0.2, 0.8, 1.0], 10, "a")
    assert as_svg(drawing) == as_svg(drawing) and b"date" not in as_svg(drawing)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1, 1000, ["1", "10", "100", "1,000"]), (30, 1100, ["50", "100", "200", "500", "1,000"])],
)
def test_ticks_are_plain_numbers_within_the_axis(low: float, high: float, expected: list[str]) -> None:
    shown: list[str] = []

    def draw(plt: Any) -> Any:
        figure, axis = plt.subplots()
        axis.set(xscale="log", xlim=(low, high))
        plain_ticks(axis.xaxis)
        figure.canvas.draw()
        shown[:] = [
            label.get_text()
            for place, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
            if low <= place <= high
        ]
        return figure

    as_svg(Drawing("x", "", draw))
    assert shown == expected


def test_a_histogram_ends_where_its_values_do() -> None:
    limits: list[float] = []

    def draw(plt: Any) -> Any:
        figure, axis = plt.subplots()
        draw_histograms(axis, [0, 60, 120, 180], {"a": [0, 4, 0], "b": [0, 1, 1]})
        limits[:] = axis.get_xlim()
        set_title(axis, "x")
        return figure

    as_svg(Drawing("x", "", draw))
    assert 50 < limits[0] < 60 and limits[1] == 180
