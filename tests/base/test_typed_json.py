"""Values of JSON as types: what is taken, and what a stranger's file may not hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from fused_arcface.base.typed_json import typed


class Place(NamedTuple):
    name: str
    at: float


@dataclass
class Trip:
    bytes: int
    places: list[Place]
    ends: tuple[int, int]
    done: bool = False
    note: str | None = None


WHOLE = {"bytes": 3, "places": [["home", 1], ["sea", 2.5]], "ends": [0, 7], "done": True, "note": "far"}


def test_each_type() -> None:
    places = [Place("home", 1.0), Place("sea", 2.5)]
    assert typed(Trip, json.loads(json.dumps(WHOLE))) == Trip(3, places, (0, 7), True, "far")
    assert typed(Trip, {"bytes": 3, "places": [], "ends": [0, 7], "note": None, "newer": 1}) == Trip(3, [], (0, 7))


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": 3.0},
        {"bytes": True},
        {"bytes": None},
        {"places": {}},
        {"places": [{"name": "home", "at": 1}]},
        {"places": [["home"]]},
        {"places": [["home", 1, 2]]},
        {"places": [["home", "1"]]},
        {"places": [["home", float("nan")]]},
        {"places": [["home", float("inf")]]},
        {"ends": [0]},
        {"ends": 3},
        {"ends": [[0], 7]},
        {"ends": {}},
        {"done": 1},
        {"note": {}},
        {"bytes": {}},
        {"places": [["home", {}]]},
        {"places": [[[], 1]]},
        {"note": 3},
    ],
    ids=str,
)
def test_another_type_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|argument"):
        typed(Trip, {**WHOLE, **change})


def test_a_missing_value_and_another_whole() -> None:
    for value in ({"bytes": 3}, [3, [], [0, 7]], "trip", None):
        with pytest.raises(ValueError, match=r"must be|missing"):
            typed(Trip, value)
    with pytest.raises(ValueError, match=r"^inf must be a finite number$"):
        typed(float, float("inf"))
