"""Class centres between kinds of files: this package's checkpoints, one safetensors file of all of them, the shards
that insightface saves, and pytorch-metric-learning's. Sets of identities can be joined and grown on the way.

Tensors pass in pieces, the shards as they were saved: no more than one of them is in memory at a time (all that is
written into a checkpoint is mapped from the sources' files).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from . import checkpoint, safetensors
from .keyed import fill_normal
from .reading import DataError, file_errors
from .sharding import Sharding
from .torch_file import check_stored, load_torch

_INSIGHTFACE = re.compile(r"checkpoint_gpu_(\d+)\.pt")
_NEW_ROWS = 1 << 16  # drawn at once


class ConvertError(DataError):
    """A source that is not what its place or name says, or sources that do not go together."""


@dataclass
class Rows:
    """A tensor with one row a class."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """(C_total, ...)"""
    pieces: Callable[[], Iterator[Tensor]]
    """Its rows in order."""


@dataclass
class Centres:
    """Class centres and, from a checkpoint, what else belongs to them."""

    tensors: dict[str, Rows]
    """``weight`` (C_total, D) and, of a fused optimizer, ``momentum_buffer`` and ``momentum_scale``."""
    values: dict[str, Any] = field(default_factory=dict)
    """``step``, ``seed`` and the fused optimizer's ``optimizer`` options, where the source has them."""

    @property
    def num_classes(self) -> int:
        return self.tensors["weight"].shape[0]


