"""CenterSGD's step in the CUDA backend, emulated and on a GPU; see test_cuda.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from conftest import NoWaiting
from support.cases import Case, inputs_on
from support.cuda_places import in_place, places

import fused_arcface as fa
from fused_arcface import backends, partial_fc
from fused_arcface.backends import cuda
from fused_arcface.backends import torch as plain_torch
from fused_arcface.base import keyed_random
from fused_arcface.center_update import PendingUpdate
from fused_arcface.engine import ops
from fused_arcface.engine.terms import CenterStep, RowGradients


@pytest.fixture(params=places())
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the backend runs. Hopper's kernels, which test_hopper.py tests, are off."""
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "0")
    with in_place(request.param, monkeypatch) as device:
        yield device


def _update_problem(
    dtype: torch.dtype, momentum_dtype: torch.dtype | None, chosen: str, device: str
) -> tuple[tuple, CenterStep]:
    """Arguments of update_centers: 200 classes of 70, more than one unit of an int8 momentum and not a multiple.
    ``chosen``: all, sampled (67 of them) or padded (as many, and more than a tile of padding)."""
    x, w, target, _ = inputs_on(Case(12, 200, 70), device)
    w = w.to(dtype)
    classes = None if chosen == "all" else torch.arange(0, 200, 3, device=device)
    if classes is not None:
        target = target % len(classes)
    if chosen == "padded":
        classes = torch.cat([classes, classes.new_full((200,), 200)])
    buffer = units = None
    if momentum_dtype == torch.int8:
        buffer = torch.randint(-127, 128, w.shape, generator=torch.Generator().manual_seed(1)).to(device, torch.int8)
        units = torch.full((200, 2), 0.01, device=device)
    elif momentum_dtype is not None:
        buffer = (0.1 * w.float()).to(momentum_dtype)
    step = CenterStep(
        classes, buffer, units, 0.1, 0.9, 5e-4, keyed_random.rounding_key(3, 4), 1000, torch.tensor(True, device=device)
    )
    rows = torch.linspace(-1, 1, 12, device=device)
    lse = torch.full((12,), 3.0, dtype=torch.float64, device=device)
    return (x, w, target, RowGradients(16.0, lse, rows, -rows)), step


def _copied(step: CenterStep) -> CenterStep:
    copies = {
        name: None if value is None else value.clone()
        for name, value in step._asdict().items()
        if "moment" in name and not isinstance(value, float)
    }
    return step._replace(**copies)


UPDATES = [
    (dtype, momentum, chosen)
    for dtype in (torch.float32, torch.bfloat16)
    for momentum in (None, torch.float32, torch.bfloat16, torch.int8, torch.float64)
    for chosen in ("all", "sampled", "padded")
]


@pytest.mark.parametrize(("dtype", "momentum_dtype", "chosen"), UPDATES)
def test_update_agrees_with_the_reference(
    dtype: torch.dtype, momentum_dtype: torch.dtype | None, chosen: str, device: str
) -> None:
    """The same random bits, so results differ only where the gradient's rounding falls on another side."""
    arguments, step = _update_problem(dtype, momentum_dtype, chosen, device)
    x, w, *rest = arguments
    expected_w, expected = w.clone(), _copied(step)
    plain_torch.update_centers(x, expected_w, *rest, expected)
    got_w, got = w.clone(), _copied(step)
    cuda.update_centers(x, got_w, *rest, got)
    tensors = [(got_w, expected_w), (got.momentum_buffer, expected.momentum_buffer)]
    for mine, right in tensors:
        if mine is None or right is None:
            continue
        differ = (mine.double() - right.double()).abs() > 1e-5 * right.double().abs() + 1e-6
        assert differ.double().mean() < (0.01 if mine.dtype in (torch.bfloat16, torch.int8) else 1e-9)
        quantum = 1 if mine.dtype == torch.int8 else 2.0**-7 * float(right.double().abs().max())
        assert float((mine.double() - right.double()).abs().max()) <= quantum
    if got.momentum_scale is not None:
        torch.testing.assert_close(got.momentum_scale, expected.momentum_scale, rtol=1e-4, atol=1e-9)
    if step.classes is not None:
        others = torch.ones(201, dtype=torch.bool, device=device).index_fill_(0, step.classes, False)[:200]
        assert torch.equal(got_w[others], w[others])


