"""A head over many ranks whose class centers may be on the computing device, in host memory, or in a file.

Calls that use all class centers read them in pieces if they are in a store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .base.checks import check_embeddings, check_labels, check_size
from .base.keyed_random import CENTER_STD, fill_normal
from .base.memory import available_bytes
from .engine.logits import all_rows, check_size_of_logits, logits_of, own_logits
from .engine.nearest import cosines_of, nearest_classes
from .engine.run_state import RunState
from .parallel.wrappers import check_plain
from .store import check_storage

_CLASSES_AT_ONCE = 16384  # read from a store


class StoredCenters(RunState):
    """The part of a head that depends on where ``weight`` is. :class:`fused_arcface.PartialFC` sets the attributes."""

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

    @torch.no_grad()
    def full_weight(self) -> Tensor:
        """Return all class centers, (C_total, D), on every rank. A collective.

        Class centers in host memory or in a file come as a tensor on the CPU.

        Raises:
            MemoryError: if the class centers of a file don't fit into this machine's memory. ``convert`` writes them in
                pieces.
        """
        self._meet("full_weight()")
        with self.ranks.together("full_weight()"):
            rows = self._all_rows()
        return torch.cat(self.ranks.gather_rows(rows, self.row_counts()))

    def _all_rows(self) -> Tensor:
        """Return this shard's class centers as one tensor."""
        if self._is_in_memory():
            return self.weight
        # One tensor for all rows, and one for this shard's.
        needed = (self.num_rows + self.weight.shape[0]) * self.embedding_dim * self.weight.element_size()
        room = available_bytes(torch.device("cpu"))
        if needed > room:
            raise MemoryError(
                f"full_weight() needs {needed / 2**30:.1f} GiB of host memory; there are {room / 2**30:.1f} GiB: use "
                "topk() or logits(), which read pieces, or write a checkpoint as a file with the command convert"
            )
        rows = torch.empty(self.weight.shape, dtype=self.weight.dtype)
        for start, stop in self._pieces():
            rows[start:stop] = self.center_store.piece(start, stop)["weight"]
        return rows

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Yield the first row of each piece of this shard and the row after its last one. Pieces have whole classes."""
        num_rows, step = self.weight.shape[0], _CLASSES_AT_ONCE * self.sub_centers
        for start in range(0, num_rows, step):
            yield start, min(start + step, num_rows)

    def _view(self) -> Any:
        """Return this shard's class centers on the computing device, as a tensor or in pieces."""
        return self.weight if self.center_store is None else self.center_store.view(self.weight)

    @torch.no_grad()
    def load_full_weight(self, tensor: Tensor) -> None:
        """Set each shard from all class centers (C_total, D), the same on every rank. A collective.

        Raises:
            ValueError: if the shape is wrong, on any rank.
        """
        self._meet("load_full_weight()")
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        shapes = self.ranks.gather_objects(shape)
        wrong = [each for each in shapes if each != (self.num_rows, self.embedding_dim)]
        if wrong:
            rows = "C_total" if self.sub_centers == 1 else "C_total·sub_centers"
            raise ValueError(f"tensor must be ({rows}={self.num_rows}, D={self.embedding_dim}); got {wrong[0]}")
        own = tensor[self.row_start : self.row_start + self.weight.shape[0]]
        if self._is_in_memory():
            self.weight.copy_(own)
            return
        with self.ranks.together("load_full_weight()"):
            for start, stop in self._pieces():
                self.center_store.replace(torch.arange(start, stop), own[start:stop])

    def logits(self, embeddings: Tensor, target: Tensor | None = None, *, ignore_index: int = -100) -> Tensor:
        """Return ``s·cos θ`` (n, C_total) of this rank's embeddings (n, D) with every class; differentiable.

        A collective, and so is its backward pass: every rank makes both or neither. The gradients are the derivatives
        of the sum of all ranks' losses, each computed from its rank's logits; this holds for the class centers too.
        They are not multiplied by the number of ranks. With CenterSGD the class centers get no gradient. A learned
        scale never gets one.

        Args:
            embeddings: (n, D).
            target: (n,) global labels: the logits then have the margin, see :meth:`MarginHead.logits`. None: no margin.
            ignore_index: the label of rows without a margin.

        Raises:
            ValueError: if there are more than 2^30 numbers (4 GiB in fp32) over all ranks' rows, or a target beside a
                margin with binary losses.
        """
        with self._refusing():
            same = {
                "torch.is_grad_enabled()": torch.is_grad_enabled(),
                "weight.requires_grad": self.weight.requires_grad,
                "target": "none" if target is None else "given",
            }
            agreement = self._agreement("logits()", **same)
            if target is not None:
                check_embeddings(embeddings, self.weight, self.device)
                check_labels(target, embeddings, ignore_index)
        embeddings, batch, _ = self._gather(embeddings, None, agreement)
        check_size_of_logits(batch.embeddings.shape[0], self.num_classes)
        view = self._view()
        pieces: Iterable[Tensor]
        if isinstance(view, Tensor):
            pieces = [view if self.center_optimizer is None else view.detach()]
        else:
            pieces = (view[start:stop].detach() for start, stop in self._pieces())
        rows = all_rows(embeddings, batch, self.ranks)
        parts = [cosines_of(rows, piece, self.sub_centers) for piece in pieces]
        local = parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # (N, C)
        cosines = own_logits(local, batch, self.ranks, self.sharding.counts())
        scale = self.options.current_scale(self.num_classes)
        scale = scale.detach() if isinstance(scale, Tensor) else scale  # its gradient would differ between the ranks
        return logits_of(cosines, embeddings, target, ignore_index, self.options, scale)

    @torch.no_grad()
    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the cosines (n, k), descending, and ids (n, k) int64 of the k nearest classes over all shards.

        A collective, for this rank's embeddings (n, D), with the same k on every rank. The ids are global.

        Raises:
            ValueError: if k is outside [1, C_total], or the embeddings have a wrong shape or device.
        """
        with self._refusing():
            k = check_size("k", k)
            if k > self.num_classes:
                raise ValueError(f"k must be <= C_total={self.num_classes}; got {k}")
            agreement = self._agreement("topk()", k=k)
        _, rows, _ = self._gather(embeddings, None, agreement)
        cosines, classes = nearest_classes(rows.embeddings, self._view(), k, self.sub_centers)
        counts = [min(k, count) for count in self.sharding.counts()]
        cosines = torch.cat([rows.own(part.T) for part in self.ranks.gather_rows(cosines.T, counts)], 1)
        ids = self.ranks.gather_rows((classes + self.class_start).T, counts)
        cosines, best = cosines.topk(k)
        return cosines, torch.cat([rows.own(part.T) for part in ids], 1).gather(1, best)