def read(path: str | os.PathLike[str]) -> Centres:
    """Class centres from a checkpoint (or a root of some), a directory of insightface's ``checkpoint_gpu_{rank}.pt``, a
    safetensors file with ``weight`` (C, D), or a ``.pt`` file with ``weight`` (C, D) or pytorch-metric-learning's ``W``
    (D, C).

    Raises:
        FileNotFoundError: nothing is there.
        ConvertError, CheckpointError: it is of no such kind, or incomplete.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.is_dir():
        shards = {int(match[1]): file for file in path.iterdir() if (match := _INSIGHTFACE.fullmatch(file.name))}
        return _read_insightface(path, shards) if shards else _read_checkpoint(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_checkpoint(path: Path) -> Centres:
    directory, manifest = checkpoint.find(path)
    if manifest["head"].get("sub_centers", 1) > 1:
        raise ConvertError(f"{directory} has sub_centers={manifest['head']['sub_centers']}: files have one row a class")
    saved = checkpoint.metadata(directory)
    structure: dict[str, Any] = {"head": None}
    checkpoint.read(directory, structure)
    tensors = {}
    for key, stored in saved.items():
        if key.startswith("head.") and isinstance(stored, TensorStorageMetadata):
            tensors[key.removeprefix("head.")] = Rows(
                stored.properties.dtype, tuple(stored.size), _checkpoint_pieces(directory, key, stored)
            )
    values = {"seed": manifest["head"]["seed"], "step": structure["head"]["step"]}
    if "optimizer" in structure["head"]:
        values["optimizer"] = structure["head"]["optimizer"]
    return Centres(tensors, values)


def _checkpoint_pieces(directory: Path, key: str, stored: TensorStorageMetadata) -> Callable[[], Iterator[Tensor]]:
    def pieces() -> Iterator[Tensor]:
        for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets[0]):
            rows = torch.empty(chunk.sizes, dtype=stored.properties.dtype)
            checkpoint.read(directory, {key: checkpoint.RowShard(rows, chunk.offsets[0], stored.size[0])})
            yield rows

    return pieces


def _read_insightface(path: Path, shards: dict[int, Path]) -> Centres:
    if sorted(shards) != list(range(len(shards))):
        raise ConvertError(f"{path} must have the shards of ranks 0 to {max(shards)}; got those of {sorted(shards)}")
    weights = [_insightface_weight(shards[rank]) for rank in range(len(shards))]
    num_classes, dim = sum(len(weight) for weight in weights), weights[0].shape[1]
    counts = [len(weight) for weight in weights]
    if counts != Sharding(num_classes, len(shards)).counts() or any(weight.shape[1] != dim for weight in weights):
        shapes = [tuple(weight.shape) for weight in weights]
        raise ConvertError(f"{path}: the shards must split the classes evenly, the first ones one more; got {shapes}")
    return Centres({"weight": Rows(weights[0].dtype, (num_classes, dim), lambda: iter(weights))})


def _insightface_weight(path: Path) -> Tensor:
    state = _load(path)
    state = state.get("state_dict_softmax_fc", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not isinstance(state.get("weight"), Tensor) or state["weight"].dim() != 2:
        raise ConvertError(f"{path} has no state_dict_softmax_fc with a weight (num_local, D)")
    weight: Tensor = state["weight"]
    check_stored(path, "weight", weight)
    return weight


def _load(path: Path) -> Any:
    try:
        return load_torch(path, mmap=True)
    except DataError as error:
        raise ConvertError(f"{path} cannot be read as a file of tensors: {error}") from None


def _read_safetensors(path: Path) -> Centres:
    try:
        tensors, metadata = safetensors.read(path)
    except DataError as error:
        raise ConvertError(str(error)) from None
    if "weight" not in tensors:
        raise ConvertError(f"{path} has no weight; it has {', '.join(tensors) or 'nothing'}")
    with file_errors(path):
        values = json.loads(metadata.get("fused_arcface", "{}"))
    _check_stored(path, tensors, values)
    return Centres({name: _whole(tensor) for name, tensor in tensors.items()}, values)


def _check_stored(path: Path, tensors: dict[str, Tensor], values: Any) -> None:
    """Check that a file has rows of one count and plain numbers: it may come from anywhere."""
    weight = tensors["weight"]
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ConvertError(f"{path}: weight must be numbers (C, D); it is {tuple(weight.shape)} {weight.dtype}")
    for name, tensor in tensors.items():
        if tensor.shape[:1] != weight.shape[:1]:
            raise ConvertError(f"{path}: {name} must have {len(weight)} rows, as weight; it is {tuple(tensor.shape)}")
    if not isinstance(values, dict):
        raise ConvertError(f"{path}: what fused_arcface keeps there must be an object; it is a {type(values).__name__}")
    for name in values.keys() & {"seed", "step"}:
        if type(values[name]) is not int or not 0 <= values[name] < 2**63:
            raise ConvertError(f"{path}: {name} must be a whole number >= 0 and < 2^63; got {values[name]!r:.60}")
    optimizer = values.get("optimizer", {})
    plain = (int, float, str, bool, type(None))
    if not isinstance(optimizer, dict) or not all(isinstance(each, plain) for each in optimizer.values()):
        raise ConvertError(f"{path}: optimizer must be an object of numbers and texts")


def _read_torch(path: Path) -> Centres:
    state = _load(path)
    if isinstance(state, dict) and isinstance(state.get("W"), Tensor):  # pytorch-metric-learning 2: (D, C)
        check_stored(path, "W", state["W"])
        return Centres({"weight": _whole(state["W"].T)})
    if isinstance(state, dict) and ("state_dict_softmax_fc" in state or isinstance(state.get("weight"), Tensor)):
        return Centres({"weight": _whole(_insightface_weight(path))})
    raise ConvertError(f"{path} has neither weight (C, D) nor pytorch-metric-learning's W (D, C)")


def _whole(tensor: Tensor) -> Rows:
    return Rows(tensor.dtype, tuple(tensor.shape), lambda: iter([tensor]))


def merge(sources: Sequence[Centres]) -> Centres:
    """All classes of all sources, each source's ids after those of the one before; only the tensors that all have.

    Raises:
        ConvertError: sources of different embedding dimensions.
    """
    if len(sources) == 1:
        return sources[0]
    for source in sources[1:]:
        own, first = source.tensors["weight"].shape[1], sources[0].tensors["weight"].shape[1]
        if own != first:
            raise ConvertError(f"sources must have the same embedding dimension; got {first} and {own}")
    tensors = {}
    for name in set.intersection(*(set(source.tensors) for source in sources)):
        parts = [source.tensors[name] for source in sources]
        if all(part.dtype == parts[0].dtype for part in parts) or name == "weight":
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            tensors[name] = Rows(parts[0].dtype, shape, _chain(parts))
    return Centres(tensors, dict(sources[0].values))


def _chain(parts: Sequence[Rows]) -> Callable[[], Iterator[Tensor]]:
    return lambda: (piece for part in parts for piece in part.pieces())


def grow(source: Centres, num_classes: int, seed: int) -> Centres:
    """``source`` with new classes after its own, up to ``num_classes``: centres as a new head's, keyed by seed and
    class id, without momentum. The kept rows are unchanged.

    Raises:
        ConvertError: fewer classes than the source has.
    """
    kept = source.num_classes
    if num_classes < kept:
        raise ConvertError(f"classes must be >= {kept}, those of the source; got {num_classes}")

    def new_rows(name: str, rows: Rows) -> Callable[[], Iterator[Tensor]]:
        def pieces() -> Iterator[Tensor]:
            for start in range(kept, num_classes, _NEW_ROWS):
                piece = torch.zeros(min(_NEW_ROWS, num_classes - start), *rows.shape[1:], dtype=rows.dtype)
                if name == "weight":
                    fill_normal(piece, seed, start, std=0.01)
                yield piece

        return pieces

    tensors = {}
    for name, rows in source.tensors.items():
        added = Rows(rows.dtype, (num_classes - kept, *rows.shape[1:]), new_rows(name, rows))
        tensors[name] = Rows(rows.dtype, (num_classes, *rows.shape[1:]), _chain([rows, added]))
    return Centres(tensors, dict(source.values))


def write(centres: Centres, path: str | os.PathLike[str]) -> Path:
    """One safetensors file, for a path that ends so; else a checkpoint in the root ``path``. Either appears when it is
    whole.

    Returns:
        The file or the checkpoint's directory.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        layout = {name: (rows.dtype, rows.shape) for name, rows in centres.tensors.items()}
        metadata = {"format": "pt", "fused_arcface": json.dumps(centres.values)}
        with safetensors.Writer(path, layout, metadata) as writer:
            for name, rows in centres.tensors.items():
                writer.write(name, rows.pieces())
        return path
    options = {
        "num_classes": centres.num_classes,
        "embedding_dim": centres.tensors["weight"].shape[1],
        "seed": centres.values.get("seed", 0),
    }
    shards = {}
    for name, rows in centres.tensors.items():
        shards[name] = checkpoint.RowShard.of_pieces([piece.to(rows.dtype).contiguous() for piece in rows.pieces()])
    values = {name: value for name, value in centres.values.items() if name != "seed"}
    return checkpoint.save_centres(path, shards, {"step": 0, **values}, options)


def convert(
    sources: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    seed: int | None = None,
) -> Path:
    """:func:`read` the sources, :func:`merge` and :func:`grow` them, :func:`write` the result.

    Args:
        sources: paths.
        destination: a safetensors file or a checkpoint root.
        num_classes: to grow to; None: as many as the sources have.
        seed: of the new classes' centres and of the head that will resume; None: the source's, or 0.

    >>> import tempfile, torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"W": torch.randn(8, 100)}, folder / "loss.pt")  # pytorch-metric-learning's, (D, C)
    >>> read(convert([folder / "loss.pt"], folder / "centers.safetensors")).num_classes
    100
    """
    centres = merge([read(source) for source in sources])
    if seed is not None or "seed" not in centres.values:
        centres.values["seed"] = seed or 0
    if num_classes is not None:
        centres = grow(centres, num_classes, centres.values["seed"])
    return write(centres, destination)
