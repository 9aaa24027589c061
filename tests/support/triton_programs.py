"""The programs of one launch in Triton's interpreter: the memory that each touches, and the order in which they run.

The interpreter runs one program after the other. On a GPU they run side by side, in any order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter


class _Touched:
    """The addresses that the programs of a launch read or wrote, and the program of each."""

    def __init__(self) -> None:
        self.addresses: list[np.ndarray] = []
        self.programs: list[np.ndarray] = []

    def add(self, pointers: Any, mask: Any, program: int) -> None:
        used = np.asarray(pointers.data)[np.asarray(mask.data).astype(bool)].ravel().astype(np.uint64)
        self.addresses.append(used)
        self.programs.append(np.full(len(used), program))

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the addresses (K,) uint64, and the program (K,) of each."""
        if not self.addresses:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        return np.concatenate(self.addresses), np.concatenate(self.programs)


def _conflict(reads: _Touched, writes: _Touched) -> str | None:
    """Name the kind of conflict between programs, or return None."""
    written, writers = writes.all()
    if len(written) == 0:
        return None
    order = np.argsort(written, kind="stable")
    written, writers = written[order], writers[order]
    if ((written[1:] == written[:-1]) & (writers[1:] != writers[:-1])).any():
        return "two programs write the same memory"
    read, readers = reads.all()
    near = (read >= written[0]) & (read <= written[-1])
    read, readers = read[near], readers[near]
    place = np.searchsorted(written, read)
    if ((written[place] == read) & (writers[place] != readers)).any():
        return "a program reads what another one writes"
    return None


def forbid_races(patch: pytest.MonkeyPatch) -> None:
    """Make a launch an AssertionError if two of its programs touch the same memory and one of them writes it."""
    builder = type(interpreter.interpreter_builder)
    load, store, set_index = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    run = interpreter.GridExecutor.__call__
    program, reads, writes = 0, _Touched(), _Touched()

    def set_program(self: Any, x: int, y: int, z: int) -> None:
        nonlocal program
        program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        set_index(self, x, y, z)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        reads.add(pointers, mask, program)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        writes.add(pointers, mask, program)
        return store(self, pointers, value, mask, *rest)

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal reads, writes
        reads, writes = _Touched(), _Touched()
        result = run(self, *arguments, **options)
        conflict = _conflict(reads, writes)
        assert conflict is None, f"{self.fn.__name__}: {conflict}"
        return result

    patch.setattr(builder, "set_grid_idx", set_program)
    patch.setattr(builder, "create_masked_load", checked_load)
    patch.setattr(builder, "create_masked_store", checked_store)
    patch.setattr(interpreter.GridExecutor, "__call__", launch)


def forbid_reads(patch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Make it an AssertionError if a program reads an address from ``first`` on and before ``last``."""
    builder = type(interpreter.interpreter_builder)
    load = builder.create_masked_load

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        used = np.asarray(pointers.data)[np.asarray(mask.data).astype(bool)].astype(np.uint64)
        assert not ((used >= first) & (used < last)).any(), "a program reads memory that it must not touch"
        return load(self, pointers, mask, *rest)

    patch.setattr(builder, "create_masked_load", checked_load)


def reverse(patch: pytest.MonkeyPatch) -> None:
    """Make each launch run its last program first."""
    builder = type(interpreter.interpreter_builder)
    set_index = builder.set_grid_idx

    def set_reversed(self: Any, *index: int) -> None:
        set_index(self, *(size - 1 - each for size, each in zip(self.grid_dim, index, strict=True)))

    patch.setattr(builder, "set_grid_idx", set_reversed)
