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
class Agreement:
    """Compares a fused head with the reference in the same dtype, and their trainings with each other.

    It is called at each step of the fused head's training, see :data:`~.training.BeforeUpdate`.
    """

    errors: dict[str, list[float]] = field(default_factory=lambda: {quantity: [] for quantity in QUANTITIES})
    """One number for each step, by quantity: the norm of the difference, relative to the norm of the reference's."""
    curve_difference: float = 0.0
    """Largest absolute difference of the two trainings' losses over the first :data:`CURVE_STEPS`."""

    def __call__(self, head: nn.Module, embeddings: Tensor, target: Tensor) -> None:
        assert isinstance(head, MarginHead)
        leaves = (embeddings.requires_grad_(), head.weight)
        expected = reference.margin_softmax_loss(*leaves, target, margin=head.margin, scale=head.scale)
        found, right = (_with_gradients(loss, leaves) for loss in (head(embeddings, target), expected))
        for quantity, a, b in zip(QUANTITIES, found, right, strict=True):
            self.errors[quantity].append(float((a - b).norm() / b.norm()))

    def compare_curves(self, fused: Sequence[float], expected: Sequence[float]) -> None:
        """Compare the losses of two trainings."""
        self.curve_difference = float(np.max(np.abs(np.subtract(fused[:CURVE_STEPS], expected[:CURVE_STEPS]))))

    def worst(self) -> dict[str, float]:
        """Return the largest error of each quantity over all steps; NaN if one is NaN."""
        return {quantity: float(np.max(errors)) for quantity, errors in self.errors.items()}

    def broken(self) -> list[str]:
        """Describe each bound that is not kept; a NaN breaks it too."""
        found = [
            f"{quantity} of fused and reference differ by {error:.1e} on the same embeddings, {STEP_BOUND:.0e} allowed"
            for quantity, error in self.worst().items()
            if not error <= STEP_BOUND
        ]
        if not self.curve_difference <= CURVE_BOUND:
            differ = f"differ by {self.curve_difference:.1e} in {CURVE_STEPS} steps"
            found.append(f"the losses of the two trainings {differ}, {CURVE_BOUND:.0e} allowed")
        return found


def _with_gradients(loss: object, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    assert isinstance(loss, Tensor)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]
