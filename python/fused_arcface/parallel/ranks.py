"""All collectives of the heads.

``engine/`` and :mod:`fused_arcface.partial_fc` call them between the stages. A process without a group is a group of
one: each collective then returns its argument.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..base.dtypes import FLOAT_DTYPES
from .agreement import REFUSED, Agreement, Header, check_agreements, check_headers, digest, equal_shards
from .room import HEADER_BYTES, Room
from .watch import state_of_group
from .wrappers import copied_shards

if dist.is_available():
    # Now, and not later inside a training step: the module takes the default group that there is when it is imported.
    # It would keep that group, and gloo's threads would outlive destroy_process_group and could abort the process.
    import torch.distributed.nn

# torch 2.13 gave these two new names and warns about the old ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class JointBatch:
    """The N rows of all ranks, in rank order."""

    embeddings: Tensor
    """(N, D), without a gradient."""
    labels: Tensor
    """(N,) int64: global class ids or the ignore_index, as the ranks passed them."""
    counts: list[int]
    """Number of rows of each rank."""
    first: int
    """Index of this rank's first row."""
    count: int
    """Number of this rank's rows."""
    requires_grad: bool
    """True if any rank needs the gradient by its embeddings. All ranks then join its collectives."""
    return_stats: bool = False
    """True if any rank asks for the statistics of its rows. All ranks then join their collective."""
    numbers: tuple[Tensor, ...] = ()
    """(N,) fp64 or int64 each: what the ranks passed for each row beside its label."""

    def own(self, rows: Tensor) -> Tensor:
        """Return this rank's part of a tensor over all rows, (N, ...) to (count, ...)."""
        return rows.narrow(0, self.first, self.count)


