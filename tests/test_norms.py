"""Rows of any norm that their dtype holds, and gradients that theirs does not."""

from __future__ import annotations

import extreme_rows
import pytest
import torch
import torch.nn.functional as F

import fused_arcface as fa
from fused_arcface.normalise import norms_of

NORMS = [1e-25, 1e-13, 1.0, 1e19, 1e25, 1e37, 9e37, 5e38]
BACKENDS = ["oracle", "reference", "cpu"]


def _loss(backend: str, **options: object) -> extreme_rows.Loss:
    if backend == "oracle":
        return extreme_rows.plain(fa.reference.margin_softmax_loss, **options)
    if fa.backends.available()[backend] is not None:
        pytest.skip(str(fa.backends.available()[backend]))
    return extreme_rows.plain(fa.margin_softmax_loss, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float64, 1e-13)]
)
def test_losses_and_gradients(dtype: torch.dtype, tolerance: float, smoothing: float, backend: str) -> None:
    extreme_rows.check_norms(_loss(backend, label_smoothing=smoothing), dtype, tolerance, smoothing)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ARCFACE_ISA", isa)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        extreme_rows.check_norms(_loss("cpu"), dtype, tolerance)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_that_overflow_in_fp16(smoothing: float, backend: str) -> None:
    extreme_rows.check_overflow(_loss(backend, label_smoothing=smoothing))


def test_grad_scaler_sees_an_overflow() -> None:
    """The largest gradient is 1.97 as in the report; times 65536 it is past fp16's range."""
    x = torch.tensor([[0.25, 0.0]], dtype=torch.float16, requires_grad=True)
    w = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    (65536 * fa.margin_softmax_loss(x, w, torch.tensor([0]), margin=fa.NormSoftmax(), scale=0.5)).backward()
    assert x.grad is not None and x.grad[0, 1] == -torch.inf


@pytest.mark.parametrize("norm", [1e160, 1e300])
def test_margins_know_the_norms_of_long_rows(norm: float) -> None:
    rows = torch.tensor([[3.0, 4.0]], dtype=torch.float64) * norm
    assert norms_of(rows).item() == pytest.approx(5 * norm, rel=1e-15)
    assert norms_of(torch.tensor([[3e30, 4e30]])).item() == pytest.approx(5e30, rel=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_cosines_of_rows_of_any_norm(norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (F.normalize(torch.randn(4, 16, generator=generator)).double() * norm).clamp(-3e38, 3e38).float()
    w = torch.randn(5, 16, generator=generator)
    y = torch.tensor([0, 1, 2, 4])
    expected = F.normalize(x.double()) @ F.normalize(w.double()).T

    head = fa.MarginHead(16, 5)
    with torch.no_grad():
        head.weight.copy_(w)
    torch.testing.assert_close(head.logits(x).double() / head.scale, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(head.topk(x, 5)[0].double(), expected.sort(1, descending=True).values, rtol=0, atol=1e-6)
    loss, stats = fa.margin_softmax_loss(x, w, y, return_stats=True)
    of_targets = expected.gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(stats.target_cosine.double(), of_targets, rtol=0, atol=1e-6)
    right = fa.reference.margin_softmax_loss(x.double(), w.double(), y)
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
