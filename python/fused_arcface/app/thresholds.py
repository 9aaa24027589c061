"""The thresholds of a run's last verification, in ``thresholds.json``.

Training and ``verify`` write them, ``similarity`` takes its verdict from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fused_arcface.base.files import write_text
from fused_arcface.base.reading import DataError, file_errors, read_bytes
from fused_arcface.base.typed_json import typed
from fused_arcface.evaluation.thresholds import BEST_ACCURACY, OperatingPoint, far_name

_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class KeptThresholds:
    """Cosine thresholds of one net."""

    data: str
    """Name of the set that they were chosen on."""
    accuracy: float
    """Mean accuracy over the folds of that set."""
    points: list[OperatingPoint]
    """Their ``threshold`` is a cosine, from -1 to 1; infinite where no pair may be accepted."""
    step: int | None = None
    """Steps of training behind the net; None if it is not known."""
    pairs_of_two: int | None = None
    """Pairs of two people in that set: n of them measure no false accept rate below 1/n. None if it is not known."""

    def at(self, far: float | None = None) -> OperatingPoint:
        """Return the point of the best accuracy, or the point of a false accept rate.

        Raises:
            ValueError: if there is none for this rate.
        """
        name = BEST_ACCURACY if far is None else far_name(far)
        found = next((point for point in self.points if point.name == name), None)
        if found is None:
            there = ", ".join(point.name.removeprefix("FAR ") for point in self.points if point.name.startswith("FAR"))
            raise ValueError(f"far must be one of {there}; got {far}")
        return found

    def save(self, path: Path) -> None:
        """Write the thresholds as JSON, which :func:`read_thresholds` reads."""
        values = {**asdict(self), "points": as_json(self.points)}
        write_text(path, json.dumps(values, indent=1) + "\n")


def as_json(points: Sequence[OperatingPoint]) -> list[dict[str, Any]]:
    """Return points as JSON has them: a threshold that accepts nobody, an infinite one, is null."""
    rows = [asdict(point) for point in points]
    return [{**row, "threshold": None if math.isinf(row["threshold"]) else row["threshold"]} for row in rows]


def as_text(points: Sequence[OperatingPoint]) -> list[tuple[str, ...]]:
    """Return the columns of a table of points: name, threshold, accuracy, FAR and TAR.

    >>> as_text([OperatingPoint("FAR 0.1", math.inf, 0.0, 0.25, 0.5)])
    [('FAR 0.1', 'none', '0.5000', '0.0000', '0.2500')]
    """
    rows = []
    for point in points:
        threshold = "none" if math.isinf(point.threshold) else f"{point.threshold:.4f}"
        rates = (point.accuracy, point.false_accept_rate, point.true_accept_rate)
        rows.append((point.name, threshold, *(f"{rate:.4f}" for rate in rates)))
    return rows


def of_cosine_distance(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """Return points with cosines as thresholds, from points whose thresholds are scores of the cosine distance."""
    return [replace(point, threshold=1 + point.threshold) for point in points]


def read_thresholds(path: Path) -> KeptThresholds | None:
    """Return the thresholds in a file, None if there is no such file; raise DataError if it is damaged."""
    if not path.is_file():
        return None
    content = read_bytes(path, _MOST_BYTES)
    try:
        with file_errors(path):
            values: dict[str, Any] = json.loads(content)
            points = [_point(point) for point in values["points"]]
            return replace(typed(KeptThresholds, {**values, "points": []}), points=points)
    except DataError as error:
        raise DataError(f"{error}; remove the file to continue without thresholds") from None


def _point(values: dict[str, Any]) -> OperatingPoint:
    if values["threshold"] is None:
        return replace(typed(OperatingPoint, {**values, "threshold": 0}), threshold=math.inf)
    return typed(OperatingPoint, values)
