"""Checkpoints of a head and what trains with it, through torch.distributed.checkpoint: saved on any number of ranks,
resumed on any other.

A root directory holds complete checkpoints only, each a directory of its own, and a file that names the newest::

    root/latest                      the name of the newest checkpoint, replaced in one step
    root/step_0000000100/            .metadata and *.distcp (torch.distributed.checkpoint), manifest.json
    root/.partial-step_0000000200/   one that is being written, or was when the machine went down

Rows of the class centres are stored by their global position, so the number of ranks that reads them may be any.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from .distributed import ALONE, Ranks
from .partial_fc import PartialFC

FORMAT = "fused_arcface.checkpoint"
VERSION = 1
_MANIFEST, _LATEST, _PARTIAL, _HEAD = "manifest.json", "latest", ".partial-", "head"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: truncated, foreign, or of another head. Nothing has been loaded from it."""


class RowShard(Tensor):
    """Rows ``[start, start + len(rows))`` of a tensor of ``total`` rows that is held in parts, as
    torch.distributed.checkpoint sees it. Shares the memory of ``rows``."""

    # An ordinary tensor to every operation.
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    pieces: list[tuple[int, Tensor]]
    """(first row, rows): one, unless the shard has been put together."""
    total: int

    def __new__(cls, rows: Tensor, start: int, total: int) -> RowShard:
        shard: RowShard = Tensor._make_subclass(cls, rows.detach())
        shard.pieces, shard.total = [(start, rows.detach())], total
        return shard

    @classmethod
    def of_pieces(cls, pieces: list[Tensor]) -> RowShard:
        """A whole tensor that lies in pieces of some rows each."""
        shard = cls(pieces[0], 0, sum(len(piece) for piece in pieces))
        shard.pieces, start = [], 0
        for piece in pieces:
            shard.pieces.append((start, piece))
            start += len(piece)
        return shard

    @property
    def rows(self) -> Tensor:
        return self.pieces[0][1]

    def size(self) -> torch.Size:  # type: ignore[override]
        """Of the whole tensor: torch.distributed.checkpoint compares it with what is stored."""
        return torch.Size([self.total, *self.rows.shape[1:]])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size([start] + [0] * (rows.dim() - 1)), sizes=rows.shape)
            for start, rows in self.pieces
        ]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.rows)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
            if chunk.sizes.numel() > 0
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        first = index.offset[0] if index.offset else 0
        return next(rows for start, rows in self.pieces if start == first)


def head_state(head: PartialFC) -> dict[str, Any]:
    """What a checkpoint holds of a head, for ``torch.distributed.checkpoint.save`` and ``load`` themselves.

    Tensors share the head's memory: loading into them loads the head, but for ``step`` and ``optimizer``.
    """
    tensors = {"weight": head.weight, **_momentum(head)}
    state: dict[str, Any] = {name: RowShard(tensor, head.row_start, head.num_rows) for name, tensor in tensors.items()}
    state["step"] = head.step
    if isinstance(head.margin, torch.nn.Module):  # a few numbers, the same on every rank
        state["margin"] = {name: tensor.tolist() for name, tensor in head.margin.state_dict().items()}
    if head.center_optimizer is not None:
        groups = head.center_optimizer.state_dict()["param_groups"]
        state["optimizer"] = {name: value for name, value in groups[0].items() if name != "params"}
    return state


def _momentum(head: PartialFC) -> dict[str, Tensor]:
    return {} if head.center_optimizer is None else dict(head.center_optimizer.state[head.weight])


def _options(head: PartialFC) -> dict[str, Any]:
    """What must be the same for a resumed run to continue the saved one."""
    options = {"num_classes": head.num_classes, "embedding_dim": head.weight.shape[1], "seed": head.seed}
    return options | ({"sub_centers": head.sub_centers} if head.sub_centers > 1 else {})


def save(root: str | os.PathLike[str], head: PartialFC, *, keep: int = 2, **others: Any) -> Path:
    """Save a head and what trains with it; a collective over the head's group, on a file system that all ranks see.

    Args:
        root: directory of the checkpoints; made if missing.
        head: its class centres, fused optimizer, step, seed and its margin's state are saved.
        keep: newest checkpoints that are kept; older ones are removed when the new one is complete.
        others: by name, objects with ``state_dict()`` (backbone, optimizer, scheduler) or plain picklable values. An
            ordinary optimizer's state of ``head.weight`` is stored by rows as the centres are; all else as rank 0 has
            it (or, of DTensors, in shards).

    Returns:
        The checkpoint's directory. When this returns it is complete and on disk; until then the previous one stays
        the newest.

    >>> import tempfile, torch, fused_arcface as fa
    >>> head, backbone, root = fa.PartialFC(8, 100), torch.nn.Linear(4, 8), tempfile.mkdtemp()
    >>> save(root, head, backbone=backbone, epoch=3).name
    'step_0000000000'
    >>> load(root, head, backbone=backbone)
    {'epoch': 3}
    """
    state: dict[str, Any] = {}
    for name, value in {_HEAD: head_state(head), **others}.items():
        state[name] = _split(_state_of(value, head), name, state)
    return _save(Path(root), state, _options(head), head.step, head.ranks, keep)


