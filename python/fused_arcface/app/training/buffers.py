"""Copies of modules' buffers, which the learner and the joint step put back after a pass that must change nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SavedBuffers:
    """Copies of all buffers of some modules, made by the constructor.

    >>> norm = nn.BatchNorm1d(2)
    >>> saved = SavedBuffers(norm)
    >>> _ = norm(torch.full((3, 2), torch.nan)); saved.restore(); norm.running_mean
    tensor([0., 0.])
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._saved: list[tuple[nn.Module, str, Tensor, Tensor]] = [
            (module, name, buffer, buffer.clone())
            for root in modules
            for module in root.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put every value back into the same tensor, which a module may have replaced."""
        for module, name, buffer, value in self._saved:
            buffer.copy_(value)
            module._buffers[name] = buffer
