"""Move the rows of a step from a store into one contiguous buffer on the computing device, and back.

The classes that step t+1 draws are known while step t computes, so their rows are fetched at the same time. When the
labels of step t+1 are known, the rows of their classes are read as well. A row that step t has changed is taken from
the buffer of step t: the store may not have it yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .columns import Buffers, Columns, Tensors, gather, scatter
from .lanes import StreamLane, ThreadLane, Wait
from .records import StoreError


class Source(Protocol):
    """The rows of one shard at rest."""

    columns: Columns

    def read(self, rows: Tensor, out: Tensors, keep: bool) -> None:
        """Fill ``out`` with rows (K,); ``keep``: they are about to change."""

    def write(self, rows: Tensor, tensors: Tensors) -> None:
        """Replace rows (K,)."""


@dataclass
class Traffic:
    """Bytes that have gone between a store and the buffers of the steps."""

    read: int = 0
    written: int = 0


class StepRows(NamedTuple):
    """The rows that a step needs."""

    step: int
    """Number of the step."""
    draw: tuple[float, int]
    """Rate and seed of the sample. With the step's number they decide which rows are drawn."""
    rows: Tensor
    """(K,) as :class:`SampledRows` has them."""
    targets: Tensor
    """Rows of the batch's classes, in any order; negative for classes of other shards."""
    update: bool
    """If true, the step changes the rows."""
    upcoming: Callable[[], Tensor]
    """Return the rows (J,) that the next step draws, ascending. It may be called on another thread."""


@dataclass(eq=False)
class SampledRows:
    """Copies of the rows of one step, in memory of their own."""

    rows: Tensor
    """(K,) int64 indices into the shard, ascending. Padding at the end has the shard's number of rows as index."""
    ids: Tensor
    """(K,) int64 global numbers of the rows."""
    tensors: Tensors
    """K rows of each column, contiguous."""
    write_back: Callable[[], None]
    """Give the changed rows back to the store. Call it once at most."""
    turn: int = 0
    """Number of the step among those that change rows; 0 for a step that changes none."""
    ready: Wait = lambda: None
    """Wait until the tensors can be read."""


_Key = tuple[int, tuple[float, int], bool]
"""Step, draw and update of :class:`StepRows`."""


class _Fetched(NamedTuple):
    """The rows that a step will draw, on their way."""

    key: _Key
    wait: Callable[[], tuple[Tensor, Tensors]]
    """Wait for the rows. Return their (K,) int64 indices into the shard, and K rows of each column."""


