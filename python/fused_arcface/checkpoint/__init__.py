"""Checkpoints of a head and the objects that train with it, saved on any number of ranks and resumed on any other.

torch.distributed.checkpoint plans them.

Under a root directory each checkpoint is a directory, which has its name when it is complete::

    root/step_0000000100/            .metadata and *.distcp, see :mod:`fused_arcface.checkpoint.storage`; manifest.json
    root/.partial-step_0000000200/   a checkpoint that is being written, or was when the machine went down
    root/latest                      name of the newest checkpoint, for people; programs take the highest step

Rows of the class centers are stored by their global position, so any number of ranks can read them.

A checkpoint is JSON and the bytes of tensors: loading one that a stranger made runs no code. Format 1, of earlier
versions of this package, is pickled; :mod:`fused_arcface.checkpoint.version1` reads it without running the pickle.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..parallel.ranks import ALONE
from ..partial_fc import PartialFC
from .centers import Centers
from .directory import Saved, find, write
from .manifest import boundary
from .roots import latest
from .row_shard import RowShard, StreamedRows
from .storage import CheckpointError
from .stored import STORE, file_of, load_rows, reference_of, reference_to
from .structure import join, split

__all__ = [
    "CheckpointError",
    "RowShard",
    "Saved",
    "find",
    "head_state",
    "head_values",
    "latest",
    "load",
    "load_state",
    "save",
]

_HEAD = "head"


def head_state(head: PartialFC) -> dict[str, Any]:
    """Return a head's part of a checkpoint, for torch.distributed.checkpoint's own ``save`` and ``load``.

    The tensors share the head's memory, so loading into them loads the head, except for ``step`` and ``optimizer``. If
    the class centers are in a file, they have no tensors here.
    """
    state: dict[str, Any] = {} if file_of(head) is not None else dict(_shards(head))
    state["step"] = head.step
    for name, tensors in _numbers(head).items():  # a few, the same on every rank
        state[name] = {key: tensor.tolist() for key, tensor in tensors.items()}
    if head.center_optimizer is not None:
        groups = head.center_optimizer.state_dict()["param_groups"]
        state["optimizer"] = {name: value for name, value in groups[0].items() if name != "params"}
    return state


def _shards(head: PartialFC) -> dict[str, RowShard]:
    """Return weight and momentum by name. If the class centers are in a file, the tensors have no memory."""
    return {name: RowShard(tensor, head.row_start, head.num_rows) for name, tensor in head._held().items()}


def _numbers(head: PartialFC) -> dict[str, dict[str, Tensor]]:
    """Return the states of ``margin`` and ``scale``, if they have one."""
    held: dict[str, Any] = {"margin": head.margin, "scale": head.scale}
    states = {name: each.state_dict() for name, each in held.items() if isinstance(each, torch.nn.Module)}
    return states | ({"scale": {"value": head.scale.detach()}} if isinstance(head.scale, Tensor) else {})


def _options(num_classes: int, embedding_dim: int, seed: int, sub_centers: int) -> dict[str, Any]:
    """Return the options of a head that a checkpoint names: they must be the same to resume from it."""
    options = {"num_classes": num_classes, "embedding_dim": embedding_dim, "seed": seed}
    return options | ({"sub_centers": sub_centers} if sub_centers > 1 else {})


def _options_of(head: PartialFC) -> dict[str, Any]:
    return _options(head.num_classes, head.embedding_dim, head.seed, head.sub_centers)


def save(root: str | os.PathLike[str], head: PartialFC, *, keep: int = 2, **others: Any) -> Path:
    """Save a head and the objects that train with it. A collective over the head's group.

    The file system must be one that all ranks see.

    Args:
        root: directory of the checkpoints; made if missing.
        head: its class centers, fused optimizer, step, seed and its margin's state are saved.
        keep: checkpoints of the highest steps that are kept; the others are removed when the new one is complete.
            Nothing else in ``root`` is touched.
        others: by name, objects with ``state_dict()`` (backbone, optimizer, scheduler) or values made of tensors,
            numbers, text, bytes, None, lists, tuples, sets and dicts. An ordinary optimizer's state of ``head.weight``
            is stored by rows as the centers are, and DTensors in shards. Everything else is stored as rank 0 has it,
            also buffers that differ between ranks, such as BatchNorm's statistics.

    Returns:
        The checkpoint's directory, complete and on disk. Until then the previous one stays the newest.

    Raises:
        TypeError: if a value is of another kind, which could only be loaded by running code.
        CheckpointError: if it cannot be written. The checkpoints before it are unchanged.

    >>> import tempfile, torch, fused_arcface as fa
    >>> head, backbone, root = fa.PartialFC(8, 100), torch.nn.Linear(4, 8), tempfile.mkdtemp()
    >>> save(root, head, backbone=backbone, epoch=3).name
    'step_0000000000'
    >>> load(root, head, backbone=backbone)
    {'epoch': 3}
    """
    head.ranks.meet(type(head).__name__, {"call": "checkpoint.save()"}, head.device)
    with head.ranks.together("checkpoint.save"):
        agreement = {"root": os.path.abspath(root), "others": ", ".join(sorted(others))}
    head.ranks.check_agreement("checkpoint.save", agreement)
    tensors: dict[str, Any] = {}
    with head.ranks.together("checkpoint.save"):
        values = {
            name: split(_state_of(value, head), name, tensors)
            for name, value in {_HEAD: head_state(head), **others}.items()
        }
    store = file_of(head)
    if store is not None:
        store.drain()
        values[_HEAD][STORE] = reference_to(store.rows, root)
    path = write(Path(root), tensors, values, _options_of(head), head.step, head.ranks, keep)
    if store is not None:
        store.rows.saved(values[_HEAD][STORE]["state"], keep)
    return path


def save_centers(root: Path, centers: Centers, reference: dict[str, Any] | None = None) -> Path:
    """Save the class centers of a head that this process does not have; see ``convert``.

    With a ``reference`` the rows are in a store.
    """
    own = {"step": 0, "seed": 0, **centers.values}
    options = _options(centers.num_classes, centers.tensors["weight"].shape[1], own.pop("seed"), centers.sub_centers)
    own.pop("sub_centers", None)
    if reference is None:
        own |= {name: StreamedRows(rows) for name, rows in centers.tensors.items()}
    else:
        own[STORE] = reference
    tensors: dict[str, Any] = {}
    return write(root, tensors, {_HEAD: split(own, _HEAD, tensors)}, options, own["step"], ALONE, keep=2)


def load(path: str | os.PathLike[str], head: PartialFC, *, trust: bool = False, **others: Any) -> dict[str, Any]:
    """Resume from a checkpoint, on any number of ranks; a collective over the head's group.

    Args:
        path: a root (its newest checkpoint is taken) or one checkpoint's directory.
        head: has the saved embedding dimension, number of classes, sub-centers and seed. Other options may differ.
        trust: run the code that a checkpoint of format 1 may hold.
        others: the objects to restore, by the names they were saved under.

    Returns:
        The values that were saved, by name, except values with tensors: :func:`load_state` returns those.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged, foreign or of another head; the message names a whole one before it, if there
            is one. Nothing has been loaded then. If one of ``others`` refuses its state, the message names it: the
            objects before it are loaded, the head is not.

    >>> import tempfile, fused_arcface as fa
    >>> root = tempfile.mkdtemp()
    >>> _ = save(root, fa.PartialFC(8, 100, sample_rate=0.1), epoch=3)
    >>> load(root, fa.PartialFC(8, 100))  # options may differ
    {'epoch': 3}
    """
    head.ranks.meet(type(head).__name__, {"call": "checkpoint.load()"}, head.device)
    saved = find(path, ranks=head.ranks, trust=trust)
    with head.ranks.together("checkpoint.load"):
        for name, own in {"sub_centers": None, **_options_of(head)}.items():
            before = saved.head.get(name)
            if before != own:
                raise CheckpointError(f"{saved.directory}: {name} was {before} when saved; this head's is {own}")
        missing = others.keys() - saved.names
        if missing:
            raise CheckpointError(f"{saved.directory} has no {', '.join(sorted(missing))}")
        values = head_values(saved)
        plain = saved.names - {_HEAD} - {key.partition(".")[0] for key in saved.tensors}
        structures = {name: saved.value(name) for name in plain | others.keys()}
        numbers_of, options = _saved_numbers(saved, values, head), _of_optimizer(saved, values, head)
        reference, store = reference_of(saved, values), file_of(head)
        imported = "optimizer" not in values and values["step"] == 0  # centers alone: an optimizer starts as a new one
        shards = _shards(head) if reference is None else {}  # if they are in a store, the checkpoint has none
        targets = {f"{_HEAD}.{name}": each for name, each in shards.items() if name == "weight" or not imported}
        _check_tensors(saved, targets)
        # Read aside: a damaged block is found when it is read, and nothing has been loaded until all is there.
        tensors: dict[str, Any] = {
            key: RowShard(torch.empty_like(shard.rows, device="cpu"), head.row_start, shard.total)
            for key, shard in targets.items()
            if store is None
        }
        for name, value in others.items():
            tensors |= _receivers(name, value, saved, head)
    saved.read(tensors, head.ranks)
    states = {name: _joined(saved, name, structures[name], tensors) for name in others}
    for name, value in others.items():
        with _fitting(saved, name):
            value.load_state_dict(states[name])
    if store is not None or reference is not None:
        load_rows(head, reference, saved, list(targets), imported)
    else:
        for key, shard in targets.items():
            shard.rows.copy_(tensors[key].rows)
    torch.autograd.graph.increment_version(head.weight)
    head.step = values["step"]
    for own, kept in numbers_of:
        own.copy_(kept)
    if imported:
        for name, tensor in head._held().items():
            if name != "weight":
                tensor.zero_()
    elif head.center_optimizer is not None:
        head.center_optimizer.param_groups[0].update(options)
    return {name: value for name, value in structures.items() if name not in others}


def _saved_numbers(saved: Saved, values: dict[str, Any], head: PartialFC) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of the head's margin and scale, each with its saved value; another one keeps its own state."""
    found = []
    for of, own in _numbers(head).items():
        for name in own.keys() & values.get(of, {}).keys():
            with _fitting(saved, f"the {of}'s {name}"):
                kept = torch.tensor(values[of][name], dtype=own[name].dtype)
                if kept.shape != own[name].shape:
                    raise ValueError(f"it must be {tuple(own[name].shape)}; it is {tuple(kept.shape)}")
                found.append((own[name], kept))
    return found


