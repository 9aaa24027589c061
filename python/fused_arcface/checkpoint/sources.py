"""Class centers from a training run, a checkpoint, a safetensors file or another project's files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..base.checks import check_sub_centers
from ..base.dtypes import DTYPES, names
from ..base.reading import DataError, file_errors
from ..base.suggest import missing_path
from ..parallel.sharding import Sharding
from . import other_projects, safetensors, stored
from .centers import Centers, ConvertError, ConvertOptionError, Rows
from .other_projects import INSIGHTFACE

_RUN_CHECKPOINTS = "checkpoints"  # in the folder of a training run


def read(
    path: str | os.PathLike[str],
    sub_centers: int | None = None,
    *,
    embedding_dim: int | None = None,
    trust: bool = False,
) -> Centers:
    """Return the class centers of a run, a checkpoint, or a file of another kind.

    A source is a training run; a checkpoint or a root of them; a directory of insightface's shards; a safetensors file
    with ``weight`` (C, D); or a ``.pt`` file, see :func:`fused_arcface.checkpoint.other_projects.centers`.

    Args:
        path: path of the source.
        sub_centers: number of centers of each class, which lie one after another, for a source that does not store it,
            such as pytorch-metric-learning's SubCenterArcFaceLoss. None: the source's, or 1.
        embedding_dim: D, for a file of another project that does not say which side of its tensor is D.
        trust: run the code that a checkpoint of format 1 may hold.

    Raises:
        FileNotFoundError: if nothing is there.
        ConvertError, CheckpointError: if it is of another kind, or incomplete.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(missing_path(path))
    try:
        found = _read_directory(path, trust) if path.is_dir() else _read_file(path, embedding_dim)
    except ConvertError:
        raise
    except DataError as error:
        raise ConvertError(str(error)) from None
    if sub_centers is not None:
        check_sub_centers(sub_centers)
        own, rows = found.values.get("sub_centers"), found.tensors["weight"].shape[0]
        if own not in (None, sub_centers):
            raise ConvertOptionError(f"{path} has sub_centers={own}; got {sub_centers}")
        if rows % sub_centers:
            raise ConvertOptionError(f"{path} must have sub_centers={sub_centers} rows of each class; it has {rows}")
        found.values["sub_centers"] = sub_centers
    return found


def _read_directory(path: Path, trust: bool) -> Centers:
    kinds = {
        kind: {int(match[1]): file for file in path.iterdir() if (match := pattern.fullmatch(file.name))}
        for kind, pattern in INSIGHTFACE.items()
    }
    present = [kind for kind, shards in kinds.items() if shards]
    if len(present) > 1:
        raise ConvertError(f"{path} must have shards of one kind; got {' and '.join(present)}: name the files instead")
    if present:
        return _read_insightface(path, kinds[present[0]])
    run = path / _RUN_CHECKPOINTS
    return _read_checkpoint(run if run.is_dir() else path, trust)


def _read_file(path: Path, embedding_dim: int | None) -> Centers:
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path, embedding_dim)
    return _of_project(path, other_projects.centers(path, embedding_dim))


def _of_project(path: Path, found: other_projects.Found) -> Centers:
    notes = _left_out(path) if found.momentum else []
    return Centers({"weight": Rows.of(found.weight)}, notes=notes + found.notes)


def _read_checkpoint(path: Path, trust: bool) -> Centers:
    saved = checkpoint.find(path, trust=trust)
    head = checkpoint.head_values(saved)
    tensors = {
        key.removeprefix("head."): Rows(each.properties.dtype, tuple(each.size), partial(_pieces, saved, key, each))
        for key, each in saved.tensors.items()
        if key.startswith("head.")
    }
    reference = stored.reference_of(saved, head)
    if reference is not None:
        tensors |= stored.rows_of(reference)
    values = {"seed": saved.head.get("seed", 0), "step": head["step"], "sub_centers": saved.head.get("sub_centers", 1)}
    if "optimizer" in head:
        values["optimizer"] = head["optimizer"]
    return _checked(saved.directory, tensors, values)


