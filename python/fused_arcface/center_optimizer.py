"""The base of the fused optimizers of the class centers, which update each center as soon as its gradient is there.

The gradient is never stored. Users write a :class:`CenterRecipe`, such as :class:`fused_arcface.CenterSGD`. A head
makes a :class:`CenterOptimizer` of it, a ``torch.optim.Optimizer`` that schedulers drive. Each forward pass takes a
:class:`~fused_arcface.center_update.PendingUpdate` from it, which the backward pass applies.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base.checks import describe_tensor
from .base.dtypes import CENTER_DTYPES
from .base.keyed_random import rounding_key
from .base.ranges import Range, check_number
from .center_update import CenterUpdateError, PendingUpdate, refusal
from .engine.loss_factor import RefusedFactors
from .engine.terms import CENTER_SETTINGS, CENTER_STATE, CenterStep, check_update
from .margins.protocol import Margin
from .margins.state import copy_of_state
from .store import SampledRows

# Functions of torch.nn.utils that read gradients to clip them. They offer no hook, so they are known by name.
_CLIPPING = {"clip_grad_norm_", "clip_grad_value_", "_clip_grads_with_norm_"}
_GRAD: Any = torch.Tensor.grad


class CenterRecipe:
    """Base of the recipes: a frozen dataclass whose fields are the optimizer's settings and options.

    Raises:
        TypeError, ValueError: if a setting is not a number, or out of its range.
    """

    ranges: ClassVar[Mapping[str, Range]]
    """The settings: numbers in ``param_groups`` that may change from step to step, each with its range. The names
    are in ``CENTER_SETTINGS``."""

    def __post_init__(self) -> None:
        self.check_settings({name: getattr(self, name) for name in self.ranges})

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Check the settings, among other entries. They may be numbers of NumPy or torch.

        Raises:
            TypeError, ValueError: if one is missing, not a number, or out of its range.
        """
        for name, allowed in cls.ranges.items():
            value: Any = settings.get(name)
            if hasattr(value, "item") and math.prod(value.shape) == 1:
                value = value.item()
            check_number(f"{cls.__name__}: {name}", value, allowed)

    def make(self, weight: nn.Parameter, seed: int, class_start: int) -> CenterOptimizer:
        """Return the optimizer of a head's class centers, whose first row has the global id ``class_start``."""
        raise NotImplementedError


class CentersUpdatedInBackward(nn.Parameter):
    """Class centers whose gradient never exists: ``grad`` is None, and clipping it is an error.

    Clipping skips parameters without a gradient. It would silently leave the centers out.
    """

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        return type(self), (self.data, self.requires_grad)  # the method of nn.Parameter would restore an nn.Parameter

    @property
    def grad(self) -> Tensor | None:
        caller = sys._getframe(1)
        if _CLIPPING & {caller.f_code.co_name, caller.f_back.f_code.co_name if caller.f_back else ""}:
            raise CenterUpdateError(
                "the class centers have no gradient to clip: center_optimizer updates them in the backward pass. Clip "
                "the backbone's parameters alone, or use an ordinary optimizer (center_optimizer=None)"
            )
        return _GRAD.__get__(self)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        _GRAD.__set__(self, value)


