"""SGD on the class centers inside the backward pass: each center is updated where its gradient is made.

The gradient is never stored.

Users write the recipe, a :class:`CenterSGD`. A head makes a :class:`CenterOptimizer` of it, a ``torch.optim.Optimizer``
that schedulers drive. Each forward pass takes a :class:`~fused_arcface.center_update.PendingUpdate` from it, which the
backward pass applies.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base.checks import describe_tensor
from .base.dtypes import CENTER_DTYPES, MOMENTUM_DTYPES, compute_dtype
from .base.keyed_random import rounding_key
from .base.ranges import FROM_0, FROM_0_BELOW_1, check_number
from .center_update import CenterUpdateError, PendingUpdate, refusal
from .engine.loss_factor import RefusedFactors
from .engine.terms import MOMENTUM_BLOCK, CenterStep, check_update
from .margins.protocol import Margin
from .margins.state import copy_of_state
from .store import SampledRows

_SETTINGS = {"lr": FROM_0, "momentum": FROM_0_BELOW_1, "weight_decay": FROM_0}

# Functions of torch.nn.utils that look for gradients to clip; by name, as they offer no hook.
_CLIPPING = {"clip_grad_norm_", "clip_grad_value_", "_clip_grads_with_norm_"}
_GRAD: Any = torch.Tensor.grad


@dataclass(frozen=True)
class CenterSGD:
    """Recipe of the fused optimizer: ``PartialFC(..., center_optimizer=CenterSGD(lr=0.1))``.

    A step is that of ``torch.optim.SGD``: ``m = momentum·m + (gradient + weight_decay·w)``, ``w -= lr·m``. With
    ``sample_rate < 1`` it changes the rows of the step's sample alone; all others keep center and momentum to the bit.
    It happens in ``loss.backward()``: no gradient of the centers exists, ``weight.grad`` stays None.

    The step follows the loss that the head returned, with its argument ``loss_weight``: weight this loss among others
    there. A factor of 1 or more that multiplies the loss before ``backward()`` counts as a ``GradScaler``'s and is
    divided out. A factor below 1 is a :class:`CenterUpdateError`. On a CPU that backward pass raises it. On a GPU
    nobody waits for the factor: that step changes no center, and once the factor has arrived, the head's next forward
    pass or the optimizer's next ``step()`` raises. In a CUDA graph such steps are left out without an error. If the
    loss or its gradient is not finite, no rank changes anything, and a margin with a state gets back its state from
    before the step.

    Each backward pass in training mode is a step, ``torch.autograd.grad`` included. For a gradient that is no step,
    such as that of an adversarial image, call ``head.eval()`` first.

    Args:
        lr: learning rate, >= 0; ``head.center_optimizer.param_groups[0]["lr"]`` from then on.
        momentum: in [0, 1).
        weight_decay: >= 0, added to the gradient as ``torch.optim.SGD`` does.
        momentum_dtype: ``torch.float32``, ``bfloat16`` or ``int8`` (with a unit for each 64 columns: 1.0625 bytes an
            element). None: fp32, fp64 for fp64 centers. Storage below fp32 is rounded stochastically, as are bf16
            centers, keyed by seed, step and element.

    Raises:
        TypeError, ValueError: if an argument has a wrong type or is out of its range.

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
        check_settings({name: getattr(self, name) for name in _SETTINGS})
        if self.momentum_dtype is not None and self.momentum_dtype not in MOMENTUM_DTYPES:
            listed = ", ".join(map(str, MOMENTUM_DTYPES))
            raise TypeError(f"CenterSGD: momentum_dtype must be one of {listed}; got {self.momentum_dtype}")


def check_settings(settings: dict[str, Any]) -> None:
    """Check lr, momentum and weight_decay, among other entries. They may be numbers of NumPy or torch.

    Raises:
        TypeError, ValueError: if one is missing, not a number, or out of its range.
    """
    for name, allowed in _SETTINGS.items():
        value: Any = settings.get(name)
        check_number(f"CenterSGD: {name}", value.item() if hasattr(value, "item") else value, allowed)


class CentersUpdatedInBackward(nn.Parameter):
    """Class centers whose gradient never exists: ``grad`` is None, and to clip it is an error.

    Clipping skips parameters without a gradient. It would silently leave the centers out.
    """

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        return type(self), (self.data, self.requires_grad)  # nn.Parameter's would come back as one

    @property
    def grad(self) -> Tensor | None:
        caller = sys._getframe(1)
        if _CLIPPING & {caller.f_code.co_name, caller.f_back.f_code.co_name if caller.f_back else ""}:
            raise CenterUpdateError(
                "the class centers have no gradient to clip: CenterSGD updates them in the backward pass. Clip the "
                "backbone's parameters alone, or use an ordinary optimizer (center_optimizer=None)"
            )
        return _GRAD.__get__(self)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        _GRAD.__set__(self, value)


