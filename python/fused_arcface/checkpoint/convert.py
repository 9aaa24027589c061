"""Class centers between this package's checkpoints, safetensors files and other projects' files.

Sets of identities can be joined and grown on the way. Tensors pass in pieces, of which a few are in memory at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from .. import checkpoint
from ..base.checks import check_seed
from . import safetensors, stored
from .centers import Centers, ConvertError, ConvertOptionError, grow, keep_dominant, merge
from .sources import read


def read_dominant(path: str | os.PathLike[str]) -> Tensor:
    """Return the tensor ``dominant`` (C,) of a safetensors file.

    Raises:
        ConvertError: if the file has none, or is of another kind.
    """
    tensors, _ = safetensors.read(path)
    if "dominant" not in tensors:
        raise ConvertError(f"{path} has no tensor 'dominant' (C,); it has {', '.join(tensors) or 'nothing'}")
    return tensors["dominant"]


def write(centers: Centers, path: str | os.PathLike[str], center_storage: str | os.PathLike[str] | None = None) -> Path:
    """Write a file, if the path ends with ``.safetensors``, otherwise a checkpoint in the root ``path``.

    Either appears when it is whole. With ``center_storage``, a new or empty folder gets the rows of the checkpoint.

    Returns:
        The file or the checkpoint's directory.

    Raises:
        ConvertError: if ``path`` has another suffix and is not a folder.
        CheckpointError: if the checkpoint or ``center_storage`` cannot be written. Nothing of them is left.
    """
    path, tensors = Path(path), centers.tensors
    one_file = _is_one_file(path)
    if one_file and center_storage is not None:
        raise ConvertOptionError(f"center_storage is for a folder of checkpoints; the destination is {path}")
    if center_storage is not None and "optimizer" not in centers.values:
        raise ConvertOptionError(
            "center_storage needs a source with the state of a CenterSGD, whose momentum has its place in the file: "
            "write a checkpoint without center_storage, and load it into a head that has one"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if one_file:
        safetensors.write(path, tensors, {"format": "pt", "fused_arcface": json.dumps(centers.values)})
        return path
    if center_storage is None:
        return checkpoint.save_centers(path, centers)
    with stored.new_store(Path(center_storage), tensors, centers.values.get("seed", 0), path) as reference:
        return checkpoint.save_centers(path, centers, reference)


def _is_one_file(path: Path) -> bool:
    """Return whether a destination is one file. A folder of checkpoints has no suffix, or is there already."""
    if path.suffix.lower() == ".safetensors":
        return True
    if not path.is_dir() and (path.suffix or path.exists()):
        raise ConvertOptionError(f"the destination must be a .safetensors file or a folder of checkpoints; got {path}")
    if (path / "config.toml").exists():
        raise ConvertOptionError(f"the destination must be a folder of checkpoints; {path} is a training run")
    return False


def convert(
    sources: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    seed: int | None = None,
    sub_centers: int | None = None,
    embedding_dim: int | None = None,
    dominant: str | os.PathLike[str] | None = None,
    trust: bool = False,
    center_storage: str | os.PathLike[str] | None = None,
    noted: Callable[[str], None] | None = None,
) -> Path:
    """:func:`read` the sources, :func:`merge` and :func:`grow` them, :func:`write` the result.

    Args:
        sources: paths.
        destination: a safetensors file or a checkpoint root.
        num_classes: number of classes to grow to; None: as many as the sources have.
        seed: seed of the new classes' centers and of the head that will resume, in [0, 2^63); None: the source's, or 0.
        sub_centers: see :func:`read`.
        embedding_dim: see :func:`read`.
        dominant: a file that :func:`read_dominant` reads: the one center of each class to keep, see
            :func:`keep_dominant`.
        trust: see :func:`read`.
        center_storage: see :func:`write`.
        noted: called with a sentence about each part of the sources that the result lacks, such as momentum.

    Raises:
        FileNotFoundError: if a source is not there.
        ConvertError, CheckpointError: if a source is of no known kind, or the destination or seed is wrong.

    >>> import tempfile, torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"W": torch.randn(8, 100)}, folder / "loss.pt")  # pytorch-metric-learning's, (D, C)
    >>> read(convert([folder / "loss.pt"], folder / "centers.safetensors")).num_classes
    100
    """
    _is_one_file(Path(destination))
    try:
        own_seed = {} if seed is None else {"seed": check_seed(seed)}
    except (TypeError, ValueError) as error:
        raise ConvertOptionError(str(error)) from None
    centers = merge([read(source, sub_centers, embedding_dim=embedding_dim, trust=trust) for source in sources])
    dim = centers.tensors["weight"].shape[1]
    if embedding_dim not in (None, dim):
        raise ConvertOptionError(f"the sources must have centers of embedding_dim={embedding_dim}; they have {dim}")
    centers.values = {"seed": 0, **centers.values, **own_seed}
    if noted is not None:
        for note in centers.notes:
            noted(note)
    if dominant is not None:
        centers = keep_dominant(centers, read_dominant(dominant))
    if num_classes is not None:
        centers = grow(centers, num_classes, centers.values["seed"])
    return write(centers, destination, center_storage)
