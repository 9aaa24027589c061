"""Fixtures of the developers' suites: shapes, and a check of each result before it is timed.

pytest bench --benchmark-autosave
pytest bench --benchmark-compare
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fused_arcface.app.benchmark.cases import BF16, Case, Inputs, make_inputs
from fused_arcface.app.benchmark.memory import release, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = (
    (Case(1024, 100_000, 512, *BF16), Case(1024, 100_000))
    if DEVICE.type == "cuda"
    else (Case(128, 10_000), Case(128, 10_000, 512, "float32", "bfloat16"), Case(16, 50_000))
)


@pytest.fixture
def device() -> torch.device:
    """Return the device to measure on."""
    return DEVICE


@pytest.fixture(params=SHAPES, ids=str)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Yield each shape."""
    yield request.param
    release(DEVICE)


@pytest.fixture
def inputs(case: Case, device: torch.device) -> Inputs:
    """Make the inputs of a shape."""
    return make_inputs(case, device)


@pytest.fixture
def time(benchmark: Callable[[Callable[[], object]], object], device: torch.device) -> Callable[..., None]:
    """Return a function that times another one, on a GPU until its work there has ended."""

    def timed(function: Callable[[], object]) -> None:
        benchmark(lambda: (function(), synchronize(device)))

    return timed


@pytest.fixture(autouse=True)
def group_by_shape(request: pytest.FixtureRequest) -> None:
    """Make one table of pytest-benchmark for each shape and test, so that its rows can be compared."""
    if {"benchmark", "case"} <= set(request.fixturenames):
        passes = request.getfixturevalue("pass_name") if "pass_name" in request.fixturenames else ""
        group = f"{request.node.originalname}: {request.getfixturevalue('case')} {passes}".strip()
        request.getfixturevalue("benchmark").group = group