def save_centres(
    root: str | os.PathLike[str], tensors: dict[str, RowShard], values: dict[str, Any], options: dict[str, Any]
) -> Path:
    """A checkpoint of a head that is not there, written by this process alone; see :mod:`fused_arcface.convert`."""
    state: dict[str, Any] = {}
    state[_HEAD] = _split({**tensors, **values}, _HEAD, state)
    return _save(Path(root), state, options, values["step"], ALONE, keep=2)


def _save(root: Path, state: dict[str, Any], options: dict[str, Any], step: int, ranks: Ranks, keep: int) -> Path:
    name = f"step_{step:010d}"
    final, number = root / name, 1
    while final.exists():
        final, number = root / f"{name}.{number}", number + 1
    # Rank 0 alone looks: others might see its directory already.
    final = root / ranks.gather_objects(final.name)[0]
    partial = root / (_PARTIAL + final.name)
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.gather_objects(None)  # a barrier: nobody writes before the directory is there
    with _quiet():
        dcp_save(
            state,
            storage_writer=FileSystemWriter(partial),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
            no_dist=ranks.world_size == 1,
        )
    if ranks.rank == 0:
        _publish(partial, final, options, keep)
    ranks.gather_objects(None)
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


def load(path: str | os.PathLike[str], head: PartialFC, **others: Any) -> dict[str, Any]:
    """Resume from a checkpoint, on any number of ranks; a collective over the head's group.

    Args:
        path: a root (its newest checkpoint is taken) or one checkpoint's directory.
        head: of the saved embedding dimension, number of classes and seed; its options may differ otherwise.
        others: the objects to restore, by the names they were saved under.

    Returns:
        The plain values that were saved, by name.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: it is truncated, foreign or of another head. Nothing has been loaded then.

    >>> import tempfile, fused_arcface as fa
    >>> root = tempfile.mkdtemp()
    >>> _ = save(root, fa.PartialFC(8, 100, sample_rate=0.1), epoch=3)
    >>> load(root, fa.PartialFC(8, 100))  # options may differ
    {'epoch': 3}
    """
    directory, manifest = find(path)
    for name, own in {"sub_centers": None, **_options(head)}.items():
        saved = manifest["head"].get(name)
        if saved != own:
            raise CheckpointError(f"{directory}: {name} was {saved} when saved; this head's is {own}")
    saved = metadata(directory)
    plain = [key for key, value in saved.items() if not isinstance(value, TensorStorageMetadata)]
    missing = others.keys() - set(plain)
    if missing:
        raise CheckpointError(f"{directory} has no {', '.join(sorted(missing))}")
    own = {f"{_HEAD}.{name}": shard for name, shard in head_state(head).items() if isinstance(shard, Tensor)}
    structures: dict[str, Any] = dict.fromkeys(plain)
    read(directory, structures, head.ranks)
    imported = "optimizer" not in structures[_HEAD] and structures[_HEAD]["step"] == 0
    if imported:  # centres alone: a fused optimizer starts as a new one
        own = {key: shard for key, shard in own.items() if key == f"{_HEAD}.weight"}
    _check_tensors(directory, saved, own)
    tensors: dict[str, Any] = dict(own)
    for name, value in others.items():
        tensors |= _receivers(name, value, saved, head)
    read(directory, tensors, head.ranks)
    torch.autograd.graph.increment_version(head.weight)
    head.step = structures[_HEAD]["step"]
    if isinstance(head.margin, torch.nn.Module):  # another margin than the saved one keeps its own state
        kept = structures[_HEAD].get("margin", {})
        head.margin.load_state_dict({name: torch.tensor(value) for name, value in kept.items()}, strict=False)
    if imported:
        for tensor in _momentum(head).values():
            tensor.zero_()
    elif head.center_optimizer is not None:
        head.center_optimizer.param_groups[0].update(structures[_HEAD]["optimizer"])
    for name, value in others.items():
        value.load_state_dict(_join(structures[name], tensors))
    return {name: value for name, value in structures.items() if name != _HEAD and name not in others}


