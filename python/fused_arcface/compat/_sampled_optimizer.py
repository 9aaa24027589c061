"""Optimizer steps that change only the class centers of a sample; the others keep their values and momentum."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

Others = Callable[[], Tensor | None]
"""Function that returns the rows (M,) to keep in the next step; None for none."""


class KeptRows:
    """Hooks on an optimizer: around each step they put back rows of a parameter and of its state.

    With a dense gradient, weight decay and momentum move every row, also a row without a gradient.
    """

    def __init__(self, weight: nn.Parameter, others: Others) -> None:
        self._weight, self._others = weight, others
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._rows: Tensor | None = None

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the hooks on an optimizer, once."""
        if optimizer not in self._known:
            self._known.add(optimizer)
            optimizer.register_step_pre_hook(lambda optimizer, *_: self._keep(optimizer))
            optimizer.register_step_post_hook(lambda optimizer, *_: self._put_back(optimizer))

    def _tensors(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        state = optimizer.state.get(self._weight, {}).values()
        return [
            self._weight,
            *(each for each in state if isinstance(each, Tensor) and each.shape == self._weight.shape),
        ]

    @torch.no_grad()
    def _keep(self, optimizer: torch.optim.Optimizer) -> None:
        self._rows = self._others()
        if self._rows is not None:
            self._kept = [(each, each[self._rows]) for each in self._tensors(optimizer)]

    @torch.no_grad()
    def _put_back(self, optimizer: torch.optim.Optimizer) -> None:
        if self._rows is None:
            return
        before = {id(tensor): rows for tensor, rows in self._kept}
        for tensor in self._tensors(optimizer):
            # A state that this step has made was zero before.
            tensor[self._rows] = before.get(id(tensor), torch.zeros((), dtype=tensor.dtype, device=tensor.device))
        self._kept, self._rows = [], None
