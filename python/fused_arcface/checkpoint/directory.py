"""Write and open checkpoints on disk: the content comes from ``fused_arcface.checkpoint``, the names from ``roots``."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ..base.reading import check_regular
from ..parallel.ranks import ALONE, Ranks
from . import manifest, storage, version1
from .manifest import boundary
from .roots import before, has_checkpoint, latest, publish, settle, unfinished
from .storage import METADATA, CheckpointError
from .structure import to_json


@dataclass(frozen=True)
class Saved:
    """A checkpoint in a directory, with a manifest and a table of tensors that are whole."""

    directory: Path
    head: dict[str, Any]
    """Options of the head."""
    reader: storage.TensorReader

    @property
    def tensors(self) -> dict[str, Any]:
        """Size, dtype and parts of each stored tensor, by key."""
        return self.reader.metadata.state_dict_metadata

    @property
    def names(self) -> set[str]:
        """Names of the objects and values that were saved."""
        return self.reader.names

    def value(self, name: str) -> Any:
        """Return the structure of one object, with keys in the places of its tensors.

        Raises:
            CheckpointError: if there is none, or it needs trust.
        """
        if name not in self.names:
            raise CheckpointError(f"{self.directory} has no {name}")
        with boundary(self.directory, name):
            return self.reader.value(name)

    def read(self, tensors: dict[str, Any], ranks: Ranks = ALONE) -> None:
        """Fill tensors in place, by key; a collective.

        Raises:
            CheckpointError: if they are not there, are of another size, or are damaged, on any rank. Some of the
                tensors may have been filled.
        """
        try:
            with _one_error(f"{self.directory} cannot be read"), torch.no_grad():
                dcp_load(
                    tensors,
                    storage_reader=self.reader,
                    planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=ranks.group,
                    no_dist=ranks.world_size == 1,
                )
        except CheckpointError as error:  # on all ranks alike
            raise CheckpointError(f"{error}{ranks.on_first(lambda: way_back(self.directory))}") from error


def write(
    root: Path,
    tensors: dict[str, Any],
    values: dict[str, Any],
    options: dict[str, Any],
    step: int,
    ranks: Ranks,
    keep: int,
) -> Path:
    """Write the newest checkpoint under ``root``; a collective.

    Args:
        root: directory of the checkpoints; made if missing.
        tensors: by key; sharded ones are stored in their parts, all others as the first rank has them.
        values: by name, the structures to store beside the tensors, as the first rank has them.
        options: the head's options, for the manifest.
        step: names the directory.
        ranks: the ranks that write together.
        keep: number of checkpoints, of the highest steps, that stay.

    Returns:
        Its directory, when that is complete and on disk.

    Raises:
        CheckpointError: if it cannot be written. The checkpoints before it are unchanged, and nothing of it is left.
        TypeError: if a structure holds a value of another kind than JSON can take.
    """

    def begin() -> tuple[dict[str, Any], Path]:
        texts = {name: to_json(value, name) for name, value in values.items()}
        return texts, first_rank.enter_context(unfinished(root, step))

    def end() -> Path:
        manifest.write(partial, step, options, written)
        final = publish(partial)
        settle(final, keep)
        return final

    problem = f"{root}: the checkpoint of step {step} cannot be written"
    try:
        with contextlib.ExitStack() as first_rank:
            texts, partial = ranks.on_first(begin)
            writer = storage.Writer(partial, ranks.rank, texts)
            with _one_error(problem):
                dcp_save(
                    tensors,
                    storage_writer=writer,
                    # Without this a tensor that all ranks have is stored as some rank has it, each another's.
                    planner=DefaultSavePlanner(
                        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
                    ),
                    process_group=ranks.group,
                    no_dist=ranks.world_size == 1,
                )
            written = {name: record for each in ranks.gather_objects(writer.files) for name, record in each.items()}
            return ranks.on_first(end)
    except OSError as error:
        raise CheckpointError(f"{problem}: {error}") from error


def find(path: str | os.PathLike[str], *, ranks: Ranks = ALONE, trust: bool = False) -> Saved:
    """Open the checkpoint at ``path``, or the newest under it if it is a root; a collective.

    Args:
        path: a root (its newest checkpoint is taken) or one checkpoint's directory.
        ranks: the first of them chooses, so that all take the same.
        trust: run the code that a checkpoint of format 1 may hold.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is not one of this package, of a later version of it, damaged, or needs trust.
    """

    def choose() -> Path:
        directory = Path(path) if has_checkpoint(Path(path)) else latest(path)
        if directory is None:
            raise FileNotFoundError(f"no checkpoint in {path}")
        try:
            _open(directory, trust)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{way_back(directory)}") from error
        return directory

    directory = ranks.on_first(choose)
    with ranks.together("checkpoint.load"):
        return _open(directory, trust)


def _open(directory: Path, trust: bool) -> Saved:
    listed = manifest.read(directory)
    for name, record in listed.files.items():
        file, size = directory / name, record.size
        with boundary(directory, manifest.NAME):  # it may have a name that no file has
            actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            if file.exists():
                with boundary(directory, name):
                    check_regular(file)  # it may be a Git LFS pointer, or a pipe
            got = "missing" if actual is None else f"{actual} bytes long"
            raise CheckpointError(f"{directory} is truncated: {name} must have {size} bytes; it is {got}")
    with boundary(directory, METADATA):
        if listed.version == 1:
            return Saved(directory, listed.head, version1.Reader(directory, listed.files, trust))
        return Saved(directory, listed.head, storage.Reader(directory, listed.files, listed.block))


def way_back(directory: Path) -> str:
    """Return a sentence that says which checkpoint before a damaged one is whole, and how to use it."""
    for path in reversed(before(directory)):
        try:
            with boundary(path, "it"):
                _open(path, trust=False).reader.check()
        except CheckpointError:
            continue
        return f". {path}, saved before it, is whole: to go on from that one, remove {directory}"
    return f". No whole checkpoint before it is left in {directory.parent}"


@contextlib.contextmanager
def _one_error(problem: str) -> Iterator[None]:
    """Run a block of torch.distributed.checkpoint. If it fails, raise the error of the first rank that failed.

    Raises:
        KeyboardInterrupt: if Ctrl-C ended the work on some rank: torch wraps it as it does any error.
        CheckpointError: for any other error, which has ``problem`` in front if it is not one itself.
    """
    try:
        with warnings.catch_warnings():  # of torch: it works in one process, and under an old name
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    except CheckpointException as error:
        if any(isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
            raise KeyboardInterrupt from None
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, CheckpointError):
            raise CheckpointError(str(cause)) from error
        raise CheckpointError(f"{problem}: {cause}" + (f" (on rank {rank})" if rank else "")) from error
