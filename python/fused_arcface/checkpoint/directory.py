"""Checkpoints on disk: each is a directory that is complete, or is not there, and names its step.

:mod:`fused_arcface.checkpoint` decides on the content.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ..base import files
from ..base.reading import check_regular
from ..parallel.ranks import ALONE, Ranks
from . import manifest, storage, version1
from .manifest import STEP_NAME, boundary
from .storage import BLOCK, METADATA, CheckpointError, FileRecord

_LATEST, _PARTIAL = "latest", ".partial-"
_UNFINISHED = re.compile(r"\.partial-step_\d+(\.\d+)?")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that lies in a directory: its manifest and table of tensors are whole."""

    directory: Path
    head: dict[str, Any]
    """Options of the head."""
    reader: storage.TensorReader | version1.TrustedReader

    @property
    def tensors(self) -> dict[str, Any]:
        """Size, dtype and parts of each stored tensor, by key."""
        return {key: each for key, each in self.reader.metadata.state_dict_metadata.items() if hasattr(each, "chunks")}

    @property
    def names(self) -> set[str]:
        """Names of the objects and values that were saved."""
        return self.reader.names

    def value(self, name: str) -> Any:
        """Return the structure of one object, with the keys of its tensors in their places.

        Raises:
            CheckpointError: if there is none, or it needs trust.
        """
        if name not in self.names:
            raise CheckpointError(f"{self.directory} has no {name}")
        with boundary(self.directory, name), _quiet():
            return self.reader.value(name)

    def read(self, tensors: dict[str, Any], ranks: Ranks = ALONE) -> None:
        """Fill tensors in place, by key; a collective.

        Raises:
            CheckpointError: if they are not there, are of another size, or are damaged, on any rank. Some of the
                tensors may have been filled.
        """
        try:
            with _quiet(), torch.no_grad():
                dcp_load(
                    tensors,
                    storage_reader=self.reader,
                    planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=ranks.group,
                    no_dist=ranks.world_size == 1,
                )
        except CheckpointException as error:  # a BaseException of torch's, on all ranks alike
            _raise_interrupt(error)
            problem = _describe(error, f"{self.directory} cannot be read")
            raise CheckpointError(problem + on_first(ranks, lambda: way_back(self.directory))) from error


def write(
    root: Path,
    tensors: dict[str, Any],
    values: Callable[[], dict[str, Any]],
    options: dict[str, Any],
    step: int,
    ranks: Ranks,
    keep: int,
) -> Path:
    """Write the newest checkpoint under ``root``; a collective.

    Args:
        root: directory of the checkpoints; made if missing.
        tensors: by key; sharded ones in their parts, all others as the first rank has them.
        values: makes the JSON to store beside them; called on the first rank.
        options: the head's options, for the manifest.
        step: names the directory.
        ranks: the ranks that write together.
        keep: number of checkpoints, of the highest steps, that stay.

    Returns:
        Its directory, when that is complete and on disk.

    Raises:
        CheckpointError: if it cannot be written. Those before it are as they were, and nothing of it is left.
        TypeError: if ``values`` refuses a value.
    """
    done = False
    try:
        partial, final, texts = on_first(ranks, lambda: _begin(root, step, values))
        writer = storage.Writer(partial, ranks.rank, texts)
        with _quiet():
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
        on_first(ranks, lambda: _publish(partial, final, written, options, step, keep))
        done = True
    except CheckpointException as error:
        _raise_interrupt(error)
        raise CheckpointError(_describe(error, f"{root}: the checkpoint of step {step} cannot be written")) from error
    except OSError as error:
        raise CheckpointError(f"{root}: the checkpoint of step {step} cannot be written: {error}") from error
    finally:
        if not done and ranks.rank == 0:
            with contextlib.suppress(OSError):
                remove_unfinished(root)
    return final


def on_first(ranks: Ranks, function: Callable[[], _Result]) -> _Result:
    """Return on every rank what ``function`` returns on the first, or raise what it raises there; a collective."""
    outcome: Any = None
    if ranks.rank == 0:
        try:
            outcome = (function(), None)
        except Exception as error:
            if ranks.world_size == 1:
                raise
            outcome = (None, error)
    result, failure = ranks.gather_objects(outcome)[0]
    if failure is not None:
        raise failure
    return result


def _begin(root: Path, step: int, values: Callable[[], dict[str, Any]]) -> tuple[Path, Path, dict[str, Any]]:
    """Make the directory to write into; returns it, its later name and the values."""
    texts = values()
    root.mkdir(parents=True, exist_ok=True)
    remove_unfinished(root)  # there may be room for this checkpoint only without it
    name = f"step_{step:010d}"
    taken = [_order(path) for path in root.iterdir() if _order(path)[0] == step]
    if taken:
        name += f".{max(taken)[1] + 1}"
    partial = root / (_PARTIAL + name)
    partial.mkdir()
    return partial, root / name, texts


def _publish(
    partial: Path, final: Path, written: dict[str, FileRecord], options: dict[str, Any], step: int, keep: int
) -> None:
    """Make a completely written directory the newest checkpoint: on disk first, then by one rename."""
    manifest.write(partial, step, options, written)
    partial.rename(final)
    files.sync_directory(final.parent)
    _name_latest(final)
    ours = [path for path in _complete(final.parent) if path != final and _is_ours(path)]
    _remove(ours[: max(0, len(ours) + 1 - keep)])


