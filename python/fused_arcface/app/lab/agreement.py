"""Compare the fused with the reference head: on the same embeddings at each step, and between two trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fused_arcface import reference
from fused_arcface.head import MarginHead

STEP_BOUND = 1e-5
"""Most that fused and reference may differ on the same embeddings: the loss, and the norm of each gradient's
difference, relative to the reference's."""

CURVE_BOUND, CURVE_STEPS = 1e-2, 50
"""Most that the losses of two separate trainings may differ, and the first steps for which that holds."""

QUANTITIES = ("loss", "d_embeddings", "d_weight")


@dataclass
class StepAgreement:
    """Compares a fused head with the reference in the same dtype; see :data:`~.training.BeforeUpdate`."""

    errors: dict[str, list[float]] = field(default_factory=lambda: {quantity: [] for quantity in QUANTITIES})
    """One number for each step, by quantity: the norm of the difference, relative to the norm of the reference's."""

    def __call__(self, head: nn.Module, embeddings: Tensor, target: Tensor) -> None:
        assert isinstance(head, MarginHead)
        leaves = (embeddings.requires_grad_(), head.weight)
        expected = reference.margin_softmax_loss(*leaves, target, margin=head.margin, scale=head.scale)
        found, right = (_with_gradients(loss, leaves) for loss in (head(embeddings, target), expected))
        for quantity, a, b in zip(QUANTITIES, found, right, strict=True):
            self.errors[quantity].append(float((a - b).norm() / b.norm()))

    def worst(self) -> dict[str, float]:
        """Return the largest error of each quantity over all steps; NaN if one is NaN."""
        return {quantity: float(np.max(errors)) for quantity, errors in self.errors.items()}

    def broken(self) -> list[str]:
        """Describe each bound that is not kept."""
        return [
            f"{quantity} of fused and reference differ by {error:.1e} on the same embeddings, {STEP_BOUND:.0e} allowed"
            for quantity, error in self.worst().items()
            if not error <= STEP_BOUND  # NaN breaks it too
        ]


def _with_gradients(loss: object, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    assert isinstance(loss, Tensor)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def curve_difference(fused: Sequence[float], expected: Sequence[float]) -> float:
    """Return the greatest absolute difference of two loss curves over the first :data:`CURVE_STEPS`."""
    return float(np.max(np.abs(np.subtract(fused[:CURVE_STEPS], expected[:CURVE_STEPS]))))


def curve_broken(difference: float) -> list[str]:
    """Describe the bound on the curves if it is not kept."""
    text = f"the losses of the two trainings differ by {difference:.1e} in {CURVE_STEPS} steps"
    return [] if difference <= CURVE_BOUND else [f"{text}, {CURVE_BOUND:.0e} allowed"]