def test_update_without_rows(device: str) -> None:
    """Momentum and weight decay go on."""
    (x, w, target, gradients), step = _update_problem(torch.float32, torch.float32, "all", device)
    nothing = x[:0], target[:0], RowGradients(gradients.scale, *(each[:0] for each in gradients[1:]))
    results = []
    for backend in (cuda, plain_torch):
        weight, copy = w.clone(), _copied(step)
        backend.update_centers(nothing[0], weight, *nothing[1:], copy)
        results.append((weight, copy.momentum_buffer))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-7)
    assert not torch.equal(results[0][0], w)


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_stochastic_rounding_has_the_bits_of_keyed(momentum_dtype: torch.dtype, device: str) -> None:
    """Without a gradient the step is the same arithmetic everywhere: the results agree to the bit."""
    (x, w, target, gradients), step = _update_problem(torch.bfloat16, momentum_dtype, "all", device)
    step = step._replace(weight_decay=0.0)
    nothing = torch.zeros_like(gradients.target_coefficient)
    gradients = gradients._replace(negative_coefficient=nothing, target_coefficient=nothing)
    expected_w, expected = w.clone(), _copied(step)
    plain_torch.update_centers(x, expected_w, target, gradients, expected)
    got = _copied(step)
    cuda.update_centers(x, w, target, gradients, got)
    assert torch.equal(got.momentum_buffer, expected.momentum_buffer)
    # w - lr·m may be fused into one rounding or not: a last bit of fp32, which is a carry of bf16 once in 2¹⁶ elements.
    assert (w != expected_w).sum() <= 2


def test_nothing_changes_where_the_step_is_not_active(device: str) -> None:
    (x, w, *rest), step = _update_problem(torch.bfloat16, torch.int8, "all", device)
    got_w, got = w.clone(), _copied(step)._replace(active=torch.tensor(False, device=device))
    cuda.update_centers(x, got_w, *rest, got)
    assert torch.equal(got_w, w) and torch.equal(got.momentum_buffer, step.momentum_buffer)
    assert torch.equal(got.momentum_scale, step.momentum_scale)


@pytest.mark.parametrize(("momentum_dtype", "scale"), [(torch.float32, 64.0), (torch.int8, 1000.0)])
def test_sampled_step_waits_for_nothing(
    momentum_dtype: torch.dtype, scale: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PartialFC with its sample padded, as on a GPU: the reference's steps, and no value is read on the way."""
    monkeypatch.setattr(cuda, "unavailable", lambda *_: None)
    row = dataclasses.replace(backends.registry._ROWS["cuda"], device_type=device)
    monkeypatch.setitem(backends.registry._ROWS, "cuda", row)
    monkeypatch.setattr(partial_fc, "_is_waited_for", lambda _: True)
    monkeypatch.setattr(ops, "check_target_range", lambda *_: None)  # the CPU's check alone
    monkeypatch.setattr(PendingUpdate, "start", lambda self, gradient: setattr(self, "_loss_gradient", gradient))
    recipe = fa.CenterSGD(lr=0.1, weight_decay=1e-3, momentum_dtype=momentum_dtype)
    options = {"sample_rate": 0.1, "scale": scale, "center_optimizer": recipe, "seed": 4, "device": device}
    heads = [fa.PartialFC(16, 300, backend=backend, **options) for backend in ("cuda", "torch")]
    for step, rows in enumerate((40, 8, 1, 0)):  # more classes than the sample's 30 in the first
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(rows, 16, generator=generator).to(device)
        y = torch.randint(0, 300, (rows,), generator=generator).to(device)
        results = []
        for head in heads:
            mine = x.clone().requires_grad_()
            with NoWaiting():
                loss, stats = head(mine, y, return_stats=True)
                loss.backward()
            state = head.center_optimizer.state[head.weight]
            results.append([loss, *stats, mine.grad, head.sampled, head.weight.detach(), *state.values()])
        for got, right in zip(*results, strict=True):
            size = max(1.0, right.double().nan_to_num(0, 0, 0).abs().max().item()) if right.numel() > 0 else 1.0
            atol = 2e-6 * scale * size if right.is_floating_point() else int(right.dtype == torch.int8)
            torch.testing.assert_close(got, right, rtol=1e-4, atol=atol, equal_nan=True)
