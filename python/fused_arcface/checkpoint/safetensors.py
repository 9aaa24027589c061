"""Read and write safetensors files in pieces, so that class centers may be larger than memory.

The library of that name reads and checks (https://github.com/huggingface/safetensors). It writes only whole files from
memory, so the writer is here. A file is a little-endian length, that many bytes of JSON with each tensor's dtype, shape
and place, then the tensors. Nothing in such a file is executed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..base.dtypes import DTYPES
from ..base.files import replacing
from ..base.reading import DataError, check_regular, file_errors, said

_MOST_TENSORS = 10_000


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, mapped from the file and read when they are used, and the texts stored beside them.

    Raises:
        DataError: if the file is of another kind or truncated, or its tensors overlap or leave gaps.
    """
    check_regular(path)
    with file_errors(path), _foreign(path), _utf8_name(path) as name, safe_open(name, framework="pt") as file:
        names = file.keys()
        if len(names) > _MOST_TENSORS:
            raise DataError(f"{path} must have <= {_MOST_TENSORS} tensors; it has {len(names)}")
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


@contextlib.contextmanager
def _utf8_name(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a name of the file in UTF-8: the library takes no other, while names on a disk are any bytes."""
    name = os.fspath(path)
    if not any("\ud800" <= letter <= "\udfff" for letter in name):  # Python's letters for other bytes
        yield name
    else:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"


@contextlib.contextmanager
def _foreign(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise DataError(f"{path} is not a safetensors file, or it is truncated: {said(error)}") from None


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str],
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str] | None = None,
) -> Iterator[Writer]:
    """Open a file that appears when it is whole, for tensors of known dtypes and shapes.

    Raises:
        ValueError: at the end, if a tensor has not been written.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with writing(folder + "/x.safetensors", {"weight": (torch.float32, (3, 2))}) as writer:
    ...         writer.write("weight", [torch.zeros(1, 2), torch.ones(2, 2)])
    ...     read(folder + "/x.safetensors")[0]["weight"].sum()
    tensor(4.)
    """
    with replacing(path) as file:
        writer = Writer(file, tensors, metadata)
        yield writer
        writer.check_complete()


class Writer:
    """Write tensors in pieces, in the order in which they were named; see :func:`writing`."""

    def __init__(
        self,
        file: BinaryIO,
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: dict[str, str] | None,
    ) -> None:
        self._file = file
        self._expected = [(name, dtype, math.prod(shape)) for name, (dtype, shape) in tensors.items()]
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": DTYPES[dtype].safetensors, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write the next tensor, in pieces of its first dimension in order, each converted to the named dtype.

        Raises:
            ValueError: if another tensor is next, or the pieces do not have as many elements as its shape.
        """
        expected, dtype, remaining = self._expected.pop(0)
        if name != expected:
            raise ValueError(f"the next tensor must be {expected}; got {name}")
        for piece in pieces:
            flat = piece.detach().to("cpu", dtype).contiguous().flatten()
            remaining -= flat.numel()
            self._file.write(flat.view(torch.uint8).numpy().tobytes())
        if remaining != 0:
            raise ValueError(f"{name} must be written in full; {remaining} elements are missing")

    def check_complete(self) -> None:
        """Raise ValueError if a tensor has not been written."""
        if self._expected:
            raise ValueError(f"{self._expected[0][0]} must be written before the file is closed")