class Pipeline:
    """Takes the rows of steps from a source, and gives them back.

    The shard has ``num_rows`` rows, from the global row ``row_start`` on. The buffers lie on ``device``, and are pinned
    memory if ``pinned`` is true. The lane does the work beside the computation. Without one, all work is done at once,
    and nothing is fetched ahead. ``traffic`` counts the bytes.
    """

    def __init__(
        self,
        source: Source,
        num_rows: int,
        row_start: int,
        device: torch.device,
        lane: ThreadLane | StreamLane | None,
        traffic: Traffic,
        pinned: bool = False,
    ) -> None:
        self._source, self._num_rows, self._row_start, self._lane = source, num_rows, row_start, lane
        self._device = device
        self._on_thread, self._on_stream = isinstance(lane, ThreadLane), isinstance(lane, StreamLane)
        self._buffers, self._ahead, self._labeled = (Buffers(source.columns, device, pinned) for _ in range(3))
        self._fetched: _Fetched | None = None
        self._last: SampledRows | None = None
        self._writes: list[Wait | None] = [None, None]
        self._failed: Exception | None = None
        self._turn = 0
        self._traffic = traffic

    def check(self) -> None:
        """Wait for the rows that are fetched ahead, and raise any error so far, before a step begins.

        Raises:
            StoreError: if the rows of the next step cannot be read or kept, or those of an earlier one written.
        """
        if self._failed is not None:
            raise StoreError(
                f"the rows of an earlier step could not be written: {self._failed}. Load the last checkpoint"
            ) from self._failed
        if self._fetched is not None and self._on_thread:
            fetched, self._fetched = self._fetched, None
            fetched.wait()
            self._fetched = fetched

    def take(self, drawn: StepRows) -> SampledRows:
        """Return copies of the rows of a step."""
        step, draw, rows, targets, update, upcoming = drawn
        self.check()
        room = self._room(len(rows) + 1, update)  # one row more, for targets of other shards
        tensors = {name: tensor[: len(rows)] for name, tensor in room.items()}
        ahead = self._arrived((step, draw, update))
        if ahead is None:
            self.drain()
            self._read(rows, tensors, update)
        else:
            at = torch.searchsorted(ahead[0], rows).clamp_(max=len(ahead[0]) - 1)
            for name, tensor in tensors.items():
                gather(ahead[1][name], at, tensor)
            self._read_targets(rows, targets, ahead[0], room, update)
            self._take_from_last(rows, tensors)
        if self._lane is not None:
            self._fetch((step + 1, draw, update), upcoming)
        sampled = SampledRows(rows, rows + self._row_start, tensors, lambda: None, self._turn if update else 0)
        sampled.write_back = lambda: self.give_back(sampled)
        return sampled

    def _room(self, count: int, update: bool) -> Tensors:
        """Return the buffer of the next step, for ``count`` rows.

        A step that changes no rows gets memory of its own: both buffers may await their backward passes.
        """
        if not update:
            return self._source.columns.empty(count, self._device)
        self._turn += 1
        if self._last is not None and (self._turn - self._last.turn) % 2 == 0:  # its buffer is the next one
            self.drain()
        self._wait_for_write(self._turn)
        return self._buffers.rows(self._turn, count)

    def _read(self, rows: Tensor, out: Tensors, keep: bool) -> None:
        self._source.read(rows, out, keep)
        self._traffic.read += len(rows) * self._source.columns.row_bytes

    def _fetch(self, key: _Key, upcoming: Callable[[], Tensor]) -> None:
        assert self._lane is not None

        def work() -> tuple[Tensor, Tensors]:
            rows = upcoming()
            tensors = self._ahead.rows(0, len(rows))
            self._read(rows, tensors, keep=key[-1])
            return rows, tensors

        self._fetched = _Fetched(key, self._lane.start(work))

    def _arrived(self, key: _Key) -> tuple[Tensor, Tensors] | None:
        """Return the rows that were fetched for a step, None if they were fetched for another one."""
        fetched, self._fetched = self._fetched, None
        if fetched is None:
            return None
        rows, tensors = fetched.wait()
        return (rows, tensors) if fetched.key == key and len(rows) > 0 else None

    def _read_targets(self, rows: Tensor, targets: Tensor, fetched: Tensor, room: Tensors, keep: bool) -> None:
        """Read the rows of the batch's classes into their places in the buffer, which has one row more."""
        targets = torch.where(targets < 0, self._num_rows, targets).sort().values
        if targets.device.type == "cpu" and not self._on_stream:  # only those that are not there yet
            targets = targets.unique()
            at = torch.searchsorted(fetched, targets).clamp_(max=len(fetched) - 1)
            targets = targets[(fetched[at] != targets) & (targets < self._num_rows)]
        if len(targets) == 0:
            return
        read = self._labeled.rows(0, len(targets))
        self._read(targets, read, keep)
        places = torch.searchsorted(rows, targets)
        for name, tensor in read.items():
            scatter(room[name], places, tensor)

    def _take_from_last(self, rows: Tensor, tensors: Tensors) -> None:
        """Replace the rows that the last step has changed."""
        last = self._last
        if last is None or len(last.rows) == 0:
            return
        last.ready()
        at = torch.searchsorted(last.rows, rows).clamp_(max=len(last.rows) - 1)
        changed = last.rows[at] == rows
        if self._on_stream:  # their number is not known to the host
            for name, tensor in tensors.items():
                newest = last.tensors[name].index_select(0, at)
                tensor.copy_(torch.where(changed[:, None], newest, tensor))
            return
        places = changed.nonzero().squeeze(1)
        for name, tensor in tensors.items():
            scatter(tensor, places, last.tensors[name].index_select(0, at[places]))

    def give_back(self, sampled: SampledRows) -> None:
        """Write the rows of a step into the store, now or on the thread."""

        def write() -> None:
            sampled.ready()
            try:
                self._source.write(sampled.rows, sampled.tensors)
            except Exception as error:
                self._failed = error
                raise
            self._traffic.written += len(sampled.rows) * self._source.columns.row_bytes

        self._last = sampled
        if self._on_thread:
            assert self._lane is not None
            self._writes[sampled.turn % 2] = self._lane.start(write)
        else:
            write()

    def _wait_for_write(self, turn: int) -> None:
        wait, self._writes[turn % 2] = self._writes[turn % 2], None
        if wait is not None:
            wait()

    def drain(self) -> None:
        """Wait until the store has all rows, and forget those that were fetched ahead."""
        if self._fetched is not None and self._on_thread:
            with contextlib.suppress(StoreError):  # the step that needs the rows reads them itself, and raises
                self._fetched.wait()
        self._fetched = None
        self._wait_for_write(0)
        self._wait_for_write(1)
        self._last = None

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()
