"""The collectives of the head, all in this file: :mod:`fused_arcface.autograd` and :mod:`fused_arcface.partial_fc` call
them between the stages. One process without a group is the group of one: each collective then hands back what it was
given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import FLOAT_DTYPES

# torch 2.13 gave these two new names and warns about the old ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

# int64 numbers before a rank's rows in the gathered buffer: how many rows, whether they need a gradient, their dtype.
_HEADER = 3
_REFUSED = -1  # as the number of rows
_ALIGNMENT = 16  # bytes: each part of the buffer is viewed as its own dtype


@dataclass(frozen=True)
class JointBatch:
    """The rows of all ranks, in rank order: N of them, of which ``count`` from ``first`` on are this rank's."""

    embeddings: Tensor
    """(N, D), without a gradient."""
    target: Tensor
    """(N,) int64 labels as the users gave them."""
    counts: list[int]
    """Rows of each rank."""
    first: int
    count: int
    requires_grad: bool
    """Whether any rank wants the gradient by its embeddings: the collectives of the backward pass need all or none."""

    def own(self, rows: Tensor) -> Tensor:
        """This rank's part of a tensor over all rows, (N, ...) to (count, ...)."""
        return rows.narrow(0, self.first, self.count)


class Ranks:
    """The ranks that hold the classes between them.

    Args:
        group: a process group, a one-dimensional ``DeviceMesh``, or None: the default group where torch.distributed is
            initialised, else this process alone.
    """

    def __init__(self, group: Any = None) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if hasattr(group, "get_group"):  # a DeviceMesh
            if group.ndim != 1:
                raise ValueError(
                    f"group must be a one-dimensional DeviceMesh; got {group.ndim} dimensions: pass mesh['name']"
                )
            group = group.get_group()
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None; got {type(group).__name__}")
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        # Rows that a rank's part of the gathered buffer has room for: the largest local batch so far. All ranks learn
        # it from the same headers, so a step costs one all-gather, and a second one only when some batch has outgrown
        # all before.
        self._room = 0
        self._rows_like = torch.empty(0, 0)

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a group is a connection: there is nothing to copy

    def gather_batch(self, embeddings: Tensor, target: Tensor, requires_grad: bool) -> JointBatch:
        """All ranks' embeddings (n, D) and labels (n,); n may differ between ranks and be 0. One all-gather.

        With more than one rank the host waits for the device once, to read how many rows each rank has; alone it does
        not wait.
        """
        target = target.long()
        self._rows_like = embeddings.detach()[:0]
        if self.world_size == 1:
            count = embeddings.shape[0]
            return JointBatch(embeddings, target, [count], 0, count, requires_grad)
        while True:
            headers, labels, rows = self._gather_padded(embeddings, target, requires_grad)
            headers = headers.cpu()
            counts = headers[:, 0].tolist()
            refused = [rank for rank, count in enumerate(counts) if count == _REFUSED]
            if refused:
                raise RuntimeError(
                    f"rank(s) {', '.join(map(str, refused))} refused the arguments of this step: see the error there"
                )
            dtypes = [FLOAT_DTYPES[index] for index in headers[:, 2].tolist()]
            if len(set(dtypes)) > 1:
                raise TypeError(f"embeddings must have the same dtype on every rank; got {', '.join(map(str, dtypes))}")
            if max(counts) <= self._room:
                break
            self._room = max(counts)
        if min(counts) < self._room:
            labels = torch.cat([part[:count] for part, count in zip(labels, counts, strict=True)])
            rows = torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])
        return JointBatch(
            rows.reshape(-1, embeddings.shape[1]),
            labels.reshape(-1),
            counts,
            sum(counts[: self.rank]),
            counts[self.rank],
            bool(headers[:, 1].any()),
        )

    def refuse_batch(self) -> None:
        """In place of :meth:`gather_batch` on a rank whose arguments are wrong, so that the others raise too and do not
        wait."""
        if self.world_size > 1:
            self._gather_padded(self._rows_like, torch.empty(0, dtype=torch.int64), False, _REFUSED)

    def _gather_padded(
        self, embeddings: Tensor, target: Tensor, requires_grad: bool, count: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Headers (W, 3), labels (W, room) and embeddings (W, room, D) of all ranks in one collective; the header is
        always whole."""
        count, dim = embeddings.shape[0] if count is None else count, embeddings.shape[1]
        sizes = [8 * _HEADER, 8 * self._room, embeddings.element_size() * self._room * dim]
        ends = [0]
        for size in sizes:
            ends.append(-(-(ends[-1] + size) // _ALIGNMENT) * _ALIGNMENT)

        def parts(buffer: Tensor) -> list[Tensor]:
            dtypes = (torch.int64, torch.int64, embeddings.dtype)
            return [
                buffer[:, start : start + size].view(dtype)
                for start, size, dtype in zip(ends[:-1], sizes, dtypes, strict=True)
            ]

        send = torch.zeros(1, ends[-1], dtype=torch.uint8, device=embeddings.device)
        header, labels, rows = parts(send)
        # Number by number: to copy a tensor from the host would be to wait for the device.
        for column, value in enumerate((count, int(requires_grad), FLOAT_DTYPES.index(embeddings.dtype))):
            header[:, column] = value
        if 0 <= count <= self._room:
            labels[0, :count] = target
            rows.view(self._room, dim)[:count] = embeddings
        received = send.new_empty(self.world_size, ends[-1])
        _all_gather(received, send, group=self.group)
        header, labels, rows = parts(received)
        return header, labels, rows.unflatten(1, (self._room, dim))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_rows(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Sums over the ranks of several (N,) tensors of one dtype, in one collective."""
        return self.sum(torch.stack(rows)).unbind() if self.world_size > 1 else rows

    def max(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over the ranks, in place; NaN counts for nothing on some backends."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def start_scatter(self, rows: Tensor, batch: JointBatch) -> Callable[[], Tensor]:
        """Starts summing (N, D) over the ranks; the function returned waits for this rank's rows of the sum, (count,
        D)."""
        if self.world_size == 1:
            return lambda: rows
        room = max(batch.counts)
        if min(batch.counts) < room:
            padded = rows.new_zeros(self.world_size, room, rows.shape[1])
            for part, own in zip(padded, rows.split(batch.counts), strict=True):
                part[: len(own)] = own
            rows = padded
        rows = rows.reshape(self.world_size * room, -1).contiguous()
        result = rows.new_empty(room, rows.shape[1])
        work = _reduce_scatter(result, rows, group=self.group, async_op=True)

        def wait() -> Tensor:
            nonlocal rows
            work.wait()
            del rows  # held until here: the collective reads it
            return result[: batch.count]

        return wait

    def gather_rows(self, rows: Tensor, counts: list[int]) -> list[Tensor]:
        """Every rank's (counts[rank], ...) tensor, in rank order."""
        if self.world_size == 1:
            return [rows]
        room = max(counts)
        send = rows if len(rows) == room else torch.cat([rows, rows.new_zeros(room - len(rows), *rows.shape[1:])])
        received = rows.new_empty(self.world_size * room, *rows.shape[1:])
        _all_gather(received, send.contiguous(), group=self.group)
        return [part[:count] for part, count in zip(received.split(room), counts, strict=True)]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def check_agreement(self, owner: str, options: dict[str, str]) -> None:
        """Raises on every rank alike when an option's text differs between ranks."""
        every = self.gather_objects(options)
        for name in options:
            values = [other.get(name) for other in every]
            if any(value != values[0] for value in values):
                listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
                raise ValueError(f"{owner}: {name} must be the same on every rank; got {listed}")


ALONE = Ranks.__new__(Ranks)
ALONE.group, ALONE.rank, ALONE.world_size = None, 0, 1
"""This process by itself, whatever torch.distributed has initialised."""
