"""Heads with class centers on the computing device, in host memory, or in a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base.keyed_random import CENTER_STD, fill_normal
from .engine.run_state import RunState
from .parallel.wrappers import check_plain
from .sharded_evaluation import ShardedEvaluation
from .store import check_storage


class StoredCenters(ShardedEvaluation, RunState):
    """The part of a head that depends on where ``weight`` is. :class:`fused_arcface.PartialFC` sets the attributes."""

    sample_rate: float
    seed: int

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            check_plain(type(self).__name__, value)
            if not self._is_in_memory():
                raise RuntimeError(
                    "weight has no class centers to replace, as center_storage keeps them in a file: use "
                    "load_full_weight(), or fused_arcface.checkpoint.load"
                )
        super().__setattr__(name, value)

    def _held(self) -> dict[str, Tensor]:
        """Return weight and the fused optimizer's momentum, by name."""
        return {"weight": self.weight, **(self.center_optimizer.bind(self.weight) if self.center_optimizer else {})}

    def reset_parameters(self) -> None:
        """Draw the class centers anew: the same ones, for the same seed."""
        if self._is_in_memory():
            fill_normal(self.weight, self.seed, self.row_start, CENTER_STD)
        elif self._calls or self.step:  # a new head has its initial centers already
            raise RuntimeError(
                "the class centers of center_storage in a file cannot be drawn anew: name a new folder, which has the "
                "initial ones"
            )

    def _check_reachable(self) -> None:
        """Check that a step can read its class centers, and does not need all of them if they are elsewhere."""
        if self.center_store is None:
            return
        self.center_store.check()
        check_storage("host" if self.center_store.in_memory else "a file", self.sample_rate, fused=True)
        if not self.training and self.weight.device != self.device:
            size = self.num_local * self.sub_centers * self.embedding_dim * self.weight.element_size() / 2**30
            raise RuntimeError(
                f"in eval() the loss uses all class centers, {size:.1f} GiB on {self.device}, which center_storage "
                "keeps elsewhere: use topk() or logits(), which read them in pieces, or train() under torch.no_grad()"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredCenters:
        """Convert or move the head. Stored class centers stay where they are; the computing device changes."""
        if self.center_store is None:
            super()._apply(fn, recurse)
            return self
        made = fn(torch.empty(0, dtype=self.weight.dtype, device=self.device))
        if made.dtype != self.weight.dtype:
            raise TypeError(
                f"class centers outside of the device keep their dtype {self.weight.dtype}; got {made.dtype}"
            )
        for module in self.children():
            module._apply(fn, recurse)
        self.center_store.move(made.device)
        return self
