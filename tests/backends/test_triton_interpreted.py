"""Every Triton kernel in Triton's interpreter, on CPU tensors.

TRITON_INTERPRET=1 must be set before Triton is imported, and it turns the compiler off for every other test. So these
tests run in a session of their own, as ``make test`` does: ``TRITON_INTERPRET=1 pytest -m interpreter tests/backends``.
Products of bf16 are taken in fp32 here, because the interpreter multiplies their bit patterns
(backends/triton/common.py). The interpreter does not model barriers. A fixture of conftest.py fails a test if two
programs of a launch touch the same memory and one of them writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed here")

from support import extreme_rows
from support.cases import Case, make_inputs
from support.triton_cases import BF16, CORE, FULL, INTERPRETED, Setting, check, force, loss

import fused_arcface as fa
from fused_arcface.backends import torch as plain_torch
from fused_arcface.backends import triton
from fused_arcface.engine.terms import RowGradients

pytestmark = INTERPRETED


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("setting", CORE, ids=str)
def test_agrees_with_the_reference(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    force(setting, monkeypatch)
    check(setting)


@pytest.mark.full
@pytest.mark.parametrize("setting", FULL, ids=str)
def test_agrees_with_the_reference_over_the_full_grid(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    force(setting, monkeypatch)
    check(setting)


@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
def test_stages_with_targets_elsewhere(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose target is in another shard (-1) have only negatives here."""
    case = Case(6, 9, 16, *BF16)
    force(Setting(case, algorithm), monkeypatch)
    x, w, target, _ = make_inputs(case)
    target[::2] = -1
    for result, expected in zip(
        triton.class_stats(x, w, target, 20.0, None, True),
        plain_torch.class_stats(x, w, target, 20.0, None, True),
        strict=True,
    ):
        torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    torch.testing.assert_close(triton.class_max(x, w, target), plain_torch.class_max(x, w, target))
    torch.testing.assert_close(triton.target_cosine(x, w, target), plain_torch.target_cosine(x, w, target))


def test_invalid_label_is_nan() -> None:
    x, w = torch.eye(3), torch.eye(3)
    assert triton.target_cosine(x, w, torch.tensor([0, -1, -2])).isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
