"""Recipes of docs/distributed.md for training code: a GradScaler beside CenterSGD, and clipping over several ranks.

The right values are those of torch.optim.SGD, GradScaler and clip_grad_norm_ on one process with all class centers.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.distributed_helpers import run_ranks
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

import fused_arcface as fa

D, CLASSES, STEPS = 6, 11, 4


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (8,), generator=generator)


def backbone() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, D).double()


def head(recipe: fa.CenterSGD | None = None) -> fa.PartialFC:
    return fa.PartialFC(D, CLASSES, scale=8.0, center_optimizer=recipe, dtype=torch.float64)


def overflowing(net: nn.Linear, step: int) -> None:
    """Let the gradient of the backbone overflow in the third step."""
    if step == 2:
        assert net.weight.grad is not None
        net.weight.grad[0, 0] = torch.inf


def ordinary(together: bool) -> list[Tensor]:
    """Train backbone and centers by torch.optim.SGD under a GradScaler, in one optimizer or each in its own."""
    net, own = backbone(), head()
    parts = [list(net.parameters()), list(own.parameters())]
    groups = [[*parts[0], *parts[1]]] if together else parts
    optimizers = [torch.optim.SGD(each, lr=0.1, momentum=0.9) for each in groups]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(STEPS):
        x, y = batch(step)
        for each in optimizers:
            each.zero_grad()
        scaler.scale(own(net(x), y)).backward()
        overflowing(net, step)
        for each in optimizers:
            scaler.step(each)
        scaler.update()
    return [net.weight.detach(), own.weight.detach(), torch.tensor(scaler.get_scale())]


def fused(held: bool) -> list[Tensor]:
    """The same with CenterSGD, as docs/distributed.md has it."""
    net, own = backbone(), head(fa.CenterSGD(lr=0.1, momentum=0.9))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        if held:
            own.center_optimizer.hold()
        scaler.scale(own(net(x), y)).backward()
        overflowing(net, step)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        if held:
            own.center_optimizer.release(apply=scaler.get_scale() >= before)
        scaler.step(own.center_optimizer)  # for schedulers
    return [net.weight.detach(), own.weight.detach(), torch.tensor(scaler.get_scale())]


@pytest.mark.parametrize("held", [False, True])
def test_a_step_that_a_scaler_leaves_out(held: bool) -> None:
    """Two optimizers of torch are judged one by one, and so is CenterSGD; held back, it goes with the backbone."""
    right = ordinary(together=held)
    torch.testing.assert_close(fused(held), right, rtol=1e-12, atol=1e-12)
    assert right[2] == 32
    assert not torch.allclose(right[1], ordinary(together=not held)[1])


def clipped(rows: slice, group: bool) -> list[Tensor]:
    net, own = backbone(), head()
    model = nn.parallel.DistributedDataParallel(net) if group else net
    optimizer = torch.optim.SGD([*net.parameters(), own.weight], lr=0.1)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        own(model(x[rows]), y[rows]).backward()
        if group:
            squares = [get_total_norm([each.grad for each in part.parameters()]) ** 2 for part in (net, own)]
            dist.all_reduce(squares[1])
            clip_grads_with_norm_([*net.parameters(), own.weight], 1.0, sum(squares) ** 0.5)
        else:
            assert clip_grad_norm_([*net.parameters(), own.weight], 1.0) > 1
        optimizer.step()
    return [net.weight.detach(), own.full_weight()]


def clipped_on_ranks() -> list[Tensor]:
    return clipped(slice(0, 5) if dist.get_rank() == 0 else slice(5, 8), group=True)


@pytest.mark.distributed
def test_clipping_by_the_norm_over_all_ranks() -> None:
    right = clipped(slice(None), group=False)
    for found in run_ranks(2, clipped_on_ranks):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