def _of_optimizer(saved: Saved, values: dict[str, Any], head: PartialFC) -> dict[str, Any]:
    """Return the saved options of the head's fused optimizer, none for centers alone, and check them."""
    if head.center_optimizer is None:
        return {}
    if "optimizer" not in values:
        if values["step"] == 0:
            return {}
        raise CheckpointError(f"{saved.directory} is damaged: {_HEAD} has no options of its optimizer")
    options: dict[str, Any] = {name: value for name, value in values["optimizer"].items() if name != "params"}
    with _fitting(saved, "the head's optimizer"):
        head.center_optimizer.recipe.check_settings(options)
    return options


@contextlib.contextmanager
def _fitting(saved: Saved, name: str) -> Iterator[None]:
    """Turn any error that an object raises for the state of another one into an error that names it."""
    try:
        yield
    except Exception as error:
        why = str(error) or type(error).__name__
        raise CheckpointError(f"{saved.directory}: {name} cannot be loaded: {why}") from error


def head_values(saved: Saved) -> dict[str, Any]:
    """Return a head's saved values: ``step``, and the options of its margin, its scale and its fused optimizer.

    Raises:
        CheckpointError: if the checkpoint is not one of a head.
    """
    values = saved.value(_HEAD)
    if not isinstance(values, dict) or type(values.get("step")) is not int or not 0 <= values["step"] < 2**63:
        raise CheckpointError(f"{saved.directory} is damaged: {_HEAD} has no step")
    if not all(isinstance(values.get(name, {}), dict) for name in ("margin", "scale", "optimizer")):
        raise CheckpointError(f"{saved.directory} is damaged: {_HEAD} has no options of a margin or an optimizer")
    return values


