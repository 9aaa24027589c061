"""Arrays in ``.npz`` and ``.safetensors`` files, for :mod:`fused_arcface.app.data.embedding_sets`.

A ``.npz`` states the sizes of its arrays. They are checked before memory is taken, also for compressed arrays.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fused_arcface.base.files import replacing
from fused_arcface.base.reading import DataError, check_regular, file_errors, open_regular
from fused_arcface.checkpoint import safetensors
from fused_arcface.checkpoint.centers import Rows

Contents = tuple[dict[str, Tensor], list[str] | None]
"""Tensors by name, and the names of images if the file has them."""
NAMES = ("embeddings", "labels", "pairs", "same")
_PATHS = "paths"

_SLACK = 1 << 26
_EXPANSION = 8
"""A ``.npz`` may unpack to 64 MiB plus eight times its size. Only names and labels compress well, not embeddings."""


def _write_safetensors(path: Path, tensors: dict[str, Tensor], paths: list[str]) -> None:
    rows = {name: Rows.of(tensor) for name, tensor in tensors.items()}
    safetensors.write(path, rows, {_PATHS: json.dumps(paths)})


def _read_safetensors(path: Path) -> Contents:
    found, metadata = safetensors.read(path)
    tensors = {name: _plain(path, name, found[name]) for name in NAMES if name in found}
    with file_errors(path):
        paths = json.loads(metadata.get(_PATHS, "null"))
    if paths is not None and not (isinstance(paths, list) and all(isinstance(each, str) for each in paths)):
        raise DataError(f"{path}: {_PATHS} must be a list of texts")
    return tensors, paths


def _plain(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype.is_complex:
        raise DataError(f"{path}: {name} must be numbers; it is {tensor.dtype}")
    return tensor.float() if tensor.is_floating_point() else tensor.long()


def _write_npz(path: Path, tensors: dict[str, Tensor], paths: list[str]) -> None:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    with replacing(path) as file:
        np.savez(file, **arrays, paths=np.array(paths, dtype=np.str_))


def _read_npz(path: Path) -> Contents:
    limit = _SLACK + _EXPANSION * check_regular(path)
    tensors: dict[str, Tensor] = {}
    paths = None
    with open_regular(path) as file, file_errors(path), zipfile.ZipFile(file) as archive:
        for name in (*NAMES, _PATHS):
            if f"{name}.npy" not in archive.namelist():
                continue
            entry = archive.getinfo(f"{name}.npy")
            limit -= entry.file_size
            if limit < 0:
                raise DataError(f"{path}: {name} must have fewer bytes for a file of this size; got {entry.file_size}")
            array = _read_npy(path, archive, entry, "US" if name == _PATHS else "biuf")
            if name == _PATHS:
                rows = tensors["embeddings"].shape[:1] if "embeddings" in tensors else ()
                if array.shape == rows:  # others are not used, and a text takes more memory here than in the file
                    paths = [str(each) for each in array]
            else:
                kind = np.float32 if array.dtype.kind == "f" else np.int64
                tensors[name] = torch.from_numpy(np.ascontiguousarray(array, kind))
    return tensors, paths


def _read_npy(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, kinds: str) -> npt.NDArray[Any]:
    """Read an array whose dtype is of one of ``kinds``, if its header fits the length of its entry."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{path}: {entry.filename} must be stored or deflated, as NumPy writes it")
    with archive.open(entry) as packed:
        version = np.lib.format.read_magic(packed)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(packed)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(packed)
        if dtype.kind not in kinds or dtype.hasobject or (dtype.itemsize == 0 and 0 not in shape):
            raise DataError(f"{path}: {entry.filename} must not have elements of type {dtype}")
        left = entry.file_size - packed.tell()
        if math.prod(shape) * dtype.itemsize != left:
            raise DataError(f"{path}: {entry.filename} must have the bytes of {shape} {dtype}; it has {left}")
    with archive.open(entry) as packed:
        return np.lib.format.read_array(packed, allow_pickle=False)


class FileFormat(NamedTuple):
    """The functions that read and write one kind of file."""

    read: Callable[[Path], Contents]
    """Return the tensors called as in :data:`NAMES`, fp32 or int64, and the names of images. Raise DataError if the
    file cannot be read, or has arrays of other kinds under these names."""
    write: Callable[[Path, dict[str, Tensor], list[str]], None]


FORMATS = {
    ".npz": FileFormat(_read_npz, _write_npz),
    ".safetensors": FileFormat(_read_safetensors, _write_safetensors),
}
SUFFIXES = tuple(FORMATS)
EMBEDDING_FILES = " or ".join(SUFFIXES)
"""The suffixes for messages and help texts."""
