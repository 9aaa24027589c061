"""SGD on the class centres inside the backward pass: each centre is updated where its gradient is made, which is never
stored.

:class:`CenterSGD` is the recipe that users write, :class:`CenterOptimizer` what a head makes of it, a
``torch.optim.Optimizer`` that schedulers drive. Each forward pass takes a :class:`PendingUpdate` from it, which the
backward pass applies.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .autograd import CentreUpdate
from .keyed import rounding_key
from .loss_factor import RefusedFactors, is_refused
from .margin_state import copy_of_state
from .margins import Margin
from .ops import MOMENTUM_BLOCK, PLAIN, CentreStep, Negatives, check_update, compute_dtype

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float64)

# Functions of torch.nn.utils that look for gradients to clip; by name, as they offer no hook.
_CLIPPING = {"clip_grad_norm_", "clip_grad_value_"}
_GRAD: Any = torch.Tensor.grad


class CenterUpdateError(RuntimeError):
    """A use of autograd that an update inside the backward pass cannot mean. The message says what to use instead."""


@dataclass(frozen=True)
class CenterSGD:
    """Recipe of the fused optimizer: ``PartialFC(..., center_optimizer=CenterSGD(lr=0.1))``.

    Step for step ``torch.optim.SGD``: ``m = momentum·m + (gradient + weight_decay·w)``, ``w -= lr·m``; with
    ``sample_rate < 1`` for the rows of the step's sample alone, the others keep centre and momentum to the bit. It
    happens in ``loss.backward()``: no gradient of the centres exists, ``weight.grad`` stays None.

    The step follows the loss that the head returned, ``loss_weight`` among its arguments included: weight this loss
    among others there. A factor of 1 or more that the loss is multiplied by before ``backward()`` is taken for a
    ``GradScaler``'s and divided out. One below 1 is a :class:`CenterUpdateError`: on a CPU in that backward pass, on a
    GPU, where to read it would be to wait, that step changes no center and the head's next forward pass or the
    optimizer's ``step()`` that finds it read raises. Inside of a CUDA graph the steps are left out without an error.
    Where the loss or its gradient is not finite, no rank changes anything. A margin with a state gets that of before
    the step back as well.

    Args:
        lr: learning rate, >= 0; ``head.center_optimizer.param_groups[0]["lr"]`` from then on.
        momentum: in [0, 1).
        weight_decay: >= 0, added to the gradient as ``torch.optim.SGD`` does.
        momentum_dtype: ``torch.float32``, ``bfloat16`` or ``int8`` (with a unit for each 64 columns: 1.0625 bytes an
            element). None: fp32, fp64 for fp64 centres. Storage below fp32 is rounded stochastically, as are bf16
            centres, keyed by seed, step and element.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of its range.

    >>> import torch, fused_arcface as fa
    >>> head = fa.PartialFC(8, 100, center_optimizer=CenterSGD(lr=0.1, momentum_dtype=torch.int8))
    >>> head(torch.randn(4, 8), torch.tensor([0, 1, 2, 99])).backward()
    >>> schedule = torch.optim.lr_scheduler.StepLR(head.center_optimizer, 30)
    """

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    momentum_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, high in (("lr", math.inf), ("momentum", 1.0), ("weight_decay", math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"CenterSGD: {name} must be a number; got {type(value).__name__}")
            if not 0 <= value < high:
                raise ValueError(f"CenterSGD: {name} must be in [0, {high}); got {value}")
        if self.momentum_dtype is not None and self.momentum_dtype not in _MOMENTUM_DTYPES:
            listed = ", ".join(map(str, _MOMENTUM_DTYPES))
            raise TypeError(f"CenterSGD: momentum_dtype must be one of {listed}; got {self.momentum_dtype}")


class CentresUpdatedInBackward(nn.Parameter):
    """Class centres whose gradient never exists: ``grad`` is None, and an error for those who want to clip its norm.

    Clipping skips parameters without a gradient, so that it would silently leave the centres out.
    """

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        return type(self), (self.data, self.requires_grad)  # nn.Parameter's would come back as one

    @property
    def grad(self) -> Tensor | None:
        caller = sys._getframe(1)
        if _CLIPPING & {caller.f_code.co_name, caller.f_back.f_code.co_name if caller.f_back else ""}:
            raise CenterUpdateError(
                "the class centres have no gradient to clip: CenterSGD updates them in the backward pass. Clip the "
                "backbone's parameters alone, or use an ordinary optimizer (center_optimizer=None)"
            )
        return _GRAD.__get__(self)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        _GRAD.__set__(self, value)


class CenterOptimizer(torch.optim.Optimizer):
    """A :class:`CenterSGD` bound to a head's class centres; ``head.center_optimizer``. The backward pass does its work.

    ``param_groups`` (lr, momentum, weight_decay) are read at each backward pass. ``state`` has ``momentum_buffer`` and,
    for int8, its ``momentum_scale``. ``step()`` does nothing but notice gradient accumulation.
    """

    def __init__(self, recipe: CenterSGD, weight: nn.Parameter, seed: int, class_start: int) -> None:
        _check_weight(weight)
        super().__init__([weight], {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay})
        self._seed, self._class_start = seed, class_start
        self._updates_since_step = 0
        self.factors = RefusedFactors()
        self._pending: weakref.WeakSet[PendingUpdate] = weakref.WeakSet()
        if recipe.momentum > 0:
            dtype = recipe.momentum_dtype or compute_dtype(weight, weight)
            state = self.state[weight]
            state["momentum_buffer"] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            if dtype == torch.int8:
                units = -(-weight.shape[1] // MOMENTUM_BLOCK)
                state["momentum_scale"] = torch.zeros(weight.shape[0], units, device=weight.device)

    @property
    def _weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.param_groups[0]["params"][0]
        return weight

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_seed", "_class_start", "_updates_since_step")}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.factors = RefusedFactors()
        self._pending = weakref.WeakSet()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Nothing: the backward pass has updated the centres. Call it once after each, or never.

        Raises:
            CenterUpdateError: more than one backward pass since the last call, which was meant as gradient
                accumulation; or an earlier step was refused on a GPU, see :class:`CenterSGD`.
        """
        self._check_factors()
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        updates, self._updates_since_step = self._updates_since_step, 0
        if updates > 1:
            raise CenterUpdateError(
                f"{updates} backward passes before step(): CenterSGD updates the class centres in each, gradients "
                "cannot be accumulated. Pass the whole batch at once, or use an ordinary optimizer instead"
            )
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores learning rate and momentum, in place, from the state of an optimizer of the same shapes and dtypes.

        Raises:
            ValueError: a state of another kind; nothing is changed then.
        """
        own = self.state[self._weight]
        loaded = state_dict["state"].get(0, {})
        for name in sorted(own.keys() | loaded.keys()):
            rule, got = _describe(own.get(name)), _describe(loaded.get(name))
            if rule != got:
                raise ValueError(f"{name} must be {rule}; got {got}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for name, tensor in own.items():
            self.state[self._weight][name] = tensor.copy_(loaded[name])

    def bind(self, weight: Tensor) -> dict[str, Tensor]:
        """The momentum of the head's ``weight``, by name. Another parameter may have taken the place of the one that
        this optimizer was made for: ``to_empty()`` and ``load_state_dict(assign=True)`` put one there."""
        old = self._weight
        if weight is not old:
            self.param_groups[0]["params"] = [weight]
            self.state[weight] = self.state.pop(old, {})
        state: dict[str, Tensor] = self.state[weight]
        return state

    def check(self, weight: Tensor) -> None:
        """Check that the head's ``weight`` can be updated.

        Raises:
            TypeError: the head has been converted to a dtype that centers cannot be updated in.
            ValueError: elements of the weight share memory, or its shape is no longer the momentum's.
            CenterUpdateError: an earlier step was refused on a GPU, see :class:`CenterSGD`.
        """
        _check_weight(weight)
        state = self.bind(weight)
        check_update(weight, state.get("momentum_buffer"), state.get("momentum_scale"))
        self._check_factors()

    def _check_factors(self) -> None:
        factor = self.factors.overdue()
        if factor is not None:
            raise CenterUpdateError(f"in an earlier step, which changed no class center, {_refusal(factor)}")

    def prepare(self, step: int, weight: Tensor, margin: Margin) -> PendingUpdate:
        """The update of the head's ``weight`` that belongs to forward pass number ``step``; see :meth:`check`. The
        margin has not seen the step yet."""
        update = PendingUpdate(self, step, weight, copy_of_state(margin))
        if torch.is_grad_enabled():
            self._pending.add(update)
        return update


def _refusal(factor: float) -> str:
    return (
        f"the loss was multiplied by {factor:g} before backward(): CenterSGD takes such a factor for a GradScaler's, "
        "which is 1 or more, and divides it out. Weight this loss among others by the head's argument loss_weight; do "
        "not accumulate gradients, pass the whole batch at once"
    )


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in _WEIGHT_DTYPES:
        listed = ", ".join(map(str, _WEIGHT_DTYPES))
        raise TypeError(f"CenterSGD needs class centres of dtype {listed}; got {weight.dtype}")


def _describe(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


class PendingUpdate(CentreUpdate):
    """The update of one forward pass, until its backward pass makes it.

    Where it changes nothing, the margin gets back the state that it had before the step (buffers and their copies).
    """

    def __init__(
        self, optimizer: CenterOptimizer, step: int, weight: Tensor, margin_state: list[tuple[Tensor, Tensor]]
    ) -> None:
        self._optimizer, self._step, self._weight, self._margin_state = optimizer, step, weight, margin_state
        self._loss: Tensor | None = None
        self._loss_gradient: Tensor | None = None
        self._done = False

    def watch(self, loss: Tensor) -> Tensor:
        """The loss, watched: :meth:`start` is called with its gradient first of all in the backward pass."""
        self._loss = loss.detach()
        watched: Tensor = _Watch.apply(loss, self)
        return watched

    def start(self, loss_gradient: Tensor) -> None:
        """Raises, before anything is computed or changed, where the update would not be what the user means."""
        if self._done:
            raise CenterUpdateError(
                "a second backward pass through the same loss (retain_graph=True): CenterSGD has already updated the "
                "class centres. Call backward once, on the sum of the losses"
            )
        others = len(self._optimizer._pending) - (self in self._optimizer._pending)
        if others > 0:
            raise CenterUpdateError(
                f"{others} other forward pass(es) of this head await their backward pass: CenterSGD would change the "
                "class centres under them. Call backward after each forward, concatenate the batches, or evaluate "
                "under torch.no_grad()"
            )
        refused = self._optimizer.factors.see(loss_gradient)
        if refused is not None:
            for buffer, before in self._margin_state:
                buffer.copy_(before)
            raise CenterUpdateError(_refusal(refused))
        self._loss_gradient = loss_gradient

    def apply(
        self,
        embeddings: Tensor,
        weight: Tensor,
        classes: Tensor | None,
        target: Tensor,
        scale: float,
        lse: Tensor,
        negative_coefficient: Tensor,
        target_coefficient: Tensor,
        backend: str,
        negatives: Negatives = PLAIN,
    ) -> None:
        weight = self._weight  # what autograd has saved may be a copy: saved-tensor hooks offload
        optimizer = self._optimizer
        group, state = optimizer.param_groups[0], optimizer.bind(weight)
        for name, tensor in state.items():
            if tensor.device != weight.device:  # the head was moved, or built without memory (device="meta")
                moved = torch.zeros_like(tensor, device=weight.device) if tensor.is_meta else tensor.to(weight.device)
                state[name] = moved
        if self._loss_gradient is not None:
            negative_coefficient = negative_coefficient / self._loss_gradient
            target_coefficient = target_coefficient / self._loss_gradient
        # The same numbers on every rank, so all go on or none. An lse of -inf is a row without negatives; the loss of a
        # batch whose rows are all ignored is NaN, though its coefficients are zero.
        finite = negative_coefficient.isfinite().all() & target_coefficient.isfinite().all()
        if self._loss is not None:
            finite &= self._loss.isfinite()
        if self._loss_gradient is not None:
            finite &= ~is_refused(self._loss_gradient)
        step = CentreStep(
            classes,
            state.get("momentum_buffer"),
            state.get("momentum_scale"),
            float(group["lr"]),
            float(group["momentum"]),
            float(group["weight_decay"]),
            rounding_key(optimizer._seed, self._step),
            optimizer._class_start,
            finite & ~(lse.isnan() | (lse == torch.inf)).any(),
        )
        for buffer, before in self._margin_state:
            buffer.copy_(torch.where(step.active, buffer, before))
        torch.ops.fused_arcface.update_centres(
            embeddings,
            weight,
            target,
            scale,
            lse,
            negative_coefficient,
            target_coefficient,
            *step,
            backend,
            **negatives._asdict(),
        )
        # A graph that has saved the centres as they were now says so instead of using them as they are.
        torch.autograd.graph.increment_version(weight)
        self._done = True
        optimizer._pending.discard(self)
        optimizer._updates_since_step += 1


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, update: PendingUpdate) -> Tensor:
        ctx.update = update
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.update.start(gradient)
        return gradient, None