def _pieces(saved: checkpoint.Saved, key: str, stored: Any) -> Iterator[Tensor]:
    for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets[0]):
        rows = torch.empty(chunk.sizes, dtype=stored.properties.dtype)
        saved.read({key: checkpoint.RowShard(rows, chunk.offsets[0], stored.size[0])})
        yield rows


def _read_insightface(path: Path, shards: dict[int, Path]) -> Centers:
    if sorted(shards) != list(range(len(shards))):
        raise ConvertError(f"{path} must have the shards of ranks 0 to {max(shards)}; got those of {sorted(shards)}")
    found = [other_projects.centers(shards[rank]) for rank in range(len(shards))]
    weights = [each.weight for each in found]
    counts, dim = [len(weight) for weight in weights], weights[0].shape[1]
    if counts != Sharding(sum(counts), len(shards)).counts() or any(weight.shape[1] != dim for weight in weights):
        shapes = [tuple(weight.shape) for weight in weights]
        raise ConvertError(f"{path}: the shards must split the classes evenly, the first ones one more; got {shapes}")
    rows = Rows(weights[0].dtype, (sum(counts), dim), lambda: iter(weights))
    return Centers({"weight": rows}, notes=_left_out(path) if any(each.momentum for each in found) else [])


def _left_out(path: Path) -> list[str]:
    return [f"{path}: the momentum of its class centers is left out; training begins with none"]


def _read_safetensors(path: Path, embedding_dim: int | None) -> Centers:
    tensors, metadata = safetensors.read(path)
    if "weight" not in tensors and other_projects.of_state(tensors):  # a model, as transformers' save_pretrained has it
        return _of_project(path, other_projects.centers_of(path, tensors, embedding_dim))
    with file_errors(path):
        values = json.loads(metadata.get("fused_arcface", "{}"))
    return _checked(path, {name: Rows.of(tensor) for name, tensor in tensors.items()}, values)


def _checked(path: Path, tensors: dict[str, Rows], values: Any) -> Centers:
    """Check that all tensors of a source have as many rows, and the types of its values: it may be a stranger's."""
    if "weight" not in tensors:
        raise ConvertError(f"{path} has no weight; it has {', '.join(tensors) or 'nothing'}")
    weight = tensors["weight"]
    if len(weight.shape) != 2 or not weight.dtype.is_floating_point or 0 in weight.shape:
        raise ConvertError(f"{path}: weight must be numbers (C, D); it is {weight.shape} {weight.dtype}")
    for name, rows in tensors.items():
        if rows.dtype not in DTYPES:
            kinds, got = names(tuple(DTYPES)), names((rows.dtype,))
            raise ConvertError(f"{path}: {name} must have one of the dtypes {kinds}; it is {got}")
        if rows.shape[:1] != weight.shape[:1]:
            raise ConvertError(f"{path}: {name} must have {weight.shape[0]} rows, as weight; it is {rows.shape}")
    if not isinstance(values, dict):
        raise ConvertError(f"{path}: its metadata of fused_arcface must be an object; it is a {type(values).__name__}")
    try:
        check_sub_centers(values.get("sub_centers", 1))
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{path}: {error}") from None
    for name in values.keys() & {"seed", "step"}:
        if type(values[name]) is not int or not 0 <= values[name] < 2**63:
            raise ConvertError(f"{path}: {name} must be a whole number >= 0 and < 2^63; got {values[name]!r:.60}")
    optimizer = values.get("optimizer", {})
    plain = (int, float, str, bool, type(None))
    if not isinstance(optimizer, dict) or not all(isinstance(each, plain) for each in optimizer.values()):
        raise ConvertError(f"{path}: optimizer must be an object of numbers and texts")
    return Centers(tensors, values)
