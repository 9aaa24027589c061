"""Memory that knows who touched it: an access outside of every allocation, one that is not aligned, a read of what
nothing wrote and an access that no barrier orders behind another thread's are faults.
"""

from __future__ import annotations

import numpy as np

_NEVER, _BEFORE, _UNDER_WAY, _SEVERAL_BLOCKS = -1, 0, 2**31 - 2, 2**31 - 1
"""Times of an access: not yet, before the launch, a copy that its thread has not waited for, reads by several blocks.
Others are those of :class:`Order`."""
_SEVERAL = -1
"""Threads, or warps, that have read a unit since the last barrier."""


class Fault(Exception):
    """What a kernel must not do, and the thread of the block that does it."""

    def __init__(self, thread: int, why: str) -> None:
        super().__init__(why)
        self.thread = thread


class Order:
    """The barriers of a launch so far, as times that grow.

    Blocks run one after the other, and the threads of a block in step, which is one of many orders that a GPU may take.
    What it reads and writes is the same in all of them if no two accesses of a unit, one of them a write, lack a
    barrier between them. Blocks of a launch have none.
    """

    def __init__(self) -> None:
        self.now = 1

    def begin_block(self, warps: int) -> None:
        self.now += 1
        self.block = self.barrier = self.now
        self.warp = np.full(warps, self.now)

    def pass_barrier(self) -> None:
        self.now += 1
        self.barrier = self.now

    def pass_warp_barrier(self, warps: np.ndarray) -> None:
        self.now += 1
        self.warp[warps] = self.now

    def conflicts(self, times: np.ndarray, by: np.ndarray, warps: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Return where the accesses at ``times`` by other threads are not ordered before one of ``threads`` now."""
        own, mine = threads // 32, (times >= self.block) & (times < _UNDER_WAY)
        in_warp = mine & (warps == own) & (times < self.warp[own])
        return (times > _BEFORE) & ~(mine & ((times < self.barrier) | (by == threads)) | in_warp)


class Memory:
    """One allocation, in units of as many bytes as an element of ``units`` has."""

    def __init__(self, units: np.ndarray, written: bool = False, valid: bool = True) -> None:
        size = len(units)
        self.units = units
        self.valid = np.full(size, valid)
        self.write_time = np.full(size, _BEFORE if written else _NEVER, np.int32)
        self.read_time = np.full(size, _NEVER, np.int32)
        self.writer, self.reader, self.reading_warp = np.zeros((3, size), np.int16)

    def begin_launch(self) -> None:
        """Order all that happened before the launch."""
        np.minimum(self.write_time, _BEFORE, out=self.write_time)
        self.read_time[:] = _NEVER

    def allow(self, first: int, last: int, written: bool) -> None:
        """Let kernels reach units that they could not reach so far, written by the host or not yet."""
        new = np.flatnonzero(~self.valid[first:last]) + first
        self.valid[new] = True
        self.write_time[new] = _BEFORE if written else _NEVER

    def load(self, at: np.ndarray, threads: np.ndarray, order: Order) -> np.ndarray:
        self._follow_write(at, threads, order, "reads")
        times = self.write_time[at]
        if (times == _NEVER).any():
            raise Fault(int(threads[(times == _NEVER).any(1)][0]), "reads what nothing wrote")
        threads = np.broadcast_to(threads[:, None], at.shape)
        before, reader, warp = self.read_time[at], threads.copy(), threads // 32
        if (before > _BEFORE).any():
            others = (before > _BEFORE) & (before < order.block)
            recent = before >= order.barrier
            reader[recent & (self.reader[at] != threads)] = _SEVERAL
            warp = np.where(recent & (self.reading_warp[at] != warp), _SEVERAL, warp)
        else:
            others = None
        self.read_time[at], self.reader[at], self.reading_warp[at] = order.now, reader, warp
        # Several threads may read a unit at once, and the last one is noted.
        self.reader[at[self.reader[at] != reader]] = _SEVERAL
        self.reading_warp[at[self.reading_warp[at] != warp]] = _SEVERAL
        if others is not None:
            self.read_time[at[others | (before == _SEVERAL_BLOCKS)]] = _SEVERAL_BLOCKS
        return self.units[at]

    def store(self, at: np.ndarray, threads: np.ndarray, order: Order, values: np.ndarray) -> None:
        self._follow_write(at, threads, order, "writes")
        self._follow_read(at, threads, order)
        self._note_write(at, threads, order.now)
        self.units[at] = values

    def begin_copy(self, at: np.ndarray, threads: np.ndarray, order: Order) -> None:
        """A write of these units that may happen from now on until :meth:`end_copy`."""
        self._follow_write(at, threads, order, "copies onto")
        self._follow_read(at, threads, order)
        self._note_write(at, threads, _UNDER_WAY)

    def end_copy(self, at: np.ndarray, threads: np.ndarray, order: Order, values: np.ndarray) -> None:
        self.units[at] = values
        self._note_write(at, threads, order.now)

    def _note_write(self, at: np.ndarray, threads: np.ndarray, time: int) -> None:
        self.write_time[at], self.writer[at] = time, threads[:, None]
        twice = (self.writer[at] != threads[:, None]).any(1)
        if twice.any():
            raise Fault(int(threads[twice][0]), "writes what another thread writes at once")

    def _follow_write(self, at: np.ndarray, threads: np.ndarray, order: Order, what: str) -> None:
        times = self.write_time[at]
        latest = times.max()
        if latest <= _BEFORE:
            return
        if latest == _UNDER_WAY:
            raise Fault(int(threads[(times == _UNDER_WAY).any(1)][0]), f"{what} bytes whose copy is not waited for")
        writer = self.writer[at]
        wrong = order.conflicts(times, writer, writer // 32, threads[:, None])
        if wrong.any():
            row, unit = np.argwhere(wrong)[0]
            raise _conflict(threads[row], what, writer[row, unit], "wrote", times[row, unit], order)

    def _follow_read(self, at: np.ndarray, threads: np.ndarray, order: Order) -> None:
        times = self.read_time[at]
        if times.max() <= _BEFORE:
            return
        reader = self.reader[at]
        wrong = order.conflicts(times, reader, self.reading_warp[at], threads[:, None])
        if wrong.any():
            row, unit = np.argwhere(wrong)[0]
            raise _conflict(threads[row], "writes", reader[row, unit], "read", times[row, unit], order)


def _conflict(thread: int, what: str, by: int, did: str, time: int, order: Order) -> Fault:
    if time < order.block or time == _SEVERAL_BLOCKS:
        return Fault(int(thread), f"{what} what another block {did}")
    who = "another thread" if by == _SEVERAL else f"thread {by}"
    return Fault(int(thread), f"{what} what {who} {did}, without a barrier between")


class Space:
    """Allocations under their addresses."""

    def __init__(self, unit: np.dtype, order: Order) -> None:
        self.unit, self.order = np.dtype(unit), order
        self.starts, self.memories = np.zeros(0, np.int64), list[Memory]()

    def add(self, start: int, memory: Memory) -> None:
        index = int(np.searchsorted(self.starts, start))
        self.starts = np.insert(self.starts, index, start)
        self.memories.insert(index, memory)

    def _parts(
        self, addresses: np.ndarray, threads: np.ndarray, size: int
    ) -> list[tuple[Memory, np.ndarray | slice, np.ndarray]]:
        """The memories that the addresses lie in, whose they are and the units there, ``size`` bytes for each."""
        unit = self.unit.itemsize
        if (addresses % size).any():
            bad = int(np.flatnonzero(addresses % size)[0])
            raise Fault(int(threads[bad]), f"{size} bytes at {int(addresses[bad]):#x}, which is not a multiple of that")
        which = np.searchsorted(self.starts, addresses, "right") - 1
        parts = []
        for index in [which[0]] if (which == which[0]).all() else np.unique(which):
            mine = slice(None) if (which == which[0]).all() else np.flatnonzero(which == index)
            memory, start = self.memories[max(index, 0)], self.starts[max(index, 0)]
            units = (addresses[mine] - start)[:, None] // unit + np.arange(size // unit)
            ends, last = units[:, [0, -1]], len(memory.units) - 1
            outside = (ends < 0) | (ends > last) | ~memory.valid[np.clip(ends, 0, last)]
            if outside.any():
                bad = np.flatnonzero(outside.any(1))[0]
                raise Fault(
                    int(threads[mine][bad]), f"{size} bytes at {int(addresses[mine][bad]):#x} are outside of all memory"
                )
            parts.append((memory, mine, units))
        return parts

    def load(self, addresses: np.ndarray, threads: np.ndarray, size: int) -> np.ndarray:
        """Return ``size`` bytes at each address, (addresses, units)."""
        values = np.empty((len(addresses), size // self.unit.itemsize), self.unit)
        for memory, mine, units in self._parts(addresses, threads, size):
            values[mine] = memory.load(units, threads[mine], self.order)
        return values

    def store(self, addresses: np.ndarray, threads: np.ndarray, values: np.ndarray) -> None:
        for memory, mine, units in self._parts(addresses, threads, values.shape[1] * self.unit.itemsize):
            memory.store(units, threads[mine], self.order, values[mine])

    def begin_copy(self, addresses: np.ndarray, threads: np.ndarray, size: int) -> None:
        for memory, mine, units in self._parts(addresses, threads, size):
            memory.begin_copy(units, threads[mine], self.order)

    def end_copy(self, addresses: np.ndarray, threads: np.ndarray, values: np.ndarray) -> None:
        if len(threads) > 0:
            for memory, mine, units in self._parts(addresses, threads, values.shape[1] * self.unit.itemsize):
                memory.end_copy(units, threads[mine], self.order, values[mine])
