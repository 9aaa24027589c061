"""How far fused and reference head are apart: on the same embeddings at each step, and between two trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fused_arcface import reference
from fused_arcface.head import MarginHead

from .problems import CURVE_BOUND, CURVE_STEPS, STEP_BOUND

QUANTITIES = ("loss", "d_embeddings", "d_weight")


@dataclass
class StepAgreement:
    """Compares a fused head with the reference in the same dtype, called by the training before each update."""

    head: MarginHead
    errors: dict[str, list[float]] = field(default_factory=lambda: {quantity: [] for quantity in QUANTITIES})
    """By quantity, one for each step: the norm of the difference, relative to the norm of the reference's."""

    def __call__(self, embeddings: Tensor, target: Tensor) -> None:
        weight = self.head.weight
        found = self._gradients(embeddings, target, self.head(embeddings.requires_grad_(), target))
        expected = self._gradients(
            embeddings,
            target,
            reference.margin_softmax_loss(embeddings, weight, target, margin=self.head.margin, scale=self.head.scale),
        )
        for quantity, a, b in zip(QUANTITIES, found, expected, strict=True):
            self.errors[quantity].append(float((a - b).norm() / b.norm()))

    def _gradients(self, embeddings: Tensor, target: Tensor, loss: object) -> list[Tensor]:
        assert isinstance(loss, Tensor)
        return [loss.detach(), *torch.autograd.grad(loss, (embeddings, self.head.weight))]

    def worst(self) -> dict[str, float]:
        """Over all steps; NaN if any is."""
        return {quantity: float(np.max(errors)) for quantity, errors in self.errors.items()}

    def broken(self) -> list[str]:
        """The bounds that are not kept, in words."""
        return [
            f"{quantity} of fused and reference differ by {error:.1e} on the same embeddings, {STEP_BOUND:.0e} allowed"
            for quantity, error in self.worst().items()
            if not error <= STEP_BOUND  # NaN breaks it too
        ]


def curve_difference(fused: Sequence[float], expected: Sequence[float]) -> float:
    """Greatest absolute difference of two loss curves over the first steps."""
    return float(np.max(np.abs(np.subtract(fused[:CURVE_STEPS], expected[:CURVE_STEPS]))))


def curve_broken(difference: float) -> list[str]:
    """The bound on the curves in words, if it is not kept."""
    if difference <= CURVE_BOUND:
        return []
    return [
        f"the losses of the two trainings differ by {difference:.1e} in {CURVE_STEPS} steps, {CURVE_BOUND:.0e} allowed"
    ]
