"""Class centers between this package's checkpoints, safetensors files and other projects' files.

Sets of identities can be joined and grown on the way.

Tensors pass in pieces: no more than some of them are in memory at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..base.checks import check_size, check_sub_centers
from ..base.keyed_random import CENTER_STD, fill_normal
from ..base.reading import DataError, file_errors
from ..base.suggest import missing_path
from ..parallel.sharding import Sharding
from ..store.folder import layout_of
from . import other_projects, safetensors, stored
from .other_projects import INSIGHTFACE
from .row_shard import StreamedRows

_RUN_CHECKPOINTS = "checkpoints"  # in the folder of a training run
_NEW_ROWS = 1 << 16  # drawn at once


class ConvertError(DataError):
    """A source that is not what its place or name says, or sources that do not go together."""


class ConvertOptionError(ConvertError):
    """An option that is out of its range, or that the sources do not allow."""


@dataclass
class Rows:
    """A tensor with as many rows for each class as it has centers."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """(C_total·sub_centers, ...)"""
    pieces: Callable[[], Iterator[Tensor]]
    """Its rows in order."""


@dataclass
class Centers:
    """Class centers and, from a checkpoint, what else belongs to them."""

    tensors: dict[str, Rows]
    """``weight`` (C_total·sub_centers, D), the centers of a class one after another, and, of a fused optimizer,
    ``momentum_buffer`` and ``momentum_scale``."""
    values: dict[str, Any] = field(default_factory=dict)
    """``step``, ``seed``, ``sub_centers`` and the fused optimizer's ``optimizer`` options, where the source has
    them."""
    notes: list[str] = field(default_factory=list)
    """Parts of the source that the result lacks, in words."""

    @property
    def sub_centers(self) -> int:
        return self.values.get("sub_centers", 1)

    @property
    def num_classes(self) -> int:
        return self.tensors["weight"].shape[0] // self.sub_centers


def read(path: str | os.PathLike[str], sub_centers: int | None = None, *, trust: bool = False) -> Centers:
    """Return the class centers of a run, a checkpoint, or a file of another kind.

    A source is a training run; a checkpoint or a root of some; a directory of insightface's shards; a safetensors file
    with ``weight`` (C, D); or a ``.pt`` file, see :func:`fused_arcface.checkpoint.other_projects.centers`.

    Args:
        path: of the source.
        sub_centers: centers of each class, one after another, in a source that does not say so itself:
            pytorch-metric-learning's SubCenterArcFaceLoss does not. None: the source's, or 1.
        trust: run the code that a checkpoint of format 1 may hold.

    Raises:
        FileNotFoundError: if nothing is there.
        ConvertError, CheckpointError: if it is of another kind, or incomplete.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(missing_path(path))
    try:
        found = _read_directory(path, trust) if path.is_dir() else _read_file(path)
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


def _read_file(path: Path) -> Centers:
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    weight, momentum = other_projects.centers(path)
    return Centers({"weight": _whole(weight)}, notes=_left_out(path) if momentum else [])


def _read_checkpoint(path: Path, trust: bool) -> Centers:
    saved = checkpoint.find(path, trust=trust)
    head = checkpoint.head_values(saved)
    tensors = {}
    for key, each in saved.tensors.items():
        if key.startswith("head."):
            tensors[key.removeprefix("head.")] = Rows(
                each.properties.dtype, tuple(each.size), _checkpoint_pieces(saved, key, each)
            )
    reference = stored.reference_of(saved, head)
    if reference is not None:
        layout = layout_of(reference.folder())
        for column in layout.columns.each:
            pieces = stored.pieces_of(reference, column.name)
            tensors[column.name] = Rows(column.dtype, (layout.num_rows, column.width), pieces)
    values = {"seed": saved.head.get("seed", 0), "step": head["step"], "sub_centers": saved.head.get("sub_centers", 1)}
    if "optimizer" in head:
        values["optimizer"] = head["optimizer"]
    return _checked(saved.directory, tensors, values)


