"""SGD on the class centers inside the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base.dtypes import MOMENTUM_DTYPES, compute_dtype
from .base.ranges import FROM_0, FROM_0_BELOW_1
from .center_optimizer import CenterOptimizer as _CenterOptimizer
from .center_optimizer import CenterRecipe
from .center_optimizer import CentersUpdatedInBackward as CentersUpdatedInBackward
from .engine.terms import MOMENTUM_BLOCK


@dataclass(frozen=True)
class CenterSGD(CenterRecipe):
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

    ranges: ClassVar = {"lr": FROM_0, "momentum": FROM_0_BELOW_1, "weight_decay": FROM_0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum_dtype is not None and self.momentum_dtype not in MOMENTUM_DTYPES:
            listed = ", ".join(map(str, MOMENTUM_DTYPES))
            raise TypeError(f"CenterSGD: momentum_dtype must be one of {listed}; got {self.momentum_dtype}")

    def make(self, weight: nn.Parameter, seed: int, class_start: int) -> SGDOfCenters:
        return SGDOfCenters(self, weight, seed, class_start)


class SGDOfCenters(_CenterOptimizer):
    """The optimizer that a :class:`CenterSGD` makes.

    ``param_groups`` has lr, momentum and weight_decay. ``state`` has ``momentum_buffer`` and, for int8, its
    ``momentum_scale``.
    """

    recipe = CenterSGD

    def new_state(self, recipe: CenterSGD, weight: Tensor) -> dict[str, Tensor]:
        if recipe.momentum == 0:
            return {}
        dtype = recipe.momentum_dtype or compute_dtype(weight, weight)
        state = {"momentum_buffer": torch.zeros(weight.shape, dtype=dtype, device=weight.device)}
        if dtype == torch.int8:
            units = -(-weight.shape[1] // MOMENTUM_BLOCK)
            state["momentum_scale"] = torch.zeros(weight.shape[0], units, dtype=torch.float32, device=weight.device)
        return state

    @property
    def momentum_buffer(self) -> Tensor | None:
        """(C, D), None without momentum."""
        return self.state[self._weight].get("momentum_buffer")

    @property
    def momentum_scale(self) -> Tensor | None:
        """(C, ceil(D / 64)) fp32, the units of an int8 momentum; else None."""
        return self.state[self._weight].get("momentum_scale")

    def check(self, weight: Tensor) -> None:
        super().check(weight)
        momentum = self.param_groups[0]["momentum"]
        if momentum > 0 and "momentum_buffer" not in self.state[weight]:
            raise ValueError(
                "CenterSGD: momentum must stay 0 in a head that was built without it, which has no memory for it; got "
                f"{momentum}"
            )


# A head that an earlier version pickled whole finds its optimizer and its class centers by their names in this module.
CenterOptimizer = SGDOfCenters