def load_state(path: str | os.PathLike[str], name: str, *, trust: bool = False) -> Any:
    """Return the saved state of one object, with tensors on the CPU; no head is needed.

    Args:
        path: a root (its newest checkpoint is taken) or one checkpoint's directory.
        name: name that it was saved under, for example ``"backbone"``.
        trust: run the code that a checkpoint of format 1 may hold.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged or foreign, or holds nothing of that name.

    >>> import tempfile, torch, fused_arcface as fa
    >>> root = tempfile.mkdtemp()
    >>> _ = save(root, fa.PartialFC(8, 100), backbone=torch.nn.Linear(4, 8))
    >>> load_state(root, "backbone")["weight"].shape
    torch.Size([8, 4])
    """
    saved = find(path, trust=trust)
    structure = saved.value(name)
    tensors = {
        key: torch.zeros(value.size, dtype=value.properties.dtype)
        for key, value in saved.tensors.items()
        if key == name or key.startswith(name + ".")
    }
    saved.read(tensors)
    return _joined(saved, name, structure, tensors)


def _joined(saved: Saved, name: str, structure: Any, tensors: dict[str, Any]) -> Any:
    with boundary(saved.directory, name):  # a hand-made structure may not fit its tensors
        return join(structure, tensors)


def _check_tensors(saved: Saved, own: dict[str, RowShard]) -> None:
    """Raise unless the saved head has the same tensors as this one."""
    stored = {key: value for key, value in saved.tensors.items() if key.startswith(_HEAD + ".")}
    for key in sorted(own.keys() | stored.keys()):
        rule = f"{tuple(own[key].size())} {own[key].rows.dtype}" if key in own else "none"
        got = f"{tuple(stored[key].size)} {stored[key].properties.dtype}" if key in stored else "none"
        if rule != got:
            raise CheckpointError(f"{saved.directory}: {key} was {got} when saved; this head's is {rule}")