class CenterOptimizer(torch.optim.Optimizer):
    """A :class:`CenterSGD` bound to a head's class centers; ``head.center_optimizer``. The backward pass does its work.

    ``param_groups`` (lr, momentum, weight_decay) are read at each backward pass. ``state`` has ``momentum_buffer`` and,
    for int8, its ``momentum_scale``. ``step()`` only checks that no gradients are accumulated.
    """

    _step_supports_amp_scaling = True
    """Tell ``GradScaler.step()`` that this optimizer has no gradients to look through for infinite ones."""

    def __init__(self, recipe: CenterSGD, weight: nn.Parameter, seed: int, class_start: int) -> None:
        _check_weight(weight)
        super().__init__([weight], {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay})
        self._seed, self._class_start = seed, class_start
        self._updates_since_step = 0
        self.factors = RefusedFactors()
        self._pending: weakref.WeakSet[PendingUpdate] = weakref.WeakSet()
        self._held: list[Callable[[], None]] | None = None
        if recipe.momentum > 0:
            dtype = recipe.momentum_dtype or compute_dtype(weight, weight)
            state = self.state[weight]
            state["momentum_buffer"] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            if dtype == torch.int8:
                units = -(-weight.shape[1] // MOMENTUM_BLOCK)
                state["momentum_scale"] = torch.zeros(weight.shape[0], units, dtype=torch.float32, device=weight.device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group: this optimizer updates class centers alone.

        Raises:
            CenterUpdateError: always, once the centers are there.
        """
        if self.param_groups:
            raise CenterUpdateError(
                "center_optimizer updates the class centers alone: give other parameters to an optimizer of their own"
            )
        super().add_param_group(param_group)

    def describe(self) -> str:
        """Return the recipe as it is now, for the head's repr.

        >>> import fused_arcface as fa
        >>> fa.PartialFC(8, 100, center_optimizer=CenterSGD(lr=0.1)).center_optimizer.describe()
        'CenterSGD(lr=0.1, momentum=0.9, weight_decay=0.0)'
        """
        return f"CenterSGD({', '.join(f'{name}={value}' for name, value in self.options.items())})"

    @property
    def options(self) -> dict[str, Any]:
        """The entries of ``param_groups`` that are this optimizer's: lr, momentum and weight_decay."""
        return {name: self.param_groups[0][name] for name in _SETTINGS}

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
        self._held = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do nothing: the backward pass has updated the centers. Call it once after each, or never.

        Raises:
            CenterUpdateError: if there was more than one backward pass since the last call, meant as gradient
                accumulation; or if an earlier step was refused on a GPU, see :class:`CenterSGD`.
        """
        self._check_factors()
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        updates, self._updates_since_step = self._updates_since_step, 0
        if updates > 1:
            raise CenterUpdateError(
                f"{updates} backward passes before step(): CenterSGD updates the class centers in each, gradients "
                "cannot be accumulated. Pass the whole batch at once, or use an ordinary optimizer instead"
            )
        return result

    def hold(self) -> None:
        """Keep the updates of the following backward passes until :meth:`release`, at the cost of their embeddings.

        The centers are then those of before in every forward pass until the release.
        """
        self._held = []

    def release(self, apply: bool) -> None:
        """Make the updates that were kept since :meth:`hold`, or drop them.

        A training loop decides once it has seen the backbone's gradient.
        """
        held, self._held = self._held, None
        for update in held or ():
            if apply:
                update()

    def state_dict(self) -> dict[str, Any]:
        """Return ``param_groups`` with an empty state: the momentum is in the head's ``state_dict()``."""
        return {**super().state_dict(), "state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore lr, momentum and weight_decay.

        An earlier version's state has the momentum as well; it is restored in place. Load such a state after the head.

        Raises:
            TypeError, ValueError: if the momentum has another shape or dtype than this one, or a setting is out of its
                range. Nothing is changed then.
        """
        check_settings(state_dict["param_groups"][0])
        own = dict(self.state[self._weight])
        loaded = state_dict["state"].get(0, {})
        for name in sorted(own.keys() | loaded.keys()) if loaded else ():
            rule, got = describe_tensor(own.get(name)), describe_tensor(loaded.get(name))
            if rule != got:
                raise ValueError(f"{name} must be {rule}; got {got}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for name, tensor in own.items():
            self.state[self._weight][name] = tensor.copy_(loaded[name]) if loaded else tensor

    def run_state(self, weight: Tensor) -> dict[str, Tensor]:
        """Return what the head's ``state_dict()`` holds of this optimizer: its momentum, shared, and its settings."""
        return {**self.bind(weight), "settings": self.settings}

    # torch.distributed.checkpoint looks up each name in a module's state_dict as an attribute.
    @property
    def momentum_buffer(self) -> Tensor | None:
        """(C, D), None without momentum."""
        return self.state[self._weight].get("momentum_buffer")

    @property
    def momentum_scale(self) -> Tensor | None:
        """(C, ceil(D / 64)) fp32, the units of an int8 momentum; else None."""
        return self.state[self._weight].get("momentum_scale")

    @property
    def settings(self) -> Tensor:
        """(3,) fp64: lr, momentum and weight_decay."""
        values = [float(value) for value in self.options.values()]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def check_loaded(self, settings: Tensor) -> None:
        """Check the :attr:`settings` (3,) of a loaded state. Raises ValueError if one is out of its range."""
        check_settings(dict(zip(_SETTINGS, settings.tolist(), strict=True)))

    def check_options(self, options: dict[str, Any]) -> None:
        """Check options of a loaded state, by name. Raises TypeError or ValueError."""
        check_settings(options)

    @torch.no_grad()
    def load_run_state(self, weight: Tensor, given: dict[str, Tensor], assign: bool) -> None:
        """Restore what :meth:`run_state` returned; a momentum that is not given becomes zero, settings stay.

        ``assign``: take the given tensors themselves, as ``load_state_dict(assign=True)`` does.
        """
        state = self.bind(weight)
        for name, tensor in state.items():
            loaded = given.get(name)
            if loaded is not None and assign:
                state[name] = loaded.detach().contiguous()
                continue
            if tensor.is_meta and not weight.is_meta:  # the head was built without memory
                tensor = torch.empty_like(tensor, device=weight.device)
            state[name] = tensor.zero_() if loaded is None else tensor.copy_(loaded)
        if "settings" in given:
            self.param_groups[0].update(zip(_SETTINGS, given["settings"].tolist(), strict=True))

    def bind(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the momentum of the head's ``weight``, by name.

        It may be another parameter than the one that this optimizer was made for: ``to_empty()`` and
        ``load_state_dict(assign=True)`` make a new one.
        """
        if type(weight) is nn.Parameter:  # torch made an ordinary parameter of the centers
            weight.__class__ = CentersUpdatedInBackward
        old = self._weight
        if weight is not old:
            self.param_groups[0]["params"] = [weight]
            self.state[weight] = self.state.pop(old, {})
        state: dict[str, Tensor] = self.state[weight]
        return state

    def bind_on_device(self, weight: Tensor) -> dict[str, Tensor]:
        """Return :meth:`bind`'s momentum, moved to the device of the head's ``weight``."""
        state = self.bind(weight)
        for name, tensor in state.items():
            if tensor.device != weight.device:  # the head was moved, or built without memory (device="meta")
                moved = torch.zeros_like(tensor, device=weight.device) if tensor.is_meta else tensor.to(weight.device)
                state[name] = moved
        return state

    def check(self, weight: Tensor) -> None:
        """Check that the head's ``weight`` can be updated.

        Raises:
            TypeError: if the head has been converted to a dtype that centers cannot be updated in.
            ValueError: if elements of the weight share memory, its shape is no longer the momentum's, or a setting is
                out of its range.
            CenterUpdateError: if the weight is not a parameter; or if an earlier step was refused on a GPU, see
                :class:`CenterSGD`.
        """
        _check_weight(weight)
        if weight.requires_grad and not (isinstance(weight, nn.Parameter) and weight.is_leaf):
            raise CenterUpdateError(
                "weight must be a parameter of the head with CenterSGD, which updates it in place; got a tensor made "
                "of others, as by parametrize, weight_norm or prune: use an ordinary optimizer (center_optimizer=None)"
            )
        state, settings = self.bind(weight), self.param_groups[0]
        check_update(weight, state.get("momentum_buffer"), state.get("momentum_scale"))
        check_settings(settings)
        if settings["momentum"] > 0 and "momentum_buffer" not in state:
            raise ValueError(
                "CenterSGD: momentum must stay 0 in a head that was built without it, which has no memory for it; got "
                f"{settings['momentum']}"
            )
        self._check_factors()

    def _check_factors(self) -> None:
        factor = self.factors.overdue()
        if factor is not None:
            raise CenterUpdateError(f"in an earlier step, which changed no class center, {refusal(factor)}")

    def prepare(
        self, step: int, weight: Tensor, margin: Margin, scale: Any, sampled: SampledRows | None = None
    ) -> PendingUpdate:
        """Return the update of the head's ``weight``, or of copies of its rows, for forward pass number ``step``.

        Call :meth:`check` first, and this before margin and scale change their state.
        """
        update = PendingUpdate(self, step, weight, copy_of_state(margin) + copy_of_state(scale), sampled)
        if torch.is_grad_enabled():
            self._pending.add(update)
        return update

    def center_step(
        self,
        step: int,
        state: dict[str, Tensor],
        classes: Tensor | None,
        active: Tensor,
        row_ids: Tensor | None = None,
    ) -> CenterStep:
        """Return the numbers of forward pass number ``step``.

        ``state`` is :meth:`bind`'s, or copies of its rows. :class:`CenterStep` describes the others.
        """
        group = self.param_groups[0]
        return CenterStep(
            classes,
            state.get("momentum_buffer"),
            state.get("momentum_scale"),
            float(group["lr"]),
            float(group["momentum"]),
            float(group["weight_decay"]),
            rounding_key(self._seed, step),
            self._class_start,
            active,
            row_ids,
        )


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in CENTER_DTYPES:
        listed = ", ".join(map(str, CENTER_DTYPES))
        raise TypeError(f"CenterSGD needs class centers of dtype {listed}; got {weight.dtype}")
