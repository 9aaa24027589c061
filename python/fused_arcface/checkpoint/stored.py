"""Checkpoints of class centers in a file: the checkpoint names a state of the store, and the rows stay in the store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..parallel.ranks import ALONE
from ..partial_fc import PartialFC
from ..store import FileCenters, StoreError
from ..store.columns import Column, Columns
from ..store.file import FileRows
from ..store.folder import Layout, layout_of, snapshot
from .centers import Rows
from .directory import Saved
from .roots import complete
from .row_shard import RowShard, cut_rows
from .storage import CheckpointError

STORE = "store"
"""Name of the reference among a head's values."""


def file_of(head: PartialFC) -> FileCenters | None:
    """Return the store of a head whose class centers are in a file."""
    return head.center_store if isinstance(head.center_store, FileCenters) else None


def reference_to(rows: FileRows, root: str | os.PathLike[str]) -> dict[str, Any]:
    """Put the rows of a store on disk, and return the reference to this state for a checkpoint under ``root``.

    A collective.
    """
    state, folder = rows.save(), os.path.abspath(rows.folder)
    return {
        "folder": folder,
        "from_root": os.path.relpath(folder, os.path.abspath(root)),  # if both are moved together
        "identity": rows.layout.identity,
        "state": state,
    }


class Reference:
    """The reference to a state of a store that a checkpoint holds.

    Raises:
        CheckpointError: if it is damaged.
    """

    def __init__(self, saved: Saved, content: Any) -> None:
        self._saved = saved
        names = {"folder": str, "from_root": str, "identity": str, "state": int}
        if not isinstance(content, dict) or any(type(content.get(name)) is not kind for name, kind in names.items()):
            raise CheckpointError(f"{saved.directory} is damaged: the place of its class centers cannot be read")
        self.state: int = content["state"]
        self.identity: str = content["identity"]
        self._folders = [Path(content["folder"]), saved.directory.parent / content["from_root"]]

    def folder(self) -> Path:
        """Return the folder of the store.

        Raises:
            CheckpointError: if the store is not where it was.
        """
        for folder in self._folders:
            with contextlib.suppress(StoreError):
                if layout_of(folder).identity == self.identity:
                    return folder
        raise CheckpointError(
            f"{self._saved.directory}: its class centers are in a store that is no longer in {self._folders[0]}: put "
            "it back, or name its place as center_storage"
        )


def reference_of(saved: Saved, values: dict[str, Any]) -> Reference | None:
    """Return a checkpoint's reference to a store, None if it holds the class centers itself."""
    return Reference(saved, values[STORE]) if STORE in values else None


@contextlib.contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise CheckpointError(str(error)) from error


@_as_checkpoint_error()
def load_rows(head: PartialFC, reference: Reference | None, saved: Saved, keys: list[str], zeros: bool) -> None:
    """Load class centers from a store, into a store, or both. A collective.

    If the checkpoint names the head's own store, this goes back to the state. Otherwise the rows are copied in pieces.
    ``keys`` are the names of the tensors that the checkpoint holds for the head. If ``zeros`` is true, the momentum
    becomes zero.
    """
    own, count, columns = file_of(head), head.weight.shape[0], Columns.of(head._held())
    if own is not None and reference is not None and own.rows.layout.identity == reference.identity:
        own.drain()
        own.rows.go_back(reference.state)
        return
    if reference is not None:
        with head.ranks.together("checkpoint.load"):
            folder, first = reference.folder(), head.row_start
            stored = layout_of(folder).columns
            if stored != columns:
                rule = f"{columns}; this checkpoint's store has {stored}"
                raise CheckpointError(f"{saved.directory}: the head must have {rule}")
            with snapshot(folder, reference.state, first, first + count) as read:
                for start, stop in columns.pieces(0, count):
                    _put(head, start, read(first + start, first + stop))
        return
    # Reading is a collective: each rank takes as many steps as the largest shard needs.
    for start, stop in columns.pieces(0, max(head.row_counts())):
        begin = min(start, count)
        tensors = columns.empty(min(stop, count) - begin)
        if zeros:
            for name in tensors.keys() - {"weight"}:
                tensors[name].zero_()
        shards = {key: RowShard(tensors[key.partition(".")[2]], head.row_start + begin, head.num_rows) for key in keys}
        saved.read(shards, head.ranks)
        with head.ranks.together("checkpoint.load"):
            _put(head, begin, tensors)


@torch.no_grad()
def _put(head: PartialFC, start: int, tensors: dict[str, Tensor]) -> None:
    """Set rows ``start, start + 1, ...`` of a shard."""
    own = file_of(head)
    if len(tensors["weight"]) == 0:
        return
    if own is not None:
        own.rows.load(start, tensors)
        return
    for name, tensor in head._held().items():
        tensor[start : start + len(tensors[name])] = tensors[name].to(tensor.device)


def rows_of(reference: Reference) -> dict[str, Rows]:
    """Return the columns of a store's state. The store is open only while a piece is read."""
    layout = layout_of(reference.folder())

    def pieces(name: str) -> Iterator[Tensor]:
        for start, stop in layout.columns.pieces(0, layout.num_rows):
            with _as_checkpoint_error(), snapshot(reference.folder(), reference.state, 0, layout.num_rows) as read:
                piece = read(start, stop)[name]
            yield piece

    return {
        column.name: Rows(column.dtype, (layout.num_rows, column.width), partial(pieces, column.name))
        for column in layout.columns.each
    }


@contextlib.contextmanager
def new_store(folder: Path, tensors: dict[str, Rows], seed: int, root: Path) -> Iterator[dict[str, Any]]:
    """Make a store of all rows in a new or empty folder, and yield its reference; see ``convert``.

    The head has ``seed``. The block writes the checkpoint, which lies in ``root``. If something fails before that is
    written, the folder is as it was.

    Raises:
        CheckpointError: if it cannot be written, or something is in the folder.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"center_storage must be a new or an empty folder; got {folder}")
    columns = Columns(tuple(Column(name, each.dtype, each.shape[1]) for name, each in tensors.items()))
    num_rows, before = tensors["weight"].shape[0], complete(root)
    layout = Layout(columns, num_rows, seed)
    with _as_checkpoint_error(), contextlib.closing(FileRows(folder, layout, 0, num_rows, ALONE)) as rows:
        try:
            pieces = columns.pieces(0, num_rows)
            streams = [cut_rows(each, [stop - start for start, stop in pieces]) for each in tensors.values()]
            for (start, _), *parts in zip(pieces, *streams, strict=True):
                rows.load(start, dict(zip(tensors, parts, strict=True)))
            reference = reference_to(rows, root)
            yield reference
        except BaseException:
            if complete(root) == before:  # else a checkpoint may name the store: its last sync has failed
                rows.discard()
            raise
        rows.saved(reference["state"], keep=1)
