"""Margins with a state: modules with buffers, which change once in each training step.

``engine/margin_step.py`` gives such a margin all ranks' rows, and undoes its update where a step is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class StatefulMargin(nn.Module):
    """Base of the margins with running statistics.

    Floating-point buffers keep their dtype, fp32 or fp64, when the head is cast, and when a file with another dtype is
    loaded.
    """

    changes = True
    """False for a margin whose buffers are options: a training step leaves them as they are."""

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
    """Return true if a forward pass may change the margin now: for a module in ``train()``, not in ``eval()``."""
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
