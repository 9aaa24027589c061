"""Margins with a state: modules with buffers, which change once in each training step.

``engine/margin_step.py`` gives such a margin all ranks' rows, and undoes its update where a step is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class KeepsValues(nn.Module):
    """A module that keeps its values while it is on the meta device, where tensors have none.

    A head that was built there gets memory by ``to_empty()``, which sets no values for its margin and scale. A program
    that replaces the tensors themselves, as ``from_pretrained`` of transformers does, calls ``reset_parameters()``.
    """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters and buffers to their initial values."""
        initial: dict[str, Tensor] = self.__dict__.get("_initial_values", {})
        for name, value in initial.items():
            # transformers replaces this function by one that keeps the values that were loaded from a file.
            nn.init.constant_(getattr(self, name), value.item())

    def _initial(self, name: str, value: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the initial value of a buffer or parameter of that name, on the default device."""
        value, device = torch.as_tensor(value, dtype=dtype, device="cpu"), torch.get_default_device()
        self.__dict__.setdefault("_initial_values", {})[name] = value.clone()
        if device.type == "meta":
            self._kept()[name] = value
        return value.to(device)

    def _kept(self) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = self.__dict__.setdefault("_values_on_meta", {})
        return kept

    def _values(self) -> dict[str, Tensor]:
        each = {**self._parameters, **self._buffers}
        return {name: tensor.detach() for name, tensor in each.items() if tensor is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsValues:
        before = self._values()
        super()._apply(fn, recurse)
        for name, tensor in self._values().items():
            if tensor.is_meta and not before[name].is_meta:
                self._kept()[name] = before[name].clone()
            elif before[name].is_meta and not tensor.is_meta and name in self._kept():
                tensor.copy_(self._kept()[name])
        return self


class StatefulMargin(KeepsValues):
    """Base of the margins with running statistics.

    Floating-point buffers keep their dtype, fp32 or fp64, when the head is cast, and when a file with another dtype is
    loaded.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulMargin:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        super()._load_from_state_dict(*args, **kwargs)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.to(before[name])  # with assign=True it has the file's dtype


Place = tuple[nn.Module, str]
"""A module and the name of one of its buffers."""


def has_state(margin: object) -> bool:
    """Return true if a forward pass may change the margin now: for a module in ``train()``, not in ``eval()``.

    A module whose attribute ``changes`` is false has options and no state, as :class:`fused_arcface.ClassMargin` does.
    """
    return isinstance(margin, nn.Module) and margin.training and getattr(margin, "changes", True)


def state_of(margin: object) -> dict[Place, Tensor]:
    """Return the buffers that the next forward pass may change; none for a margin without a state, or in ``eval()``."""
    if not has_state(margin):
        return {}
    assert isinstance(margin, nn.Module)
    buffers = ((module, name, buffer) for module in margin.modules() for name, buffer in module._buffers.items())
    return {(module, name): buffer for module, name, buffer in buffers if buffer is not None}


def copy_of_state(margin: object) -> list[tuple[Tensor, Tensor]]:
    """Return each buffer of :func:`state_of` and a copy of it, to undo a step."""
    return [(buffer, buffer.clone()) for buffer in state_of(margin).values()]