class Ranks:
    """The ranks that share the classes of a head.

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
        # The largest local batch so far. A step costs one all-gather, and a second one only when a batch is larger than
        # all before or has another dtype.
        self._room = Room()
        self._call = ""
        self.number = 0
        """The head's number in the group, from 1; 0 if this is no head's."""
        self.backward_passes = 0
        """Number of backward passes so far, over all copies of the head."""

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a group is a connection and cannot be copied

    def number_head(self) -> None:
        """Give a new head its number among those of the group. A collective."""
        if self.world_size > 1:
            state = state_of_group(self.group)
            self.number = state.heads = 1 + max(self.gather_objects(state.heads))

    def _run(self, device: torch.device, collective: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Run a collective of tensors on a device to its end, which the host awaits on the CPU alone."""
        state = state_of_group(self.group)
        if state.watches(self.group, device):
            state.start(self.group, self._place(), collective, *args, **options)()
        else:
            collective(*args, group=self.group, **options)

    def _place(self) -> str:
        """Return the name of the call that a collective belongs to."""
        call = "backward()" if torch._C._current_graph_task_id() != -1 else self._call
        return f"{call} of head {self.number}" if self.number else call

    def gather_batch(
        self,
        embeddings: Tensor,
        labels: Tensor,
        owner: str,
        agreement: Agreement,
        *,
        requires_grad: bool = False,
        return_stats: bool = False,
        shard: int = 0,
        numbers: Sequence[Tensor] = (),
    ) -> JointBatch:
        """Gather all ranks' embeddings (n, D) and labels (n,); n may differ between ranks and be 0.

        This takes one all-gather. With several ranks the host waits for the device once, to read each rank's number of
        rows. If the group has a backend for the CPU too, the headers are sent over it, and the host waits for the other
        hosts only. A single rank does not wait.

        Args:
            embeddings: (n, D) of this rank.
            labels: (n,) global labels of any integer dtype.
            owner: name of the head, for errors.
            agreement: values that must be the same on every rank.
            requires_grad: True if this rank needs the gradient by its embeddings.
            return_stats: True if this rank asks for the statistics of its rows.
            shard: :func:`fused_arcface.parallel.agreement.digest_of_shard` of the class centers, or 0.
            numbers: (n,) each, more numbers for each row, as many on every rank. Floats are gathered in fp64.

        Raises:
            RuntimeError: if a rank has refused its arguments, or two ranks hold the same class centers. This and the
                other errors are raised on every rank.
            TypeError: if the embeddings' dtypes differ between ranks.
            ValueError: if a value of the agreement differs between ranks.
        """
        self._call = agreement.get("call", owner)
        labels, count = labels.long(), embeddings.shape[0]
        numbers = [each.double() if each.is_floating_point() else each.long() for each in numbers]
        if self.world_size == 1:
            return JointBatch(embeddings, labels, [count], 0, count, requires_grad, return_stats, tuple(numbers))
        dtype = FLOAT_DTYPES.index(embeddings.dtype)
        own = Header(count, int(requires_grad), int(return_stats), dtype, digest(agreement), shard, len(numbers))
        columns = torch.stack([labels, *(each.view(torch.int64) for each in numbers)], 1)
        if self._headers_travel_apart(embeddings.device):
            headers = self._gather_headers(own, embeddings.device)
            self._compare(headers, owner, agreement)
            self._make_room(headers, embeddings)
            _, all_columns, rows = self._gather_padded(own, embeddings, columns)
        else:
            while True:
                header, all_columns, rows = self._gather_padded(own, embeddings, columns)
                headers = _headers(header)
                self._compare(headers, owner, agreement)
                if not self._make_room(headers, embeddings):
                    break
        counts = [header.rows for header in headers]
        if min(counts) < self._room.rows:
            all_columns = torch.cat([part[:count] for part, count in zip(all_columns, counts, strict=True)])
            rows = torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])
        all_labels, *all_numbers = all_columns.reshape(-1, all_columns.shape[-1]).unbind(1)
        return JointBatch(
            rows.reshape(-1, embeddings.shape[1]),
            all_labels.contiguous(),
            counts,
            sum(counts[: self.rank]),
            counts[self.rank],
            any(header.requires_grad for header in headers),
            any(header.return_stats for header in headers),
            tuple(every.contiguous().view(own.dtype) for every, own in zip(all_numbers, numbers, strict=False)),
        )

    def meet(self, owner: str, agreement: Agreement, device: torch.device) -> None:
        """Begin a collective without a batch: check the agreement as :meth:`gather_batch` does."""
        if self.world_size > 1:
            self._call = agreement.get("call", owner)
            headers = self._gather_headers(Header(0, agreement=digest(agreement)), device)
            self._compare(headers, owner, agreement)

    def refuse_batch(self, device: torch.device) -> None:
        """Tell the other ranks that this rank's arguments are wrong, so that they raise too and do not wait.

        A rank calls this in place of :meth:`gather_batch`.

        Args:
            device: device of the class centers: the group may have no backend for another.
        """
        if self.world_size > 1:
            self._gather_headers(Header(REFUSED), device)

    def _compare(self, headers: list[Header], owner: str, agreement: Agreement) -> None:
        """Raise on every rank, or on none. The texts are exchanged only where their digests differ."""
        check_headers(headers)
        if len({header.agreement for header in headers}) > 1:
            check_agreements(owner, self._gather_objects(agreement))
        same = equal_shards(headers)
        if same:
            raise RuntimeError(copied_shards(owner, same))

    def _make_room(self, headers: list[Header], embeddings: Tensor) -> bool:
        """Return true if the batch did not fit into the buffer that is there."""
        old, self._room = self._room, self._room.grown(headers, embeddings)
        return self._room != old

    def _headers_travel_apart(self, device: torch.device) -> bool:
        """Return true if headers are sent over the group's backend for the CPU, so that nobody waits for a GPU."""
        return device.type != "cpu" and self._has_cpu_backend

    @property
    def _has_cpu_backend(self) -> bool:
        group: Any = self.group
        return torch.device("cpu") in group._device_types

    def _gather_headers(self, own: Header, device: torch.device) -> list[Header]:
        """Return all ranks' headers, without gathering rows."""
        if not self._has_cpu_backend:
            return _headers(self._gather_padded(own, torch.empty(0, device=device))[0])
        numbers = torch.zeros(1, self._room_for(HEADER_BYTES) // 8, dtype=torch.int64, device="cpu")
        numbers[0, : len(own)] = torch.tensor(own, device="cpu")
        received = numbers.new_empty(self.world_size, numbers.shape[1])
        self._run(numbers.device, _all_gather, received, numbers)
        return _headers(received[:, : len(own)])

    def _room_for(self, size: int) -> int:
        """Return the size of each rank's part of a buffer with a header in front.

        It is the same for all heads of a group. If the ranks make different calls, their buffers fit each other, and
        the headers say so.
        """
        state = state_of_group(self.group)
        state.buffer_bytes = max(state.buffer_bytes, size)
        return state.buffer_bytes

    def _gather_padded(
        self, own: Header, embeddings: Tensor, columns: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return headers (W, 7), columns (W, room, K) and embeddings (W, room, D) of all ranks, by one collective.

        The columns are int64: the label of each row, then the bits of its numbers. Headers are always complete. If this
        rank's rows do not fit, zeros are sent in their place.
        """
        room, device = self._room, embeddings.device
        length = room.length if self._headers_travel_apart(device) else self._room_for(room.length)
        send = torch.zeros(1, length, dtype=torch.uint8, device=device)
        room.fill(send, own, embeddings, columns)
        received = send.new_empty(self.world_size, length)
        self._run(device, _all_gather, received, send)
        return room.parts(received)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.world_size > 1:
            self._run(tensor.device, dist.all_reduce, tensor)
        return tensor

    def sum_rows(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Return the sums over the ranks of several (N,) tensors of one dtype, in one collective."""
        return self.sum(torch.stack(rows)).unbind() if self.world_size > 1 else rows

    def max(self, tensor: Tensor) -> Tensor:
        """Take the elementwise maximum over the ranks, in place. Some backends skip NaN."""
        if self.world_size > 1:
            self._run(tensor.device, dist.all_reduce, tensor, op=dist.ReduceOp.MAX)
        return tensor

    def start_scatter(self, rows: Tensor, batch: JointBatch) -> Callable[[], Tensor]:
        """Start to sum rows (N, D) over the ranks.

        Returns:
            A function that waits for the sum and returns this rank's rows of it, (count, D).
        """
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
        state = state_of_group(self.group)
        if state.watches(self.group, rows.device):  # gloo scatters a sum in the same way
            rows = rows.clone()
            finish = state.start(self.group, self._place(), dist.all_reduce, rows)

            def own_sum() -> Tensor:
                finish()
                return rows.narrow(0, self.rank * room, batch.count).clone()

            return own_sum
        result = rows.new_empty(room, rows.shape[1])
        work = _reduce_scatter(result, rows, group=self.group, async_op=True)

        def wait() -> Tensor:
            nonlocal rows
            work.wait()
            del rows  # kept alive until here: the collective reads it
            return result[: batch.count]

        return wait

    def gather_rows(self, rows: Tensor, counts: list[int]) -> list[Tensor]:
        """Return every rank's (counts[rank], ...) tensor, in rank order."""
        if self.world_size == 1:
            return [rows]
        room = max(counts)
        send = rows if len(rows) == room else torch.cat([rows, rows.new_zeros(room - len(rows), *rows.shape[1:])])
        received = rows.new_empty(self.world_size, room, *rows.shape[1:])
        self._run(send.device, _all_gather, received.flatten(0, 1), send.contiguous())
        return [part[:count] for part, count in zip(received, counts, strict=True)]

    def gather_objects(self, value: Any, call: str = "") -> list[Any]:
        """Return every rank's picklable ``value``, in rank order.

        Args:
            value: this rank's value.
            call: name of the call that needs them, the same on every rank.

        Raises:
            ValueError: on every rank, if the ranks make different calls.
        """
        if self.world_size == 1:
            return [value]
        if self._has_cpu_backend:
            self.meet("the ranks", {"call": call}, torch.device("cpu"))
        return self._gather_objects(value)

    def _gather_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def check_agreement(self, owner: str, agreement: Agreement) -> None:
        """Raise the same ValueError on every rank if a value differs between ranks."""
        check_agreements(owner, self.gather_objects(agreement, owner))

    def on_first(self, function: Callable[[], _Result]) -> _Result:
        """Return on every rank what a function returns on the first, or raise what it raises there. A collective."""
        outcome: Any = (None, None)
        if self.rank == 0:
            try:
                outcome = (function(), None)
            except Exception as error:
                outcome = (None, error)
        result, failure = self.gather_objects(outcome)[0]
        if failure is not None:
            raise failure
        return result

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run a block of each rank's own work. If it raises on one rank, raise RuntimeError on the others.

        A collective: every rank waits at the end of the block for all others.

        Args:
            what: name of the work, for the error.
        """
        try:
            yield
        except Exception as error:
            self.gather_objects(f"{type(error).__name__}: {error}", what)
            raise
        failures = {rank: each for rank, each in enumerate(self.gather_objects(None, what)) if each is not None}
        if failures:
            listed = "; ".join(f"rank {rank}: {each}" for rank, each in failures.items())
            raise RuntimeError(f"{what} failed on {listed}")


def _headers(numbers: Tensor) -> list[Header]:
    """Return (W, 7) int64 as headers. Reading the values waits for a GPU."""
    return [Header(*each) for each in numbers.tolist()]


ALONE = Ranks.__new__(Ranks)
ALONE.group, ALONE.rank, ALONE.world_size = None, 0, 1
"""This process alone, even if torch.distributed is initialized."""