def _state_of(value: Any, head: PartialFC) -> Any:
    """Return an object's state for saving, with tensors that belong to rows of ``head.weight`` as row shards."""
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
    """Return the indices of ``head.weight`` in an optimizer's state dict."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index for index, parameter in enumerate(parameters) if parameter is head.weight}


def _receivers(name: str, owner: Any, saved: Saved, head: PartialFC) -> dict[str, Tensor]:
    """Return an empty tensor for each saved tensor of ``owner``, by key."""
    sharded = [f"{name}.state.{index}." for index in _indices_of(head, owner)] if hasattr(owner, "param_groups") else []
    own: dict[str, Any] = {}
    if isinstance(owner, torch.nn.Module):
        split(owner.state_dict(), name, own)
    receivers: dict[str, Any] = {}
    for key, stored in saved.tensors.items():
        if not key.startswith(name + "."):
            continue
        size, dtype = stored.size, stored.properties.dtype
        if isinstance(own.get(key), DTensor):
            receivers[key] = torch.empty_like(own[key])
        elif key.startswith(tuple(sharded)) and size[:1] == (head.num_rows,):
            rows = torch.empty(head.weight.shape[0], *size[1:], dtype=dtype)
            receivers[key] = RowShard(rows, head.row_start, head.num_rows)
        else:
            receivers[key] = torch.zeros(size, dtype=dtype)
    return receivers