def _checkpoint_pieces(saved: checkpoint.Saved, key: str, stored: Any) -> Callable[[], Iterator[Tensor]]:
    def pieces() -> Iterator[Tensor]:
        for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets[0]):
            rows = torch.empty(chunk.sizes, dtype=stored.properties.dtype)
            saved.read({key: checkpoint.RowShard(rows, chunk.offsets[0], stored.size[0])})
            yield rows

    return pieces


def _read_insightface(path: Path, shards: dict[int, Path]) -> Centers:
    if sorted(shards) != list(range(len(shards))):
        raise ConvertError(f"{path} must have the shards of ranks 0 to {max(shards)}; got those of {sorted(shards)}")
    found = [other_projects.centers(shards[rank]) for rank in range(len(shards))]
    weights = [weight for weight, _ in found]
    num_classes, dim = sum(len(weight) for weight in weights), weights[0].shape[1]
    counts = [len(weight) for weight in weights]
    if counts != Sharding(num_classes, len(shards)).counts() or any(weight.shape[1] != dim for weight in weights):
        shapes = [tuple(weight.shape) for weight in weights]
        raise ConvertError(f"{path}: the shards must split the classes evenly, the first ones one more; got {shapes}")
    rows = Rows(weights[0].dtype, (num_classes, dim), lambda: iter(weights))
    return Centers({"weight": rows}, notes=_left_out(path) if any(momentum for _, momentum in found) else [])


def _left_out(path: Path) -> list[str]:
    return [f"{path}: the momentum of its class centers is left out; training begins with none"]


def _read_safetensors(path: Path) -> Centers:
    tensors, metadata = safetensors.read(path)
    with file_errors(path):
        values = json.loads(metadata.get("fused_arcface", "{}"))
    return _checked(path, {name: _whole(tensor) for name, tensor in tensors.items()}, values)


def _checked(path: Path, tensors: dict[str, Rows], values: Any) -> Centers:
    """Check that a source has rows of one count and plain numbers: it may come from anywhere."""
    if "weight" not in tensors:
        raise ConvertError(f"{path} has no weight; it has {', '.join(tensors) or 'nothing'}")
    weight = tensors["weight"]
    if len(weight.shape) != 2 or not weight.dtype.is_floating_point or 0 in weight.shape:
        raise ConvertError(f"{path}: weight must be numbers (C, D); it is {weight.shape} {weight.dtype}")
    for name, rows in tensors.items():
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


def _whole(tensor: Tensor) -> Rows:
    return Rows(tensor.dtype, tuple(tensor.shape), lambda: iter([tensor]))


def merge(sources: Sequence[Centers]) -> Centers:
    """Join all classes of all sources: ids in the order of the sources, and only the tensors that all have.

    Raises:
        ConvertError: if the sources have different embedding dimensions.
    """
    if len(sources) == 1:
        return sources[0]
    for source in sources[1:]:
        own, first = source.tensors["weight"].shape[1], sources[0].tensors["weight"].shape[1]
        if own != first:
            raise ConvertError(f"sources must have the same embedding dimension; got {first} and {own}")
        if source.sub_centers != sources[0].sub_centers:
            both = f"{sources[0].sub_centers} and {source.sub_centers}"
            raise ConvertError(f"sources must have the same sub_centers; got {both}")
    tensors = {}
    for name in set.intersection(*(set(source.tensors) for source in sources)):
        parts = [source.tensors[name] for source in sources]
        if all(part.dtype == parts[0].dtype for part in parts) or name == "weight":
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            tensors[name] = Rows(parts[0].dtype, shape, _chain(parts))
    notes = [note for source in sources for note in source.notes]
    if any(name not in tensors for source in sources for name in source.tensors):
        notes.append("the momentum of the class centers is left out: not all sources have it in the same dtype")
    return Centers(tensors, dict(sources[0].values), notes)


def _chain(parts: Sequence[Rows]) -> Callable[[], Iterator[Tensor]]:
    return lambda: (piece for part in parts for piece in part.pieces())


