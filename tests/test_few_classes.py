"""Ten classes with CenterSGD: the figures and the cure in docs/troubleshooting.md.

Digits, 32 dimensions, scale 64, momentum 0.9, a rate of 0.1 that falls as a cosine. Where both optimizers see the same
gradients they do the same; the loss in the end depends on the length that the first steps give the centers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn

import fused_arcface as fa

STEPS = 280
ORDINARY, FUSED = None, fa.CenterSGD(lr=0.1)


def falling(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


def warmed_up(step: int) -> float:
    return min(1, (step + 1) / (0.1 * STEPS)) * falling(step)


def train(
    centers: fa.CenterSGD | None, *, clip: str, rate: Callable[[int], float] = falling, steps: int = STEPS
) -> tuple[list[float], float]:
    """Return the losses, and the mean length of the centers in the end."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 8 - 1, dtype=torch.float32).flatten(1), torch.tensor(digits.target)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    head = fa.PartialFC(32, 10, center_optimizer=centers)
    own = [] if centers is not None else [head.weight]
    optimizers = [torch.optim.SGD([*net.parameters(), *own], lr=0.1, momentum=0.9), head.center_optimizer]
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers if each is not None]
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(images), (128,))
        loss = head(net(images[rows]), labels[rows])
        net.zero_grad()
        head.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_([*net.parameters(), *(own if clip == "jointly" else [])], 5.0)
        for each in (*optimizers, *schedules):
            if each is not None:
                each.step()
        losses.append(loss.item())
    return losses, head.weight.norm(dim=1).mean().item()


def end(losses: list[float]) -> float:
    return sum(losses[-20:]) / 20


def test_the_fused_optimizer_trains_as_the_ordinary_one() -> None:
    (ordinary, length), (fused, fused_length) = (train(each, clip="net", steps=30) for each in (ORDINARY, FUSED))
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(ordinary), rtol=1e-3, atol=1e-3)
    assert math.isclose(length, fused_length, rel_tol=1e-4)


def test_a_first_step_that_is_not_clipped_makes_the_centers_long() -> None:
    jointly, length = train(ORDINARY, clip="jointly")
    fused, fused_length = train(FUSED, clip="net")
    assert end(jointly) < 0.15 and end(fused) > 3 * end(jointly)
    assert fused_length > 20 * length


def test_warm_up_cures_it() -> None:
    losses, length = train(FUSED, clip="net", rate=warmed_up)
    assert end(losses) < 0.35 and length < 70