def load_state(path: str | os.PathLike[str], name: str) -> Any:
    """What one object was saved as, its ``state_dict()`` with tensors on the CPU; no head is needed.

    Args:
        path: a root (its newest checkpoint is taken) or one checkpoint's directory.
        name: under which it was saved, for example ``"backbone"``.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: it is truncated or foreign, or holds nothing of that name.

    >>> import tempfile, torch, fused_arcface as fa
    >>> root = tempfile.mkdtemp()
    >>> _ = save(root, fa.PartialFC(8, 100), backbone=torch.nn.Linear(4, 8))
    >>> load_state(root, "backbone")["weight"].shape
    torch.Size([8, 4])
    """
    directory, _ = find(path)
    saved = metadata(directory)
    if name not in saved:
        raise CheckpointError(f"{directory} has no {name}")
    tensors = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in saved.items()
        if key.startswith(name + ".") and isinstance(value, TensorStorageMetadata)
    }
    state: dict[str, Any] = {name: None, **tensors}
    read(directory, state)
    return _join(state[name], tensors)


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


def _check_tensors(directory: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises unless the saved head has the same tensors as this one."""
    stored = {
        key for key, value in saved.items() if key.startswith(_HEAD + ".") and isinstance(value, TensorStorageMetadata)
    }
    for key in sorted(own.keys() | stored):
        rule = f"{tuple(own[key].size())} {own[key].rows.dtype}" if key in own else "none"
        got = f"{tuple(saved[key].size)} {saved[key].properties.dtype}" if key in stored else "none"
        if rule != got:
            raise CheckpointError(f"{directory}: {key} was {got} when saved; this head's is {rule}")


@dataclass(frozen=True)
class _Stored:
    """In a saved structure, the place of the tensor that is stored under ``key``."""

    key: str


def _split(value: Any, key: str, tensors: dict[str, Any]) -> Any:
    """``value`` with its tensors taken out into ``tensors``: torch.distributed.checkpoint stores those by shards, but
    keeps neither lists nor keys that are numbers."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return _Stored(key)
    if isinstance(value, dict):
        return {name: _split(item, f"{key}.{name}", tensors) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_split(item, f"{key}.{place}", tensors) for place, item in enumerate(value))
    return value


def _join(structure: Any, tensors: dict[str, Any]) -> Any:
    """The opposite of :func:`_split`; row shards become ordinary tensors."""
    if isinstance(structure, _Stored):
        tensor = tensors[structure.key]
        return tensor.rows if isinstance(tensor, RowShard) else tensor
    if isinstance(structure, dict):
        return {name: _join(item, tensors) for name, item in structure.items()}
    if type(structure) in (list, tuple):
        return type(structure)(_join(item, tensors) for item in structure)
    return structure


def _state_of(value: Any, head: PartialFC) -> Any:
    """An object's state for saving; an optimizer's tensors that belong to rows of ``head.weight`` as row shards."""
    state = value.state_dict() if hasattr(value, "state_dict") else value
    if isinstance(value, torch.optim.Optimizer):
        state = {"state": dict(state["state"]), "param_groups": state["param_groups"]}
        for index in state["state"].keys() & _indices_of(head, value):
            state["state"][index] = {
                name: RowShard(tensor, head.row_start, head.num_rows)
                if isinstance(tensor, Tensor) and tensor.shape[:1] == head.weight.shape[:1]
                else tensor
                for name, tensor in state["state"][index].items()
            }
    return state


def _indices_of(head: PartialFC, optimizer: torch.optim.Optimizer) -> set[int]:
    """Where ``head.weight`` stands in an optimizer's state dict."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index for index, parameter in enumerate(parameters) if parameter is head.weight}


def _receivers(name: str, owner: Any, saved: dict[str, Any], head: PartialFC) -> dict[str, Tensor]:
    """A tensor to load each of the saved ones of ``owner`` into."""
    receivers: dict[str, Any] = {}
    if isinstance(owner, torch.nn.Module):  # its own: they may be DTensors
        _split(owner.state_dict(), name, receivers)
        return receivers
    sharded = [f"{name}.state.{index}." for index in _indices_of(head, owner)] if hasattr(owner, "param_groups") else []
    for key, value in saved.items():
        if key.startswith(name + ".") and isinstance(value, TensorStorageMetadata):
            size, dtype = value.size, value.properties.dtype
            if key.startswith(tuple(sharded)) and size[:1] == (head.num_rows,):
                rows = torch.empty(head.weight.shape[0], *size[1:], dtype=dtype, device=head.weight.device)
                receivers[key] = RowShard(rows, head.row_start, head.num_rows)
            else:
                receivers[key] = torch.empty(size, dtype=dtype)
    return receivers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notes that it works in one process, and under an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
