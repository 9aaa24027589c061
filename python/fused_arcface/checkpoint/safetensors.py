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
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..base.dtypes import DTYPES
from ..base.files import replacing
from ..base.reading import DataError, check_regular, file_errors, said
from .centers import Rows
from .storage import bytes_of

_MOST_TENSORS = 10_000


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, mapped from the file and read when they are used, and the texts stored beside them.

    Raises:
        DataError: if the file is of another kind or truncated, or its tensors overlap or leave gaps.
    """
    check_regular(path)
    with file_errors(path), _utf8_name(path) as name:
        try:
            with safe_open(name, framework="pt") as file:
                names = file.keys()
                if len(names) > _MOST_TENSORS:
                    raise DataError(f"{path} must have <= {_MOST_TENSORS} tensors; it has {len(names)}")
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        except SafetensorError as error:
            raise DataError(f"{path} is not a safetensors file, or it is truncated: {said(error)}") from None


@contextlib.contextmanager
def _utf8_name(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a name of the file in UTF-8: the library takes no other, while names on a disk are any bytes."""
    name = os.fspath(path)
    if not any("\ud800" <= letter <= "\udfff" for letter in name):  # Python's letters for other bytes
        yield name
    else:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"


def write(path: str | os.PathLike[str], tensors: Mapping[str, Rows], metadata: dict[str, str] | None = None) -> None:
    """Write tensors piece by piece, and texts beside them. The file appears when it is whole.

    Each piece is converted to its tensor's dtype.

    Raises:
        ValueError: if the pieces of a tensor do not have as many elements as its shape.

    >>> import tempfile, torch
    >>> rows = Rows(torch.float32, (3, 2), lambda: iter([torch.zeros(1, 2), torch.ones(2, 2)]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(folder + "/x.safetensors", {"weight": rows})
    ...     read(folder + "/x.safetensors")[0]["weight"].sum()
    tensor(4.)
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, rows in tensors.items():
        end = offset + rows.dtype.itemsize * math.prod(rows.shape)
        dtype = DTYPES[rows.dtype].safetensors
        header[name] = {"dtype": dtype, "shape": list(rows.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, rows in tensors.items():
            remaining = math.prod(rows.shape)
            for piece in rows.pieces():
                file.write(bytes_of(piece.to(rows.dtype)))
                remaining -= piece.numel()
            if remaining != 0:
                raise ValueError(f"{name} must be written in full; {remaining} elements are missing")
