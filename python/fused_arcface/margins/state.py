"""Margins with a state: modules with buffers, which change once in each training step.

``engine/margin_step.py`` gives such a margin all ranks' rows, and undoes its update where a step is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .protocol import Margin


class StatefulMargin(nn.Module):
    """Base of the margins with running statistics.

    Floating-point buffers stay fp32 when the head is cast, and when a file with another dtype is loaded.
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
        super()._load_from_state_dict(*args, **kwargs)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()  # with assign=True it has the file's dtype


Place = tuple[nn.Module, str]
"""A module and the name of one of its buffers."""


def state_of(margin: Margin) -> dict[Place, Tensor]:
    """Return the buffers that the next forward pass may change; none for a margin without a state, or in ``eval()``."""
    if not isinstance(margin, nn.Module) or not margin.training:
        return {}
    buffers = ((module, name, buffer) for module in margin.modules() for name, buffer in module._buffers.items())
    return {(module, name): buffer for module, name, buffer in buffers if buffer is not None}


def copy_of_state(margin: Margin) -> list[tuple[Tensor, Tensor]]:
    """Return each buffer of :func:`state_of` and a copy of it, to undo a step."""
    return [(buffer, buffer.clone()) for buffer in state_of(margin).values()]
