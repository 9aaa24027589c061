"""The folder of a store: its files, the states that it can go back to, and reading one of them.

::

    store.json             columns of a row, number of rows, seed: written when the store is made
    states.json            the states that checkpoints name, from the oldest to the newest
    rows.bin               :mod:`fused_arcface.store.records`
    announced              exists while the first checkpoint is written: it names a state that states.json lacks
    journal_NUMBER.A-B     :mod:`fused_arcface.store.journal`, of rows [A, B)
    lock                   :mod:`fused_arcface.store.lock`
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..base import files
from ..base.dtypes import DTYPES
from ..base.reading import DataError, file_errors, read_bytes, said
from .columns import Column, Columns, Tensors
from .journal import damaged, journals, overlay
from .lock import LOCK, locked_rows
from .records import Records, StoreError

_FORMAT, _VERSION = "fused_arcface.store", 1
_LAYOUT, _STATES, _ANNOUNCED, ROWS = "store.json", "states.json", "announced", "rows.bin"

_MOST_BYTES = 1 << 20
"""Largest size of a file in JSON."""
_Value = TypeVar("_Value", int, str)
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Layout:
    """The facts about a store that never change."""

    columns: Columns
    num_rows: int
    """Rows over all shards."""
    seed: int
    """Seed of the initial centers."""
    identity: str = field(default="", compare=False)
    """A random text, by which a checkpoint finds its store after the folder has been moved."""

    def describe(self) -> str:
        """Return the layout for error messages."""
        columns = ", ".join(f"{name} {dtype} {width}".replace("torch.", "") for name, dtype, width in self.columns.each)
        return f"{self.num_rows} rows of {columns}, seed {self.seed}"


def make_folder(folder: Path) -> bool:
    """Make the folder of a store; return False if it is there already.

    Raises:
        StoreError: if it cannot be made.
    """
    try:
        if folder.is_dir():
            return False
        folder.mkdir(parents=True)
    except (OSError, ValueError) as error:  # no system has a name with a zero byte
        raise StoreError(f"{folder}: the store of class centers cannot be made: {error}") from error
    return True


def has_store(folder: Path) -> bool:
    """Return whether a folder holds a store, which may be damaged."""
    return os.path.lexists(folder / _LAYOUT)


def make(folder: Path, layout: Layout) -> None:
    """Make an empty store in a locked folder. It is there when its layout is, which is written last.

    Raises:
        StoreError: if it cannot be written.
    """
    try:
        Records(folder / ROWS, layout.columns, layout.num_rows, layout.seed, create=True).close()
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "identity": secrets.token_hex(16),
            "num_rows": layout.num_rows,
            "seed": layout.seed,
            "columns": [[name, str(dtype).removeprefix("torch."), width] for name, dtype, width in layout.columns.each],
        }
        files.write_text(folder / _LAYOUT, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise StoreError(f"{folder}: the store of class centers cannot be made: {error}") from error


def remove(folder: Path) -> None:
    """Remove the files of a store from its folder, which is locked. Other files stay."""
    journal_files = [path for paths in journals(folder).values() for path in paths]
    for path in (*(folder / name for name in (_LAYOUT, _STATES, _ANNOUNCED, ROWS)), *journal_files, folder / LOCK):
        path.unlink(missing_ok=True)


def layout_of(folder: Path) -> Layout:
    """Read the layout of a store.

    Raises:
        StoreError: if there is none, or it is damaged.
    """
    content = _read_json(folder / _LAYOUT)
    try:
        if content["format"] != _FORMAT or _of(int, content["version"]) != _VERSION:
            raise ValueError(f"format {content['format']} {content['version']}")
        columns = tuple(
            Column(_of(str, name), _NAMES[dtype], _of(int, width)) for name, dtype, width in content["columns"]
        )
        rows, seed, identity = _of(int, content["num_rows"]), _of(int, content["seed"]), _of(str, content["identity"])
        if columns[0].name != "weight" or min(column.width for column in columns) < 1 or rows < 1:
            raise ValueError("columns")
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise StoreError(f"{folder / _LAYOUT} is not the layout of a store of class centers: {said(error)}") from None
    return Layout(Columns(columns), rows, seed, identity)


def _of(kind: type[_Value], value: Any) -> _Value:
    """Return a value of JSON of this type."""
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} is wanted; got {value!r}")
    return value


def _read_json(path: Path) -> Any:
    try:
        with file_errors(path):
            return json.loads(read_bytes(path, _MOST_BYTES))
    except DataError as error:
        raise StoreError(str(error)) from None


def states(folder: Path) -> list[int]:
    """Return the states that checkpoints name, from the oldest to the newest; empty if none does."""
    path = folder / _STATES
    found = _read_json(path) if path.exists() else []
    if not isinstance(found, list) or not all(type(each) is int for each in found):
        raise StoreError(f"{path} must be a list of numbers")
    return found


def remember(folder: Path, found: list[int]) -> None:
    """Replace the list of states, and remove the note of :func:`announce`."""
    files.write_text(folder / _STATES, json.dumps(found) + "\n")
    (folder / _ANNOUNCED).unlink(missing_ok=True)


def announce(folder: Path) -> None:
    """Note that a checkpoint is about to name a state, if none has yet."""
    if not states(folder):
        files.write_bytes(folder / _ANNOUNCED, b"")


def is_announced(folder: Path) -> bool:
    """Return whether a checkpoint may name a state although no state is remembered."""
    return os.path.lexists(folder / _ANNOUNCED)


def check_state(folder: Path, state: int) -> None:
    """Raise StoreError unless the store can go back to a state."""
    if state not in journals(folder):
        kept = ", ".join(map(str, states(folder))) or "none"
        raise StoreError(f"{folder} has no state {state} to go back to; it has kept {kept}")


@contextlib.contextmanager
def snapshot(folder: Path, state: int, first: int, last: int) -> Iterator[Callable[[int, int], Tensors]]:
    """Open rows ``[first, last)`` of a store in a state that a checkpoint names, for reading.

    Yield a function that returns rows ``[start, stop)`` of them. The store stays as it is. The rows are locked during
    the block.

    Raises:
        StoreError: if the rows are in use, or the store has not kept the state.
    """
    layout = layout_of(folder)
    check_state(folder, state)

    def read(start: int, stop: int) -> Tensors:
        rows, out = torch.arange(start, stop), layout.columns.empty(stop - start)
        markers = records.read(rows, out)
        overlay(since, layout.columns, start, markers, out)
        if len(markers) > 0 and int(markers.max()) >= state:
            raise StoreError(damaged(folder, int(markers.max())))
        records.fill_untouched(rows, markers, out)
        return out

    with (
        locked_rows(folder, first, last),
        contextlib.closing(Records(folder / ROWS, layout.columns, layout.num_rows, layout.seed)) as records,
    ):
        since = {number: paths for number, paths in journals(folder).items() if number >= state}
        yield read
