"""Buffers of modules as they were: the learner and the joint step put them back where a pass must leave no trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SavedBuffers:
    """Copies of all buffers of some modules, at the time that this is made.

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
        """Put every value back, into the same tensors: a module may also have replaced one."""
        for module, name, buffer, value in self._saved:
            buffer.copy_(value)
            module._buffers[name] = buffer
