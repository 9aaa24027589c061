"""Sub-centers and margins that change the negatives over the CUDA kernels, emulated and on a GPU; see test_cuda.py."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.cases import GEOMETRIES
from support.cuda_places import in_place, places
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
    check_stages,
)

import fused_arcface as fa
from fused_arcface import backends
from fused_arcface.backends import cuda
from fused_arcface.backends import torch as plain_torch
from fused_arcface.engine.terms import CenterStep, Negatives, RowGradients
from fused_arcface.margins import Margin

FP16 = torch.float16


@pytest.fixture(params=places())
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the backend runs under its public name. Hopper's kernels have plain negatives alone, and are off."""
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "0")
    if request.param == "cpu":
        monkeypatch.setattr(cuda, "unavailable", lambda *_: None)
        row = dataclasses.replace(backends.registry._ROWS["cuda"], device_type="cpu")
        monkeypatch.setitem(backends.registry._ROWS, "cuda", row)
    with in_place(request.param, monkeypatch) as device:
        yield device


ROUNDING = {FP32: 2e-5, BF16: 2.0**-7, FP16: 2.0**-7}
"""16-bit rows enter as they are. The exponentials of the second product are rounded, 2⁻⁹ a term."""


@pytest.mark.parametrize("chunks", [False, True], ids=["at once", "chunks"])
@pytest.mark.parametrize(("sub_centers", "sine"), [(1, 0.0), (1, 0.4), (3, None), (3, 0.0), (16, 0.4)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_stages_equal_plain_pytorch(
    dtype: torch.dtype, sub_centers: int, sine: float | None, chunks: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles, each of which ends with a class; in chunks of one tile, or in one."""
    if chunks:
        monkeypatch.setattr(cuda, "CHUNKS", cuda.ChunkConfig(0, 0))
    classes = 400 // sub_centers
    changed = sine is not None
    check_stages(cuda, dtype, ROUNDING[dtype], sub_centers, changed, classes, device, sine or 0.0)


def test_nan_reaches_the_sums(device: str) -> None:
    check_nan(cuda, device)


def test_of_equal_sub_centers_the_first_has_the_gradient(device: str) -> None:
    check_equal_sub_centers(cuda, device)


def _is_decided(sub_centers: int, geometry: str) -> bool:
    """Return false if all centers of a class have the same cosine up to its rounding: any may be the nearest."""
    return sub_centers == 1 or geometry != "collapsed"


TURNED = (fa.InterTopK(fa.ArcFace(0.3), k=2), 1)
GRID = [
    *((each, FP32, geometry, 64.0) for each in USUAL for geometry in GEOMETRIES if _is_decided(each[1], geometry)),
    *((each, BF16, "late", 64.0) for each in USUAL),
    *((each, FP32, "late", 1000.0) for each in USUAL),
    (USUAL[0], FP32, "collapsed", 1000.0),
    *((each, FP32, "late", 30.0) for each in (*VARIANTS, TURNED) if each not in USUAL),
]


@pytest.mark.parametrize(("variant", "dtype", "geometry", "scale"), GRID, ids=lambda each: str(each))
def test_loss_and_gradients_equal_the_reference(
    variant: tuple[Margin, int], dtype: torch.dtype, geometry: str, scale: float, device: str
) -> None:
    check_loss("cuda", *variant, dtype, geometry, scale, device)


@pytest.mark.parametrize(("options", "updated"), list(itertools.product(HEADS, [False, True])), ids=str)
def test_partial_fc_trains_as_with_plain_pytorch(options: dict[str, Any], updated: bool, device: str) -> None:
    check_partial_fc("cuda", options, updated, device)


@pytest.mark.parametrize("momentum_dtype", [FP32, torch.int8])
def test_update_with_sub_centers_in_several_tiles(
    momentum_dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampled step of CenterSGD in chunks of one tile: 42 classes of three centers each, then 8 and padding."""
    monkeypatch.setattr(cuda, "CHUNKS", cuda.ChunkConfig(0, 0))
    x, w = torch.randn(9, 24).to(device), torch.randn(300, 24).to(device)
    rows = torch.arange(300, device=device).unflatten(0, (100, 3))[::2].flatten()
    classes = torch.cat([rows, rows.new_full((6,), 300)])
    target = torch.tensor([0, 4, 149, -1, 30, 31, 125, 126, 140], device=device)
    negatives = Negatives(
        3, torch.linspace(-0.2, 0.25, 9, device=device), torch.tensor([1.0, 0.3, 0.01, 0.0], device=device).double()
    )
    lse, numbers = torch.full((9,), 3.0, dtype=torch.float64, device=device), torch.linspace(-1, 1, 9, device=device)
    results = []
    for backend in (cuda, plain_torch):
        weight = w.clone()
        buffer = (10 * w).to(momentum_dtype)
        units = torch.full((300, 1), 0.01, device=device) if momentum_dtype == torch.int8 else None
        active = torch.tensor(True, device=device)
        step = CenterStep(classes, buffer, units, 0.1, 0.9, 5e-4, 7, 1000, active)
        backend.update_centers(x, weight, target, RowGradients(16.0, lse, numbers, -numbers), step, negatives)
        results.append((weight, buffer.float() * (1 if units is None else units)))
    largest = 0.02 if momentum_dtype == torch.int8 else 1e-5
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=largest)
    others = torch.ones(301, dtype=torch.bool, device=device).index_fill_(0, classes, False)[:300]
    assert torch.equal(results[0][0][others], w[others])