class CenterOptimizer(torch.optim.Optimizer):
    """A :class:`CenterRecipe` bound to a head's class centers, ``head.center_optimizer``.

    The backward pass does its work. ``param_groups`` has the settings, which are read at each backward pass. ``state``
    has tensors with a row for each center. ``step()`` only checks that no gradients are accumulated.

    A subclass says which recipe it is made of, and makes the state. An attribute for each tensor of the state is needed
    too: torch.distributed.checkpoint looks up each name in a module's ``state_dict`` as an attribute.
    """

    recipe: ClassVar[type[CenterRecipe]]

    _step_supports_amp_scaling = True
    """Tell ``GradScaler.step()`` that this optimizer has no gradients to look through for infinite ones."""

    def __init__(self, recipe: CenterRecipe, weight: nn.Parameter, seed: int, class_start: int) -> None:
        self._check_dtype(weight)
        super().__init__([weight], {name: getattr(recipe, name) for name in self.recipe.ranges})
        self._seed, self._class_start = seed, class_start
        self._updates_since_step = 0
        self.factors = RefusedFactors()
        self._pending: weakref.WeakSet[PendingUpdate] = weakref.WeakSet()
        self._held: list[Callable[[], None]] | None = None
        self.state[weight] |= self.new_state(recipe, weight)

    def new_state(self, recipe: Any, weight: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the state before the first step, by their names, which are in ``CENTER_STATE``.

        They are contiguous and on weight's device. Each has a row for each row of weight.
        """
        raise NotImplementedError

    def needs(self) -> dict[str, str]:
        """Return the features that not every backend has, by name, with the text that error messages have for them."""
        return {}

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
        >>> fa.PartialFC(8, 100, center_optimizer=fa.CenterSGD(lr=0.1)).center_optimizer.describe()
        'CenterSGD(lr=0.1, momentum=0.9, weight_decay=0.0)'
        """
        return f"{self.recipe.__name__}({', '.join(f'{name}={value}' for name, value in self.options.items())})"

    @property
    def options(self) -> dict[str, Any]:
        """The entries of ``param_groups`` that are this optimizer's settings."""
        return {name: self.param_groups[0][name] for name in self.recipe.ranges}

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
                accumulation; or if an earlier step was refused on a GPU, see :class:`fused_arcface.CenterSGD`.
        """
        self._check_factors()
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        updates, self._updates_since_step = self._updates_since_step, 0
        if updates > 1:
            raise CenterUpdateError(
                f"{updates} backward passes before step(): center_optimizer updates the class centers in each, "
                "gradients cannot be accumulated. Pass the whole batch at once, or use an ordinary optimizer instead"
            )
        return result

    def hold(self) -> None:
        """Keep the updates of the following backward passes until :meth:`release`, at the cost of their embeddings.

        Every forward pass until the release uses the centers as they are now.
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
        """Return ``param_groups`` with an empty state: the tensors are in the head's ``state_dict()``."""
        return {**super().state_dict(), "state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the settings.

        An earlier version's state has tensors as well; they are restored in place. Load such a state after the head.

        Raises:
            TypeError, ValueError: if a tensor has another shape or dtype than this state's, or a setting is out of its
                range. Nothing is changed then.
        """
        self.recipe.check_settings(state_dict["param_groups"][0])
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
        """Return what the head's ``state_dict()`` holds of this optimizer: its state, shared, and its settings."""
        return {**self.bind(weight), "settings": self.settings}

    @property
    def settings(self) -> Tensor:
        """(S,) fp64: the settings, in the order of the recipe."""
        values = [float(value) for value in self.options.values()]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def check_loaded(self, settings: Tensor) -> None:
        """Check the :attr:`settings` (S,) of a loaded state. Raises ValueError if one is out of its range."""
        self.recipe.check_settings(self._named(settings))

    def _named(self, settings: Tensor) -> dict[str, float]:
        return dict(zip(self.recipe.ranges, settings.tolist(), strict=True))

    @torch.no_grad()
    def load_run_state(self, weight: Tensor, given: dict[str, Tensor], assign: bool) -> None:
        """Restore what :meth:`run_state` returned; a tensor that is not given becomes zero, settings stay.

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
            self.param_groups[0].update(self._named(given["settings"]))

    def bind(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the state of the head's ``weight``, by name.

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
        """Return :meth:`bind`'s state, moved to the device of the head's ``weight``."""
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
            ValueError: if elements of the weight share memory, its shape is no longer the state's, or a setting is out
                of its range.
            CenterUpdateError: if the weight is not a parameter; or if an earlier step was refused on a GPU, see
                :class:`fused_arcface.CenterSGD`.
        """
        self._check_dtype(weight)
        if weight.requires_grad and not (isinstance(weight, nn.Parameter) and weight.is_leaf):
            raise CenterUpdateError(
                f"weight must be a parameter of the head with {self.recipe.__name__}, which updates it in place; got a "
                "tensor made of others, as by parametrize, weight_norm or prune: use an ordinary optimizer "
                "(center_optimizer=None)"
            )
        check_update(weight, self.bind(weight))
        self.recipe.check_settings(self.param_groups[0])
        self._check_factors()

    def _check_dtype(self, weight: Tensor) -> None:
        if weight.dtype not in CENTER_DTYPES:
            listed = ", ".join(map(str, CENTER_DTYPES))
            raise TypeError(f"{self.recipe.__name__} needs class centers of dtype {listed}; got {weight.dtype}")

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
        own: dict[str, Any] = {name: state.get(name) for name in CENTER_STATE}
        own |= {name: float(group.get(name, 0)) for name in CENTER_SETTINGS}
        return CenterStep(
            classes=classes,
            **own,
            rounding_key=rounding_key(self._seed, step),
            class_start=self._class_start,
            active=active,
            row_ids=row_ids,
        )
