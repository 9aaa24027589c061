"""A checkpoint on disk: a directory that is complete, or is not there. What it holds is the business of
:mod:`fused_arcface.checkpoint`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ..distributed import ALONE, Ranks

FORMAT = "fused_arcface.checkpoint"
VERSION = 1
_MANIFEST, _LATEST, _PARTIAL = "manifest.json", "latest", ".partial-"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: truncated, foreign, or of another head. Nothing has been loaded from it."""


def write(root: Path, state: dict[str, Any], options: dict[str, Any], step: int, ranks: Ranks, keep: int) -> Path:
    """Writes ``state`` as the newest checkpoint under ``root``, the head's ``options`` in its manifest; a collective.

    Returns its directory when that is complete and on disk.
    """
    name = f"step_{step:010d}"
    final, number = root / name, 1
    while final.exists():
        final, number = root / f"{name}.{number}", number + 1
    # Rank 0 alone looks: others might see its directory already.
    final = root / ranks.gather_objects(final.name)[0]
    partial = root / (_PARTIAL + final.name)
    with ranks.together("checkpoint.save"):  # nobody writes before the directory is there
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with _quiet():
        dcp_save(
            state,
            storage_writer=FileSystemWriter(partial),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
            no_dist=ranks.world_size == 1,
        )
    with ranks.together("checkpoint.save"):
        if ranks.rank == 0:
            _publish(partial, final, options, keep)
    return final


def _publish(partial: Path, final: Path, options: dict[str, Any], keep: int) -> None:
    """Makes a completely written directory the newest checkpoint: on disk first, then by two renames."""
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    manifest = {"format": FORMAT, "version": VERSION, "head": options, "files": files}
    _write_synced(partial / _MANIFEST, json.dumps(manifest, indent=2))
    _sync_directory(partial)
    partial.rename(final)
    _write_synced(final.parent / (_LATEST + ".new"), final.name)
    os.replace(final.parent / (_LATEST + ".new"), final.parent / _LATEST)
    _sync_directory(final.parent)
    complete = sorted(final.parent.glob("step_*"), key=lambda path: path.stat().st_mtime_ns)
    for old in [path for path in complete if path != final][: max(0, len(complete) - keep)]:
        shutil.rmtree(old)
    for unfinished in final.parent.glob(_PARTIAL + "*"):
        shutil.rmtree(unfinished)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """A rename is on disk when its directory is; not every platform lets one ask for it."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint under ``root``, None if there is none yet."""
    pointer = Path(root) / _LATEST
    return Path(root) / pointer.read_text().strip() if pointer.exists() else None


def find(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at ``path``, or the newest under it if it is a root, and its manifest, checked.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is not one of this package, of a later version of it, or truncated.
    """
    directory = Path(path) if (Path(path) / _MANIFEST).exists() else latest(path)
    if directory is None:
        if (Path(path) / ".metadata").exists():
            raise CheckpointError(f"{path} is a checkpoint of another program: it has no {_MANIFEST}")
        raise FileNotFoundError(f"no checkpoint in {path}")
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{directory}: {_MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{directory} is a checkpoint of another program: its {_MANIFEST} does not say {FORMAT}")
    if manifest["version"] > VERSION:
        raise CheckpointError(f"{directory} was saved by a later version of this package: format {manifest['version']}")
    for name, size in manifest["files"].items():
        file = directory / name
        actual = file.stat().st_size if file.exists() else None
        if actual != size:
            got = "missing" if actual is None else f"{actual} bytes long"
            raise CheckpointError(f"{directory} is truncated: {name} must have {size} bytes; it is {got}")
    return directory, manifest


def metadata(directory: Path) -> dict[str, Any]:
    """What torch.distributed.checkpoint has stored in a checkpoint's directory, by key."""
    stored: dict[str, Any] = FileSystemReader(directory).read_metadata().state_dict_metadata
    return stored


def read(directory: Path, state: dict[str, Any], ranks: Ranks = ALONE) -> None:
    """Fills ``state`` in place: tensors are written into, other values replaced."""
    try:
        with _quiet(), torch.no_grad():
            dcp_load(
                state,
                storage_reader=FileSystemReader(directory),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=ranks.group,
                no_dist=ranks.world_size == 1,
            )
    except CheckpointException as error:  # a BaseException of torch's
        raise CheckpointError(f"{directory} cannot be read: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notes that it works in one process, and under an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