def grow(source: Centers, num_classes: int, seed: int) -> Centers:
    """Add new classes after those of ``source``, up to ``num_classes``.

    New centers are those of a new head, keyed by seed and class id, without momentum. The kept rows are unchanged.

    Raises:
        ConvertError: if ``num_classes`` is less than the source has.
    """
    kept = source.num_classes
    if num_classes < kept:
        raise ConvertOptionError(f"classes must be >= {kept}, those of the source; got {num_classes}")

    first, last = kept * source.sub_centers, num_classes * source.sub_centers

    def new_rows(name: str, rows: Rows) -> Callable[[], Iterator[Tensor]]:
        def pieces() -> Iterator[Tensor]:
            for start in range(first, last, _NEW_ROWS):
                piece = torch.zeros(min(_NEW_ROWS, last - start), *rows.shape[1:], dtype=rows.dtype)
                if name == "weight":
                    fill_normal(piece, seed, start, CENTER_STD)
                yield piece

        return pieces

    tensors = {}
    for name, rows in source.tensors.items():
        added = Rows(rows.dtype, (last - first, *rows.shape[1:]), new_rows(name, rows))
        tensors[name] = Rows(rows.dtype, (last, *rows.shape[1:]), _chain([rows, added]))
    return Centers(tensors, dict(source.values), source.notes)


def keep_dominant(source: Centers, dominant: Tensor) -> Centers:
    """Keep one center of each class, with its momentum.

    Args:
        source: centers with several of each class.
        dominant: (C,) integers: the center to keep, as :func:`fused_arcface.sub_centers.dominant` returns it.

    Raises:
        ConvertError: if ``dominant`` does not have one center's number for each class.
    """
    count = source.sub_centers
    if dominant.dim() != 1 or len(dominant) != source.num_classes or dominant.is_floating_point():
        got = f"{tuple(dominant.shape)} {dominant.dtype}"
        raise ConvertError(f"dominant must be integers (C={source.num_classes},); got {got}")
    low, high = (int(each) for each in torch.aminmax(dominant))
    if low < 0 or high >= count:
        raise ConvertError(f"dominant must be in [0, sub_centers={count}); got {low if low < 0 else high}")
    kept = torch.arange(len(dominant)) * count + dominant.long()  # ascending rows of weight

    def chosen(rows: Rows) -> Callable[[], Iterator[Tensor]]:
        def pieces() -> Iterator[Tensor]:
            start = 0
            for piece in rows.pieces():
                first, last = torch.searchsorted(kept, torch.tensor([start, start + len(piece)])).tolist()
                yield piece[kept[first:last] - start]
                start += len(piece)

        return pieces

    tensors = {
        name: Rows(rows.dtype, (len(dominant), *rows.shape[1:]), chosen(rows)) for name, rows in source.tensors.items()
    }
    return Centers(tensors, {**source.values, "sub_centers": 1}, source.notes)


def read_dominant(path: str | os.PathLike[str]) -> Tensor:
    """Return the tensor ``dominant`` (C,) of a safetensors file.

    Raises:
        ConvertError: if the file has none, or is of another kind.
    """
    with file_errors(Path(path)):
        tensors, _ = safetensors.read(Path(path))
    if "dominant" not in tensors:
        raise ConvertError(f"{path} has no tensor 'dominant' (C,); it has {', '.join(tensors) or 'nothing'}")
    return tensors["dominant"]


