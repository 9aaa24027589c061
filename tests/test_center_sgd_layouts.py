"""CenterSGD on centers of every memory layout: the same step as on contiguous ones, or an error before anything
changes."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS
from torch import Tensor

import fused_arcface as fa

C, D = 30, 70  # more than one block of an int8 momentum, and not a multiple of one


def _head(backend: str, dtype: torch.dtype = torch.float32, **options: object) -> fa.PartialFC:
    recipe = fa.CenterSGD(0.1, weight_decay=5e-4, momentum_dtype=options.pop("momentum_dtype", None))  # type: ignore[arg-type]
    return fa.PartialFC(D, C, center_optimizer=recipe, scale=16, backend=backend, dtype=dtype, **options)  # type: ignore[arg-type]


def _train(head: fa.PartialFC, steps: int = 3) -> Tensor:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, D, generator=generator, dtype=torch.float64).to(torch.float32)
        head(x, torch.randint(C, (12,), generator=generator)).backward()
    return head.weight.detach()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"sample_rate": 0.5, "momentum_dtype": torch.int8}], ids=["all", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("how", ["assign", "data"])
def test_a_step_honors_strides(how: str, backend: str, dtype: torch.dtype, options: dict, layout: str) -> None:
    if fa.backends.available()[backend] is not None:
        pytest.skip(str(fa.backends.available()[backend]))
    expected = _train(_head(backend, dtype, **options))
    head = _head(backend, dtype, **options)
    laid_out = LAYOUTS[layout](head.weight.detach().clone())
    if how == "data":
        head.weight.data = laid_out
    else:
        head.load_state_dict({**head.state_dict(), "weight": laid_out}, assign=True)
    assert head.weight.stride() == laid_out.stride()
    torch.testing.assert_close(_train(head), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(1, D).expand(C, D), r"share memory between its elements.*got strides \(0, 1\) for \(30, 70\)"),
        (torch.randn(C, 1).expand(C, D), r"share memory .*got strides \(1, 0\)"),
        (torch.randn(C + D).unfold(0, D, 1)[:C], r"share memory .*got strides \(1, 1\)"),
        (torch.randn(C + 2, D), r"momentum_buffer must be contiguous and \(32, 70\)"),
    ],
    ids=["one row", "one column", "windows", "more rows"],
)
def test_memory_that_a_step_cannot_write_is_refused(backend: str, weight: Tensor, message: str) -> None:
    head = _head(backend)
    head.weight.data = weight
    before, step = weight.clone(), head.step
    with pytest.raises(ValueError, match=message):
        head(torch.randn(4, D), torch.arange(4))
    assert torch.equal(weight, before) and head.step == step


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_momentum_that_is_not_contiguous_is_refused(backend: str) -> None:
    head = _head(backend)
    loss = head(torch.randn(4, D), torch.arange(4))
    before = head.weight.detach().clone()
    head.center_optimizer.state[head.weight]["momentum_buffer"] = torch.zeros(D, C).T
    with pytest.raises(ValueError, match=r"momentum_buffer must be contiguous.*strides \(1, 30\)"):
        loss.backward()
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_negated_views_are_read_as_what_they_mean(backend: str) -> None:
    """The memory of such a view holds the numbers with the other sign."""
    numbers = torch.randn(4, D), torch.randn(C, D)
    target = torch.arange(4)
    negated = [torch.complex(torch.zeros_like(each), -each).conj().imag for each in numbers]
    assert all(each.is_neg() for each in negated)
    results = []
    for x, w in (numbers, negated):
        w = w.detach().requires_grad_()
        loss = fa.margin_softmax_loss(x, w, target, backend=backend)
        loss.backward()
        results.append((loss, w.grad))
    torch.testing.assert_close(results[1], results[0])
