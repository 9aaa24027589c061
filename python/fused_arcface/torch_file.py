"""Reading what ``torch.save`` wrote, from anywhere: tensors and plain values, nothing that executes."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .reading import DataError, check_regular, file_errors


def load_torch(path: str | os.PathLike[str], *, mmap: bool = False) -> Any:
    """Return what a ``.pt`` file holds, on the CPU.

    torch stores its files without compression, so what unpacks to more than the file's size is none of its own.

    Args:
        path: of the file.
        mmap: map tensors from the file and read them when they are used.

    Raises:
        DataError: it cannot be read, is of another kind, or holds more than tensors and plain values.
    """
    size = check_regular(path)
    with file_errors(path), _foreign(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    raise DataError(f"{path} must have its tensors uncompressed, as torch.save writes them")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


@contextlib.contextmanager
def _foreign(path: str | os.PathLike[str]) -> Iterator[None]:
    """Replace torch's text, which advises to run what the file holds."""
    try:
        yield
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} is no file of tensors and plain values, or a damaged one; nothing of it was executed"
        ) from None


def check_stored(path: str | os.PathLike[str], name: str, tensor: Tensor) -> None:
    """Check that a tensor has an element in the file for each one of its shape: by strides of 0 a file of some bytes
    can claim any size.

    Raises:
        DataError: it has not.

    >>> check_stored("a.pt", "weight", torch.zeros(1, 4).expand(10**12, 4))
    Traceback (most recent call last):
    ...
    fused_arcface.reading.DataError: a.pt: weight is (1000000000000, 4), of which the file has 16 bytes
    """
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        raise DataError(f"{path}: {name} is {tuple(tensor.shape)}, of which the file has {stored} bytes")