def write(centers: Centers, path: str | os.PathLike[str], center_storage: str | os.PathLike[str] | None = None) -> Path:
    """Write a safetensors file, if the path ends so, otherwise a checkpoint in the root ``path``.

    Either appears when it is whole. A new folder ``center_storage`` gets the rows that belong to a checkpoint.

    Returns:
        The file or the checkpoint's directory.

    Raises:
        ConvertError: if ``path`` has another suffix and is not a folder, or no head takes the seed.
    """
    path = Path(path)
    one_file = _is_one_file(path)
    if one_file and center_storage is not None:
        raise ConvertError(f"center_storage goes with a folder of checkpoints; the destination is {path}")
    if center_storage is not None and "optimizer" not in centers.values:
        raise ConvertError(
            "center_storage needs a source with the state of a CenterSGD, whose momentum has its place in the file: "
            "write a checkpoint without center_storage, and load it into a head that has one"
        )
    seed = _checked_seed(centers.values.get("seed", 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    if one_file:
        layout = {name: (rows.dtype, rows.shape) for name, rows in centers.tensors.items()}
        metadata = {"format": "pt", "fused_arcface": json.dumps(centers.values)}
        with safetensors.writing(path, layout, metadata) as writer:
            for name, rows in centers.tensors.items():
                writer.write(name, rows.pieces())
        return path
    options = {
        "num_classes": centers.num_classes,
        "embedding_dim": centers.tensors["weight"].shape[1],
        "seed": seed,
        **({"sub_centers": centers.sub_centers} if centers.sub_centers > 1 else {}),
    }
    tensors = centers.tensors
    shards: dict[str, checkpoint.RowShard] = {}
    if center_storage is None:
        shards = {name: StreamedRows(rows.pieces(), rows.dtype, rows.shape) for name, rows in tensors.items()}
    values = {name: value for name, value in centers.values.items() if name not in ("seed", "sub_centers")}
    if center_storage is not None:
        columns = {name: (rows.dtype, rows.shape[1], rows.pieces()) for name, rows in tensors.items()}
        num_rows = tensors["weight"].shape[0]
        values[stored.STORE] = stored.make_store(Path(center_storage), columns, num_rows, seed, path)
    return checkpoint.save_centers(path, shards, {"step": 0, **values}, options)


def _is_one_file(path: Path) -> bool:
    """Return whether a destination is one file; a folder of checkpoints has no suffix, or is there already.

    Raises:
        ConvertError: if it is neither.
    """
    if path.suffix.lower() == ".safetensors":
        return True
    if not path.is_dir() and (path.suffix or path.exists()):
        raise ConvertOptionError(f"the destination must be a .safetensors file or a folder of checkpoints; got {path}")
    if (path / "config.toml").exists():
        raise ConvertOptionError(f"the destination must be a folder of checkpoints; {path} is a training run")
    return False


def _checked_seed(seed: object) -> int:
    try:
        checked = check_size("seed", seed, least=0)
    except (TypeError, ValueError) as error:
        raise ConvertOptionError(str(error)) from None
    if checked >= 1 << 63:
        raise ConvertOptionError(f"seed must be in [0, 2^63); got {checked}")
    return checked


def convert(
    sources: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    seed: int | None = None,
    sub_centers: int | None = None,
    dominant: str | os.PathLike[str] | None = None,
    trust: bool = False,
    center_storage: str | os.PathLike[str] | None = None,
    noted: Callable[[str], None] | None = None,
) -> Path:
    """:func:`read` the sources, :func:`merge` and :func:`grow` them, :func:`write` the result.

    Args:
        sources: paths.
        destination: a safetensors file or a checkpoint root.
        num_classes: to grow to; None: as many as the sources have.
        seed: of the new classes' centers and of the head that will resume, in [0, 2^63); None: the source's, or 0.
        sub_centers: see :func:`read`.
        dominant: a file that :func:`read_dominant` reads: the one center of each class to keep, see
            :func:`keep_dominant`.
        trust: see :func:`read`.
        center_storage: see :func:`write`.
        noted: called with each part of the sources that the result lacks, in words, such as momentum.

    Raises:
        FileNotFoundError: if a source is not there.
        ConvertError, CheckpointError: if a source is of no known kind, or the destination or seed cannot be.

    >>> import tempfile, torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"W": torch.randn(8, 100)}, folder / "loss.pt")  # pytorch-metric-learning's, (D, C)
    >>> read(convert([folder / "loss.pt"], folder / "centers.safetensors")).num_classes
    100
    """
    _is_one_file(Path(destination))
    if seed is not None:
        _checked_seed(seed)
    centers = merge([read(source, sub_centers, trust=trust) for source in sources])
    if seed is not None or "seed" not in centers.values:
        centers.values["seed"] = seed or 0
    centers.values["seed"] = _checked_seed(centers.values["seed"])
    if noted is not None:
        for note in centers.notes:
            noted(note)
    if dominant is not None:
        centers = keep_dominant(centers, read_dominant(dominant))
    if num_classes is not None:
        centers = grow(centers, num_classes, centers.values["seed"])
    return write(centers, destination, center_storage)
