"""Sub-centers and margins that change the negatives over the Triton kernels; see test_triton_interpreted.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from support.cases import GEOMETRIES, Case
from support.negatives_cases import (
    BF16,
    FP32,
    HEADS,
    USUAL,
    VARIANTS,
    check_equal_sub_centers,
    check_loss,
    check_nan,
    check_partial_fc,
)
from support.triton_cases import INTERPRETED, Setting, force, on_the_cpu
from support.triton_negatives import NEGATIVES, NegativesSetting, check_negatives

from fused_arcface.backends import triton
from fused_arcface.margins import Margin

pytestmark = INTERPRETED


@pytest.fixture(autouse=True)
def _triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with on_the_cpu(monkeypatch):
        yield


@pytest.mark.parametrize("setting", NEGATIVES, ids=str)
def test_stages_equal_plain_pytorch(setting: NegativesSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    check_negatives(setting, monkeypatch)


def test_nan_reaches_the_sums() -> None:
    check_nan(triton, "cpu")


def test_of_equal_sub_centers_the_first_has_the_gradient() -> None:
    check_equal_sub_centers(triton, "cpu")


GRID = [
    *((each, "chunks", FP32, geometry, 64.0) for each in USUAL for geometry in GEOMETRIES),
    *((each, algorithm, BF16, "late", 64.0) for each in USUAL for algorithm in ("chunks", "flash")),
    *((each, "chunks", FP32, geometry, 1000.0) for each in USUAL for geometry in ("late", "collapsed")),
    *((each, "chunks", FP32, "late", 30.0) for each in VARIANTS if each not in USUAL),
]


@pytest.mark.parametrize(("variant", "algorithm", "dtype", "geometry", "scale"), GRID, ids=lambda each: str(each))
def test_loss_and_gradients_equal_the_reference(
    variant: tuple[Margin, int],
    algorithm: str,
    dtype: torch.dtype,
    geometry: str,
    scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force(Setting(Case(), algorithm), monkeypatch)
    check_loss("triton", *variant, dtype, geometry, scale)


@pytest.mark.parametrize(("options", "updated"), list(itertools.product(HEADS, [False, True])), ids=str)
def test_partial_fc_trains_as_with_plain_pytorch(options: dict[str, Any], updated: bool) -> None:
    check_partial_fc("triton", options, updated)
