"""Class centers of another training as a start: old identities keep theirs exactly, new ones begin at random."""

from __future__ import annotations

from pathlib import Path

import torch

from fused_arcface.base.reading import DataError, NoSuchData, read_names
from fused_arcface.checkpoint.centers import Centers
from fused_arcface.checkpoint.sources import read
from fused_arcface.partial_fc import PartialFC


def load_centers(head: PartialFC, names: list[str], source: Path) -> list[str]:
    """Set a new head's class centers to those of a source, by the names of the identities.

    Names come from ``classes.txt`` in a run's folder, or beside a file of centers. Without names the source's classes
    are the first ones of the head. Each rank fills its own shard.

    Args:
        head: the head; centers of identities that the source does not have stay as they are.
        names: (C_total,) of the head's classes.
        source: a run, a checkpoint, or a file of centers, see :func:`fused_arcface.checkpoint.sources.read`.

    Returns:
        One line with the numbers of identities that keep their centers, of new ones, and of unused ones.

    Raises:
        DataError, CheckpointError: if the source cannot be read, or does not fit the head.
    """
    try:
        found = read(source, embedding_dim=head.embedding_dim)
    except FileNotFoundError as error:
        raise NoSuchData(str(error)) from None
    dim = found.tensors["weight"].shape[1]
    if dim != head.embedding_dim or found.sub_centers != head.sub_centers:
        raise DataError(
            f"{source} must have centers of embedding_dim={head.embedding_dim} and sub_centers={head.sub_centers}; "
            f"it has {dim} and {found.sub_centers}"
        )
    old_names = _names_beside(source, found.num_classes)
    if old_names is None:
        if found.num_classes > len(names):
            raise DataError(
                f"{source} has {found.num_classes} classes without names, and the data {len(names)}: without a "
                "classes.txt beside it, its classes must be the first ones of the data"
            )
        target = torch.arange(found.num_classes)
    else:
        place_of = {name: place for place, name in enumerate(names)}
        target = torch.tensor([place_of.get(name, -1) for name in old_names])
    _fill(head, found, target)
    kept = int((target >= 0).sum())
    how = "by name" if old_names is not None else "by order"
    text = f"centers: {kept} of {len(names)} identities keep their centers from {source}, matched {how}"
    if new := len(names) - kept:
        text += f"; random centers for {new} new"
    if unused := found.num_classes - kept:
        text += f"; {unused} of the source are not in the data"
    return [text]


def _names_beside(source: Path, count: int) -> list[str] | None:
    """Return the names of a source's classes, None if it has none. Raise DataError unless each class has its own."""
    folders = (source, *source.parents[:2]) if source.is_dir() else (source.parent,)
    file = next((folder / "classes.txt" for folder in folders if (folder / "classes.txt").is_file()), None)
    if file is None:
        return None
    names = read_names(file)
    if len(names) != count or len(set(names)) != count:
        raise DataError(f"{file} must name each of {count} classes of {source} once; it has {len(set(names))} names")
    return names


@torch.no_grad()
def _fill(head: PartialFC, found: Centers, target: torch.Tensor) -> None:
    """Copy rows of the source's class i to the head's class ``target[i]``; -1 leaves them out."""
    k = head.sub_centers
    to = (target[:, None] * k + torch.arange(k)).flatten()
    to[target.repeat_interleave(k) < 0] = -1
    first, last = head.class_start * k, (head.class_start + head.num_local) * k
    start = 0
    for piece in found.tensors["weight"].pieces():
        places = to[start : start + len(piece)]
        own = (places >= first) & (places < last)
        if head.center_store is None or head.center_store.in_memory:
            head.weight[(places[own] - first).to(head.weight.device)] = piece[own].to(head.weight)
        else:
            order = places[own].argsort()
            head.center_store.replace(places[own][order] - first, piece[own][order].to(head.weight.dtype))
        start += len(piece)
