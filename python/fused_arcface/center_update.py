"""The update of the class centers that belongs to one forward pass. Its backward pass makes the update.

:class:`fused_arcface.center_optimizer.CenterOptimizer` prepares one for each step.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base.compiler import not_compiled
from .engine.loss_factor import is_refused
from .engine.mixed import update_both
from .engine.terms import Negatives, RowGradients, SecondTarget
from .store import SampledRows

if TYPE_CHECKING:
    from .center_optimizer import CenterOptimizer


class CenterUpdateError(RuntimeError):
    """Raised when autograd is used in a way that conflicts with updating class centers in the backward pass.

    The message says what to use instead.
    """


def refusal(factor: float) -> str:
    """Return the error message for a loss with this factor."""
    return (
        f"the loss was multiplied by {factor:g} before backward(): center_optimizer takes such a factor for a "
        "GradScaler's, which is 1 or more, and divides it out. Weight this loss among others by the head's argument "
        "loss_weight; do not accumulate gradients, pass the whole batch at once"
    )


class PendingUpdate:
    """The update of one forward pass, until its backward pass makes it.

    If it changes nothing, margin and scale get back the state that they had before the step (buffers and copies).
    With ``sampled`` it changes these copies of the step's rows, and gives them back to the store.
    """

    def __init__(
        self,
        optimizer: CenterOptimizer,
        step: int,
        weight: Tensor,
        margin_state: list[tuple[Tensor, Tensor]],
        sampled: SampledRows | None = None,
    ) -> None:
        self._optimizer, self._step, self._weight, self._margin_state = optimizer, step, weight, margin_state
        self._sampled = sampled
        self._loss: Tensor | None = None
        self._loss_gradient: Tensor | None = None
        self._done = False

    def watch(self, loss: Tensor) -> Tensor:
        """Return the loss, watched: the backward pass begins with :meth:`start` of its gradient."""
        self._loss = loss.detach()
        watched: Tensor = _Watch.apply(loss, self)
        return watched

    def start(self, loss_gradient: Tensor) -> None:
        """Take the loss's gradient, before anything is computed or changed.

        Raises:
            CenterUpdateError: if the update would not be what the user means.
        """
        if self._done:
            raise CenterUpdateError(
                "a second backward pass through the same loss (retain_graph=True): center_optimizer has already "
                "updated the class centers. Call backward once, on the sum of the losses"
            )
        others = len(self._optimizer._pending) - (self in self._optimizer._pending)
        if others > 0:
            raise CenterUpdateError(
                f"{others} other forward pass(es) of this head await their backward pass: center_optimizer would "
                "change the class centers under them. Call backward after each forward, concatenate the batches, or "
                "evaluate under torch.no_grad()"
            )
        refused = self._optimizer.factors.see(loss_gradient)
        if refused is not None:
            for buffer, before in self._margin_state:
                buffer.copy_(before)
            raise CenterUpdateError(refusal(refused))
        self._loss_gradient = loss_gradient

    @not_compiled
    def apply(self, *arguments: Any) -> None:
        """Make the update, or keep it until :meth:`CenterOptimizer.release`: a :data:`engine.shard.CenterUpdate`."""
        update = partial(self._update, *arguments)
        if self._optimizer._held is None:
            update()
        else:
            self._optimizer._held.append(update)
        self._done = True
        self._optimizer._pending.discard(self)
        self._optimizer._updates_since_step += 1

    @torch.no_grad()
    def _update(
        self,
        embeddings: Tensor,
        classes: Tensor | None,
        target: Tensor,
        gradients: RowGradients,
        backend: str,
        negatives: Negatives,
        second: SecondTarget | None,
    ) -> None:
        optimizer, sampled = self._optimizer, self._sampled
        lse, *coefficients = gradients[1:]
        if second is not None:
            coefficients.append(second.coefficient)
        if sampled is None:
            weight, state = self._weight, optimizer.bind_on_device(self._weight)
        else:
            weight, state = sampled.tensors["weight"], sampled.tensors
        if self._loss_gradient is not None:
            coefficients = [each / self._loss_gradient for each in coefficients]
        # These numbers are equal on all ranks: either every rank changes its centers or none does. An lse of -inf is a
        # row without negatives; the loss of a batch whose rows are all ignored is NaN, though its coefficients are 0.
        finite = torch.stack(coefficients).isfinite().all() & (lse < torch.inf).all()
        if self._loss is not None:
            finite &= self._loss.isfinite()
        if self._loss_gradient is not None:
            finite &= ~is_refused(self._loss_gradient)
        step = optimizer.center_step(self._step, state, classes, finite, None if sampled is None else sampled.ids)
        for buffer, before in self._margin_state:
            buffer.copy_(torch.where(step.active, buffer, before))
        gradients = RowGradients(gradients.scale, lse, *coefficients[:2])
        second = None if second is None else SecondTarget(second.row, coefficients[2])
        update_both(embeddings, weight, target, gradients, step, backend, negatives, second)
        # A graph that saved the old centers now raises an error, and does not compute with the new ones.
        torch.autograd.graph.increment_version(weight)
        if sampled is not None:
            sampled.write_back()


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, update: PendingUpdate) -> Tensor:
        ctx.update = update
        return loss.view_as(loss)

    # In a step that is compiled as a whole, torch.compile would trace this and lose the changes that it makes.
    @staticmethod
    @not_compiled
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.update.start(gradient)
        return gradient, None
