"""Checkpoints of a head and what trains with it, through torch.distributed.checkpoint: saved on any number of ranks,
resumed on any other.

A root directory holds complete checkpoints only, each a directory of its own, and a file that names the newest::

    root/latest                      the name of the newest checkpoint, replaced in one step
    root/step_0000000100/            .metadata and *.distcp (torch.distributed.checkpoint), manifest.json
    root/.partial-step_0000000200/   one that is being written, or was when the machine went down

Rows of the class centres are stored by their global position, so the number of ranks that reads them may be any.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..distributed import ALONE
from ..partial_fc import PartialFC
from .directory import CheckpointError, find, latest, metadata, read, write
from .row_shard import RowShard
from .structure import join, split

__all__ = [
    "CheckpointError",
    "RowShard",
    "find",
    "head_state",
    "latest",
    "load",
    "load_state",
    "metadata",
    "read",
    "save",
    "save_centres",
]

_HEAD = "head"


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
    return {} if head.center_optimizer is None else dict(head.center_optimizer.bind(head.weight))


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
    agreement = {"root": os.path.abspath(root), "others": ", ".join(sorted(others))}
    head.ranks.check_agreement("checkpoint.save", agreement)
    state: dict[str, Any] = {}
    with head.ranks.together("checkpoint.save"):
        for name, value in {_HEAD: head_state(head), **others}.items():
            state[name] = split(_state_of(value, head), name, state)
    return write(Path(root), state, _options(head), head.step, head.ranks, keep)


def save_centres(
    root: str | os.PathLike[str], tensors: dict[str, RowShard], values: dict[str, Any], options: dict[str, Any]
) -> Path:
    """A checkpoint of a head that is not there, written by this process alone; see :mod:`fused_arcface.convert`."""
    state: dict[str, Any] = {}
    state[_HEAD] = split({**tensors, **values}, _HEAD, state)
    return write(Path(root), state, options, values["step"], ALONE, keep=2)


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
    with head.ranks.together("checkpoint.load"):
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
    with head.ranks.together("checkpoint.load"):
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
        value.load_state_dict(join(structures[name], tensors))
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
    return join(state[name], tensors)


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
        split(owner.state_dict(), name, receivers)
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