def test_nan_row_poisons_itself_and_the_weight_gradient(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(6, 9, 16, *BF16)
    force(Setting(case, algorithm), monkeypatch)
    x, w, target, _ = make_inputs(case)
    x[2, 3] = torch.nan
    x, w = x.requires_grad_(), w.requires_grad_()
    total, stats = loss(x, w, target, margin=case.margin, scale=case.scale, reduction="sum")
    total.backward()
    nan = [False, False, True, False, False, False]
    assert stats.loss.isnan().tolist() == nan
    assert x.grad is not None and x.grad.isnan().any(1).tolist() == nan
    assert w.grad is not None and w.grad.isnan().any(1).all()


@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
def test_no_rows(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(0, 9, 16, *BF16)
    force(Setting(case, algorithm), monkeypatch)
    x, w, target, _ = make_inputs(case)
    x, w = x.requires_grad_(), w.requires_grad_()
    loss(x, w, target, margin=case.margin, scale=case.scale, reduction="sum")[0].backward()
    assert x.grad is not None and x.grad.shape == (0, 16)
    assert w.grad is not None and (w.grad == 0).all()
    assert triton.class_max(x, w, target).shape == (0,)


@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
def test_offsets_past_32_bits(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of weight 2²⁸ elements apart, in memory that is never touched in between."""
    case = Case(4, 12, 16, *BF16)
    force(Setting(case, algorithm), monkeypatch)
    x, w, target, _ = make_inputs(case)
    torch.use_deterministic_algorithms(False)  # it would fill six gigabytes
    far = torch.empty(11 * 2**28 + 16, dtype=torch.bfloat16).as_strided(w.shape, (2**28, 1)).copy_(w)
    torch.use_deterministic_algorithms(True)
    target[0] = 11
    rows = torch.ones(4)
    arguments = target, RowGradients(64.0, torch.full((4,), 60.0, dtype=torch.float64), rows, rows)
    torch.testing.assert_close(
        triton.class_stats(x, far, target, 64.0, None, True), triton.class_stats(x, w, target, 64.0, None, True)
    )
    torch.testing.assert_close(triton.target_cosine(x, far, target), triton.target_cosine(x, w, target))
    torch.testing.assert_close(triton.weight_grad(x, far.clone(), *arguments), triton.weight_grad(x, w, *arguments))


def test_many_splits_of_the_classes_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flash forward cuts its classes into as many ranges as the multiprocessors need; the last may be short or
    empty."""
    setting = Setting(Case(3, 700, 16, *BF16), "flash")
    force(setting, monkeypatch)
    monkeypatch.setattr(triton.stages.flash, "row_splits", lambda *_: 4)
    check(setting)


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("boundary", ["none", "hard", "fold", "clip", "easy", "continuous", "linear"])
def test_margin_agrees_point_by_point(boundary: str, gradient: str) -> None:
    """The finalizing kernel against fused_arcface.margins in fp64 over a dense grid with both ends."""
    cosine = torch.cat([torch.linspace(-1, 1, 1021), torch.tensor([-1.0, -0.0, 0.0, 1.0])])
    lse = torch.linspace(-80, 80, cosine.numel())[
        torch.randperm(cosine.numel(), generator=torch.Generator().manual_seed(0))
    ]
    for m1, m2, m3 in [(1.0, 0.5, 0.0), (4.0, 0.0, 0.1), (1.35, 0.4, 0.2)]:
        numbers = (64.0, m1, m2, m3, boundary, gradient)
        phi = m1 * cosine.double().acos() + m2
        # A jump lies at a multiple of π, and fp32 may see it one rounding away.
        away = ((phi / math.pi - (phi / math.pi).round()).abs() > 1e-6) | (phi < 1)
        results = triton.margin_loss(lse, cosine, *numbers)
        expected = plain_torch.margin_loss(lse.double(), cosine.double(), *numbers)
        for name, result, truth in zip(("loss", "lse", "d_lse", "d_cosine"), results, expected, strict=True):
            scale = 64 * m1 / fa.margins.SIN_FLOOR if name == "d_cosine" else 64
            error = ((result - truth).abs() / truth.abs().clamp(min=scale))[away].max()
            assert error < 2e-6, (name, m1, m2, m3, error)


def test_small_losses_keep_their_digits() -> None:
    """Not log(exp z + Z) - z, which is off by 11 % when the loss is small."""
    small, *_ = triton.margin_loss(torch.tensor([-30.0]), torch.tensor([0.5]), 1.0, 1.0, 0.0, 0.0, "linear", "exact")
    torch.testing.assert_close(small, torch.tensor([math.exp(-30.5)]), rtol=1e-5, atol=0)


def _plain_loss(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return loss(x, w, target, margin=fa.NormSoftmax(), scale=extreme_rows.SCALE, reduction="none")[0]


@pytest.mark.parametrize(
    ("algorithm", "dtype", "tolerance"),
    [
        ("chunks", torch.float32, 2e-6),
        ("chunks", torch.float64, 1e-13),
        ("chunks", torch.bfloat16, 2**-6),
        ("flash", torch.bfloat16, 2**-6),
    ],
)
def test_rows_of_any_norm(
    algorithm: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", algorithm)
    extreme_rows.check_norms(_plain_loss, dtype, tolerance)


@pytest.mark.parametrize("cosine", [-0.99, 0.0, 0.99])
@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
def test_sums_of_centers_of_any_norm(algorithm: str, cosine: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each term is exp(64·cos) times a unit center. bf16 could not hold its product with these norms' inverses."""
    monkeypatch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", algorithm)
    D = 64
    row = F.normalize(torch.randn(D, dtype=torch.float64), dim=0)
    across = torch.randn(61, D, dtype=torch.float64)
    across = F.normalize(across - (across @ row)[:, None] * row)
    w = cosine * row + math.sqrt(1 - cosine**2) * across
    w = (w * torch.logspace(-30, 30, 61, dtype=torch.float64)[:, None]).bfloat16()
    x, target = (row * torch.tensor([[1e-9], [1.0], [1e9]])).bfloat16(), torch.tensor([-1, 30, 60])
    unit = w.double() / w.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    cosines = F.normalize(x.double()) @ unit.T
    is_target = F.one_hot(target.clamp(min=0), 61).bool() & (target >= 0)[:, None]
    exponentials = (64 * cosines).exp().masked_fill(is_target, 0)
    total, largest, center_sum = triton.class_stats(x, w, target, 64.0, None, True)
    torch.testing.assert_close(total.double(), exponentials.sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(largest.double(), cosines.masked_fill(is_target, -1).amax(1), rtol=0, atol=1e-6)
    assert center_sum is not None
    right = exponentials @ unit
    assert ((center_sum.double() - right).abs() <= 2.0**-7 * right.abs().amax(1, keepdim=True)).all()


def test_gradients_that_overflow_in_fp16() -> None:
    extreme_rows.check_overflow(_plain_loss)


def test_zero_row_in_fp16_saturates() -> None:
    x = torch.zeros(1, 4, dtype=torch.float16)
    gradient = triton.embedding_grad(torch.tensor([[1.0, -1.0, 0.0, 1e-20]]), x)
    assert gradient.tolist() == [[65504.0, -65504.0, 0.0, 0.0]]