def _name_latest(directory: Path) -> None:
    """Write the newest checkpoint's name beside it, for people and other programs: nothing here reads it."""
    name = directory.parent / _LATEST
    if name.is_file() or not name.exists():
        with contextlib.suppress(OSError):
            files.write_text(name, directory.name)


def _remove(checkpoints: list[Path]) -> None:
    """Remove checkpoints of this package; one that cannot be removed is a warning."""
    for old in checkpoints:
        try:
            # Half a checkpoint must not look like a whole one, if this process dies here.
            gone = old.rename(old.with_name(_PARTIAL + old.name))
            shutil.rmtree(gone)
        except OSError as error:
            warnings.warn(f"{old} is no longer needed, and cannot be removed: {error}", stacklevel=2)


def keep_alone(directory: Path, root: Path) -> Path:
    """Keep a complete checkpoint under another root as well, in place of the checkpoints there; return its new place.

    Its files are linked, which takes no room, or copied where the file system has no links. Called by one process.

    Raises:
        OSError: if it cannot be written. Those in ``root`` are as they were.
    """
    root.mkdir(parents=True, exist_ok=True)
    remove_unfinished(root)
    step = _order(directory)[0]
    of_step = [path for path in _complete(root) if _order(path)[0] == step]
    content = (directory / manifest.NAME).read_bytes()  # it has checksums of all else
    target = next((path for path in of_step if (path / manifest.NAME).read_bytes() == content), None)
    if target is None:
        number = f".{_order(of_step[-1])[1] + 1}" if of_step else ""
        target = root / f"step_{step:010d}{number}"
        partial = root / (_PARTIAL + target.name)
        partial.mkdir()
        try:
            for file in directory.iterdir():
                _link(file, partial / file.name)
            files.sync_directory(partial)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        files.sync_directory(root)
    _name_latest(target)
    _remove([path for path in _complete(root) if path != target and _is_ours(path)])
    return target


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:
        with files.replacing(target) as copy, file.open("rb") as content:
            shutil.copyfileobj(content, copy, BLOCK)


def remove_unfinished(root: Path) -> None:
    """Remove checkpoints that were being written or removed when a process died.

    Nobody else may be writing under ``root``.
    """
    for path in root.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _order(path: Path) -> tuple[int, int]:
    """Return step and number of a checkpoint's name, (-1, -1) for any other name."""
    match = STEP_NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, -1)


def _complete(root: Path) -> list[Path]:
    """Return the checkpoints under ``root`` from the oldest to the newest: exact names, with what only they hold."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((path for path in found if _has_checkpoint(path)), key=_order)


def _has_checkpoint(path: Path) -> bool:
    return (path / manifest.NAME).exists() or (path / METADATA).exists()


def _is_ours(path: Path) -> bool:
    """Return whether a directory may be removed: it has this package's manifest, and is no link to another place."""
    try:
        return not path.is_symlink() and bool(manifest.read_content(path))
    except CheckpointError:
        return False


def latest(root: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint of the highest step under ``root``, None if there is none yet."""
    found = _complete(Path(root))
    return found[-1] if found else None


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
        directory = Path(path) if _has_checkpoint(Path(path)) else latest(path)
        if directory is None:
            raise FileNotFoundError(f"no checkpoint in {path}")
        try:
            _open(directory, trust)
        except version1.NeedsTrust:
            raise
        except CheckpointError as error:
            raise CheckpointError(f"{error}{way_back(directory)}") from error
        return directory

    directory = on_first(ranks, choose)
    with ranks.together("checkpoint.load"):
        return _open(directory, trust)


def _open(directory: Path, trust: bool) -> Saved:
    listed = manifest.read(directory)
    for name, size in listed.sizes.items():
        file = directory / name
        with boundary(directory, manifest.NAME):  # it may have a name that no file has
            actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            if file.exists():
                with boundary(directory, name):
                    check_regular(file)  # it may be a Git LFS pointer, or a pipe
            got = "missing" if actual is None else f"{actual} bytes long"
            raise CheckpointError(f"{directory} is truncated: {name} must have {size} bytes; it is {got}")
    with boundary(directory, METADATA):
        if listed.records is not None:
            return Saved(directory, listed.head, storage.Reader(directory, listed.records, listed.block))
        reader = version1.TrustedReader(directory) if trust else version1.Reader(directory, listed.sizes)
        return Saved(directory, listed.head, reader)


def way_back(directory: Path) -> str:
    """Say which checkpoint before a damaged one is whole, and how to take it."""
    older = [path for path in _complete(directory.parent) if _order(path) < _order(directory)]
    for path in reversed(older):
        try:
            with boundary(path, "it"):
                _open(path, trust=False).reader.check()
        except CheckpointError:
            continue
        return f". {path}, saved before it, is whole: to go on from that one, remove {directory}"
    return f". No whole checkpoint before it is left in {directory.parent}"


def _raise_interrupt(error: CheckpointException) -> None:
    """Raise KeyboardInterrupt if Ctrl-C ended the work on some rank: torch wraps it as it does any error."""
    if any(isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
        raise KeyboardInterrupt from None


def _describe(error: CheckpointException, problem: str) -> str:
    """Return what went wrong on the first rank that failed."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, CheckpointError):
        return str(cause)
    return f"{problem}: {cause}" + (f" (on rank {rank})" if rank else "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's notes that it works in one process, and under an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
