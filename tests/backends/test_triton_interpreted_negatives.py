"""Sub-centers and margins that change the negatives over the Triton kernels; see test_triton_interpreted.py."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from support.cases import GEOMETRIES, Case, Outcome, make_inputs, run, tolerance
from support.triton_cases import INTERPRETED, Setting, force, on_the_cpu
from support.triton_negatives import NEGATIVES, NegativesSetting, check_negatives

import fused_arcface as fa
from fused_arcface.backends import triton
from fused_arcface.engine.terms import Negatives, RowGradients
from fused_arcface.margins import Margin, registry

pytestmark = INTERPRETED

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with on_the_cpu(monkeypatch):
        yield


@pytest.mark.parametrize("setting", NEGATIVES, ids=str)
def test_stages_equal_plain_pytorch(setting: NegativesSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    check_negatives(setting, monkeypatch)


def test_nan_reaches_the_sums() -> None:
    """Neither a row nor a center of NaN is lost in the choice of the nearest sub-center."""
    x, weight = torch.randn(3, 8), torch.randn(12, 8)
    x[1, 2] = torch.nan
    total, _, _ = triton.class_stats(x, weight, torch.tensor([0, 0, 0]), 8.0, None, True, None, Negatives(3))
    assert total.isnan().tolist() == [False, True, False]
    weight[7, 1] = torch.nan
    total, _, _ = triton.class_stats(x, weight, torch.tensor([0, 0, 0]), 8.0, None, True, None, Negatives(3))
    assert total.isnan().all()


def test_of_equal_sub_centers_the_first_has_the_gradient() -> None:
    x, weight = torch.eye(4)[:2], torch.eye(4)[[2, 0, 0, 0]]
    lse, rows = torch.zeros(2, dtype=FP64), torch.ones(2)
    gradient = triton.weight_grad(x, weight, torch.tensor([0, 0]), RowGradients(1.0, lse, rows, 0 * rows), Negatives(2))
    assert (gradient[2] != 0).any() and (gradient[3] == 0).all()


def _outcome(inputs: Any, margin: Margin, backend: str | None, **options: Any) -> Outcome:
    function = fa.reference.margin_softmax_loss if backend is None else fa.margin_softmax_loss
    named = {} if backend is None else {"backend": backend}
    return run(function, inputs, margin=copy.deepcopy(margin), **named, **options)


MODULATED = [margin for margin in registry.examples("negatives") if not hasattr(margin, "turns_negatives")]
VARIANTS = [
    *((margin, 1) for margin in MODULATED),
    (fa.ArcFace(0.5), 3),
    (fa.CosFace(), 5),
    (registry.trained(fa.CurricularFace(), t=0.4), 2),
]
USUAL = [(registry.trained(fa.CurricularFace(), t=0.4), 1), (fa.ArcFace(0.5), 3)]
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
    """The error is at most twice that of plain PyTorch in the same dtypes, plus what the rounding of a cosine does."""
    margin, sub_centers = variant
    name = str(dtype).removeprefix("torch.")
    case = Case(9, 31 * sub_centers, 24, name, name, scale, margin, geometry)
    force(Setting(case, algorithm), monkeypatch)
    inputs = make_inputs(case)
    labels = torch.where(inputs.target < 0, inputs.target, inputs.target // sub_centers)
    inputs = inputs._replace(target=labels)
    exact = inputs._replace(embeddings=inputs.embeddings.double(), weight=inputs.weight.double())
    options = {"scale": scale, "sub_centers": sub_centers}
    got = _outcome(inputs, margin, "triton", **options)
    truth = _outcome(exact, margin, None, **options)
    eager = _outcome(inputs, margin, None, **options)
    terms, allowed = 2.0**-7 if dtype == BF16 else 0.0, tolerance(case, truth)
    for field, rounding in (("loss", 0.0), ("d_embeddings", terms), ("d_weight", terms)):
        mine, right, theirs = (getattr(outcome, field) for outcome in (got, truth, eager))
        size = right.abs().max().clamp(min=1e-9)
        error, of_eager = (((each - right).abs().max() / size).item() for each in (mine, theirs))
        assert error <= 2 * of_eager + allowed + rounding, f"{field}: {error:.1e}, of eager {of_eager:.1e}"
    if geometry != "collapsed":  # all cosines are equal there, up to their rounding
        assert torch.equal(got.stats.correct, truth.stats.correct)


HEADS = [
    {"margin": fa.ArcFace(0.3), "sub_centers": 3},
    {"margin": fa.MVSoftmax(fa.ArcFace(0.3)), "sample_rate": 0.3},
    {"margin": fa.ArcFace(0.3), "sub_centers": 2, "sample_rate": 0.3},
]


@pytest.mark.parametrize(("options", "updated"), list(itertools.product(HEADS, [False, True])), ids=str)
def test_partial_fc_trains_as_with_plain_pytorch(options: dict[str, Any], updated: bool) -> None:
    """Two steps, with a gradient by weight and with CenterSGD."""
    recipe = fa.CenterSGD(lr=0.1) if updated else None
    heads = [
        fa.PartialFC(20, 40, scale=16.0, backend=backend, center_optimizer=recipe, dense_grad=not updated, **options)
        for backend in ("triton", "torch")
    ]
    x, y = torch.randn(7, 20), torch.randint(40, (7,))
    for _ in range(2):
        results = []
        for head in heads:
            leaf = x.clone().requires_grad_()
            loss = head(leaf, y)
            loss.backward()
            weight = head.weight if head.weight.grad is None else head.weight.grad
            results.append((loss.detach(), leaf.grad, weight.detach().clone()))
            head.weight.grad = None
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
