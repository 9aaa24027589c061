"""One rank's rows of a store in a file: read, write, save and restore them. Rows are kept before they change."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import torch
from torch import Tensor

from ..base import files
from ..parallel.ranks import Ranks
from . import folder as folders
from .columns import Tensors, some_rows
from .journal import SEAL, Journal, all_whole, damaged, journals, undo, undoing
from .lock import locked_rows
from .records import Records, StoreError

_ROWS_AT_ONCE = 1 << 14
_SMALL = 1 << 30
"""Size on disk up to which all markers of a file are read within one or two seconds."""


class FileRows:
    """The rows of one shard in the file of a store.

    Opening is a collective. A missing store is made, with no row touched. An existing store has the rows of some run:
    call :meth:`go_back` first. If no checkpoint of that run was saved, the store begins anew.

    Args:
        folder: the store's folder, on a file system that all ranks see.
        wanted: the layout that the store must have, or gets.
        first: first row of this shard.
        count: rows of this shard.
        ranks: the ranks that share the store.

    Raises:
        StoreError: if the store is in use, damaged, or of other rows.
    """

    def __init__(self, folder: Path, wanted: folders.Layout, first: int, count: int, ranks: Ranks) -> None:
        self.folder, self.columns, self.first, self.count, self._ranks = folder, wanted.columns, first, count, ranks
        self._guard = threading.Lock()  # of the journal: two threads read rows that will change
        self._journal: Journal | None = None
        self._begun = self._has_made_folder = self._has_made_store = False
        self._opened = contextlib.ExitStack()
        try:
            self._open(wanted)
        except BaseException:
            self.discard()
            raise

    def _open(self, wanted: folders.Layout) -> None:
        """Open the store, and make it if it is missing. A collective."""
        folder, ranks, first, last = self.folder, self._ranks, self.first, self.first + self.count
        with ranks.together("center_storage"):
            if ranks.rank == 0:
                self._has_made_folder = folders.make_folder(folder)
        with ranks.together("center_storage"):
            self._opened.enter_context(locked_rows(folder, first, last))
        with ranks.together("center_storage"):
            if ranks.rank == 0 and not folders.has_store(folder):
                self._has_made_store = True
                folders.make(folder, wanted)
        with ranks.together("center_storage"):
            self.layout = folders.layout_of(folder)
            if self.layout != wanted:
                raise StoreError(f"{folder} holds {self.layout.describe()}; this head has {wanted.describe()}")
            self._records = Records(folder / folders.ROWS, wanted.columns, wanted.num_rows, wanted.seed)
            self._opened.callback(self._records.close)
        self._begin_journal()
        found = ranks.on_first(lambda: (folders.states(folder), folders.is_announced(folder)))
        if found == ([], False):
            self.go_back(min(journals(folder)))
        elif found == ([], True):
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Make all rows untouched, as a change that the journal undoes. A collective.

        A process that was killed while it wrote the first checkpoint may have finished it or not. If that checkpoint is
        loaded, its state is still there; otherwise this is a new run.
        """
        self._begun = True
        since = {number: paths for number, paths in journals(self.folder).items() if number < self._current.number}
        with self._ranks.together("center_storage"):
            for batch in undoing(since, self.columns, self.first, self.first + self.count):
                for some in batch.untouched.split(_ROWS_AT_ONCE):
                    self.read(some - self.first, self.columns.empty(len(some)), keep=True)
                    self._current.sync()
                    self._records.clear(some)

    def _begin_journal(self) -> None:
        """Keep rows in a new journal from now on, of the same number on every rank. A collective."""
        number = 1 + max(self._ranks.gather_objects(max(journals(self.folder), default=0)))
        with self._ranks.together("center_storage"):
            new = Journal(self.folder, number, self.first, self.first + self.count, self.columns)
            files.sync_directory(self.folder)
        if self._journal is not None:
            self._journal.close()
        self._journal = new

    @property
    def _current(self) -> Journal:
        if self._journal is None:
            raise StoreError(f"{self.folder} has been closed")
        return self._journal

    def check_begun(self) -> None:
        """Raise StoreError if the rows are those of a run whose checkpoint has not been loaded."""
        if not self._begun:
            raise StoreError(
                f"{self.folder} holds the class centers of a run that has saved checkpoints: load one of them with "
                "fused_arcface.checkpoint.load first, or name another folder"
            )

    def read(self, rows: Tensor, out: Tensors, keep: bool) -> None:
        """Fill ``out`` with rows (K,) int64 of this shard, ascending.

        Args:
            rows: indices into this shard.
            out: K rows.
            keep: If true, the rows are about to change: put those that have not been kept since the last checkpoint
                into the journal, and make room in the file for rows that were never touched.

        Raises:
            StoreError: if the file cannot be read, or the disk is full. No row has changed.
        """
        self.check_begun()
        numbers, journal = rows + self.first, self._current
        markers = self._records.read(numbers, out)
        untouched = self._records.fill_untouched(numbers, markers, out)
        if not keep:
            return
        with self._guard:
            kept = ((markers != journal.number) & (markers != 0)).nonzero().squeeze(1)
            journal.add(numbers[kept], markers[kept], some_rows(out, kept), numbers[untouched])
            if len(untouched) > 0:  # unchanged, to take the room: writing them again needs no more
                self._records.write(numbers[untouched], some_rows(out, untouched), journal.number)

    def write(self, rows: Tensor, tensors: Tensors) -> None:
        """Write rows (K,) of this shard that :meth:`read` has kept.

        Raises:
            StoreError: if the disk fails. Then some of the rows may have been written.
        """
        journal = self._current
        with self._guard:
            journal.sync()  # on disk before its rows change: the machine may go down
        self._records.write(rows + self.first, tensors, journal.number)

    def load(self, first: int, tensors: Tensors) -> None:
        """Replace rows ``first, first + 1, ...`` of this shard, as a change that the journal undoes."""
        rows = torch.arange(first, first + len(tensors["weight"]))
        self.read(rows, self.columns.empty(len(rows)), keep=True)
        self.write(rows, tensors)

    def save(self) -> int:
        """Put all changes on disk and return the number of this state, for a checkpoint to name. A collective."""
        self.check_begun()
        with self._ranks.together("center_storage"), self._guard:
            self._current.seal()
            self._current.sync()
            self._records.sync()
        self._begin_journal()
        self._ranks.on_first(lambda: folders.announce(self.folder))
        return self._current.number

    def saved(self, state: int, keep: int) -> None:
        """Remember a state that a checkpoint on disk names, and forget all but ``keep`` of them. A collective."""
        self._ranks.on_first(lambda: self._forget(state, keep))

    def _forget(self, state: int, keep: int) -> None:
        kept = [*(each for each in folders.states(self.folder) if each != state), state][-max(1, keep) :]
        folders.remember(self.folder, kept)
        for number, paths in journals(self.folder).items():
            if number < kept[0]:
                for path in paths:
                    path.unlink()

    def go_back(self, state: int) -> None:
        """Bring all rows back to a state. A collective. If the process dies meanwhile, call it again.

        Raises:
            StoreError: if the store has not kept the state. Nothing has changed.
        """
        with self._ranks.together("center_storage"):
            folders.check_state(self.folder, state)
        self._begin_journal()
        number = self._current.number
        since = {each: paths for each, paths in journals(self.folder).items() if state <= each < number}
        with self._ranks.together("center_storage"):
            undo(self._records, since, self.first, self.first + self.count)
            self._check_undone(state, since)
            self._records.sync()
        self._ranks.on_first(lambda: self._drop(state, since))
        self._begun = True

    def _check_undone(self, state: int, since: dict[int, list[Path]]) -> None:
        """Raise StoreError if a row of this shard is newer than a state whose journals have been undone.

        The markers of all rows are read if a journal is damaged or the file is small.
        """
        if self._records.bytes_on_disk > _SMALL and all_whole(since, self.columns):
            return
        newest = self._records.newest_marker(self.first, self.first + self.count)
        if newest >= state:
            raise StoreError(damaged(self.folder, newest))

    def _drop(self, state: int, since: dict[int, list[Path]]) -> None:
        """Remove journals that have been undone. The oldest stays, empty: its number is the state's."""
        for number in sorted(since, reverse=True):
            for path in since[number]:
                if number > state:
                    path.unlink()
                else:
                    files.write_bytes(path, SEAL)
        kept = [each for each in folders.states(self.folder) if each <= state]
        if kept or folders.is_announced(self.folder):
            folders.remember(self.folder, kept if kept[-1:] == [state] else [*kept, state])

    def close(self) -> None:
        """Close the files and release the lock. Opening the store again undoes the changes after the last save."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._opened.close()

    def discard(self) -> None:
        """Close the store, and remove it if this object has made it: its files, and a folder of its own."""
        with contextlib.suppress(OSError):
            if self._has_made_store:
                folders.remove(self.folder)
            if self._has_made_folder:
                self.folder.rmdir()
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_journal", None) is not None:
            self.close()
