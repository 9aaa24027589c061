"""The collectives of the head, all in this file: :mod:`fused_arcface.engine.autograd` and :mod:`fused_arcface.partial_fc` call
them between the stages. One process without a group is the group of one: each collective then hands back what it was
given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..base.checks import FLOAT_DTYPES
from .agreement import REFUSED, Agreement, Header, check_agreements, check_headers, digest, equal_shards
from .wrappers import copied_shards

# torch 2.13 gave these two new names and warns about the old ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

_ALIGNMENT = 16  # bytes: each part of the buffer is viewed as its own dtype


class _Room(NamedTuple):
    """What a rank's part of the gathered buffer has room for. All ranks learn it from the same headers."""

    rows: int = 0
    dim: int = 0
    dtype: torch.dtype = torch.float32


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
    return_stats: bool = False
    """Whether any rank wants the statistics of its rows: they need a collective more."""

    def own(self, rows: Tensor) -> Tensor:
        """This rank's part of a tensor over all rows, (N, ...) to (count, ...)."""
        return rows.narrow(0, self.first, self.count)


class Ranks:
    """The ranks that hold the classes between them.

    Args:
        group: a process group, a one-dimensional ``DeviceMesh``, or None: the default group where torch.distributed is
            initialized, else this process alone.
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
        # The largest local batch so far, so that a step costs one all-gather, and a second one only when some batch has
        # outgrown all before or has another dtype.
        self._room = _Room()

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a group is a connection: there is nothing to copy

    def gather_batch(
        self,
        embeddings: Tensor,
        target: Tensor,
        owner: str,
        agreement: Agreement,
        *,
        requires_grad: bool = False,
        return_stats: bool = False,
        shard: int = 0,
    ) -> JointBatch:
        """Gather all ranks' embeddings (n, D) and labels (n,); n may differ between ranks and be 0.

        One all-gather. With more than one rank the host waits for the device once, to read how many rows each rank has;
        where the group has a backend for the CPU as well, the headers travel there and the host waits for the other
        hosts alone. A single rank does not wait.

        Args:
            owner: the name of the head, for errors.
            agreement: values that must be the same on every rank.
            requires_grad: this rank wants the gradient by its embeddings.
            return_stats: this rank wants the statistics of its rows.
            shard: :func:`fused_arcface.parallel.agreement.digest_of_shard` of the class centers, or 0.

        Raises, on every rank alike:
            RuntimeError: a rank has refused its arguments; two ranks hold the same class centers.
            TypeError, ValueError: dtypes or values of the agreement that differ between ranks.
        """
        target, count = target.long(), embeddings.shape[0]
        if self.world_size == 1:
            return JointBatch(embeddings, target, [count], 0, count, requires_grad, return_stats)
        dtype = FLOAT_DTYPES.index(embeddings.dtype)
        own = Header(count, int(requires_grad), int(return_stats), dtype, digest(agreement), shard)
        if self._headers_travel_apart(embeddings.device):
            headers = self._gather_headers(own, embeddings.device)
            self._compare(headers, owner, agreement)
            self._make_room(headers, embeddings)
            _, labels, rows = self._gather_padded(own, embeddings, target)
        else:
            while True:
                numbers, labels, rows = self._gather_padded(own, embeddings, target)
                headers = _headers(numbers)
                self._compare(headers, owner, agreement)
                if not self._make_room(headers, embeddings):
                    break
        counts = [header.rows for header in headers]
        if min(counts) < self._room.rows:
            labels = torch.cat([part[:count] for part, count in zip(labels, counts, strict=True)])
            rows = torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])
        return JointBatch(
            rows.reshape(-1, embeddings.shape[1]),
            labels.reshape(-1),
            counts,
            sum(counts[: self.rank]),
            counts[self.rank],
            any(header.requires_grad for header in headers),
            any(header.return_stats for header in headers),
        )

    def meet(self, owner: str, agreement: Agreement, device: torch.device) -> None:
        """In place of :meth:`gather_batch` in a collective without a batch, with the same errors."""
        if self.world_size > 1:
            headers = self._gather_headers(Header(0, agreement=digest(agreement)), device)
            self._compare(headers, owner, agreement)

    def refuse_batch(self, device: torch.device) -> None:
        """In place of :meth:`gather_batch` on a rank whose arguments are wrong, so that the others raise too and do not
        wait. ``device`` is that of the class centers: the group may have no backend for another."""
        if self.world_size > 1:
            self._gather_headers(Header(REFUSED), device)

    def _compare(self, headers: list[Header], owner: str, agreement: Agreement) -> None:
        """Raise on every rank, or on none. The texts are exchanged only where their digests differ."""
        check_headers(headers)
        if len({header.agreement for header in headers}) > 1:
            self.check_agreement(owner, agreement)
        same = equal_shards(headers)
        if same:
            raise RuntimeError(copied_shards(owner, same))

    def _make_room(self, headers: list[Header], embeddings: Tensor) -> bool:
        """Return whether the batch did not fit into the buffer that is there."""
        old, rows = self._room, max(header.rows for header in headers)
        self._room = _Room(max(rows, old.rows), embeddings.shape[1], embeddings.dtype)
        return self._room != old

    def _headers_travel_apart(self, device: torch.device) -> bool:
        """Whether to send headers over the group's backend for the CPU: not to wait for a GPU."""
        group: Any = self.group
        return device.type != "cpu" and torch.device("cpu") in group._device_types

    def _gather_headers(self, own: Header, device: torch.device) -> list[Header]:
        """All ranks' headers, without rows."""
        if not self._headers_travel_apart(device):
            return _headers(self._gather_padded(own, torch.empty(0, device=device))[0])
        numbers = torch.empty(self.world_size, len(own), dtype=torch.int64)
        _all_gather(numbers, torch.tensor([own]), group=self.group)
        return _headers(numbers)

    def _gather_padded(
        self, own: Header, embeddings: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Headers (W, 6), labels (W, room) and embeddings (W, room, D) of all ranks in one collective. The header is
        always whole; rows that do not fit stay zero."""
        room = self._room
        sizes = [8 * len(own), 8 * room.rows, room.dtype.itemsize * room.rows * room.dim]
        ends = [0]
        for size in sizes:
            ends.append(-(-(ends[-1] + size) // _ALIGNMENT) * _ALIGNMENT)

        def parts(buffer: Tensor) -> list[Tensor]:
            dtypes = (torch.int64, torch.int64, room.dtype)
            return [
                buffer[:, start : start + size].view(dtype)
                for start, size, dtype in zip(ends[:-1], sizes, dtypes, strict=True)
            ]

        send = torch.zeros(1, ends[-1], dtype=torch.uint8, device=embeddings.device)
        header, labels, rows = parts(send)
        # Number by number: to copy a tensor from the host would be to wait for the device.
        for column, value in enumerate(own):
            if value != 0:
                header[:, column] = value
        if target is not None and 0 < own.rows <= room.rows and embeddings.dtype == room.dtype:
            labels[0, : own.rows] = target
            rows.view(room.rows, room.dim)[: own.rows] = embeddings
        received = send.new_empty(self.world_size, ends[-1])
        _all_gather(received, send, group=self.group)
        header, labels, rows = parts(received)
        return header, labels, rows.unflatten(1, (room.rows, room.dim))

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
        elif room == 0:  # no rank has a row
            return lambda: rows
        rows = rows.reshape(self.world_size * room, rows.shape[-1]).contiguous()
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

    def check_agreement(self, owner: str, agreement: Agreement) -> None:
        """Raise ValueError on every rank alike when a value differs between ranks."""
        check_agreements(owner, self.gather_objects(agreement))

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run a block of each rank's own work; if it raises on one rank, raise RuntimeError on the others.

        A collective: no rank goes on before all have come to the end of the block.

        Args:
            what: is done here, for the error.
        """
        try:
            yield
        except Exception as error:
            self.gather_objects(f"{type(error).__name__}: {error}")
            raise
        failures = {rank: each for rank, each in enumerate(self.gather_objects(None)) if each is not None}
        if failures:
            listed = "; ".join(f"rank {rank}: {each}" for rank, each in failures.items())
            raise RuntimeError(f"{what} failed on {listed}")


def _headers(numbers: Tensor) -> list[Header]:
    """(W, 6) int64 as headers. Reads the values: on a GPU this waits for it."""
    return [Header(*each) for each in numbers.tolist()]


ALONE = Ranks.__new__(Ranks)
ALONE.group, ALONE.rank, ALONE.world_size = None, 0, 1
"""This process by itself, whatever torch.distributed has initialized."""
