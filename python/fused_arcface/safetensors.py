"""Reading and writing safetensors files row by row, so that class centres larger than memory pass through.

The format: a little-endian length, that many bytes of JSON naming each tensor's dtype, shape and place, then the
tensors (https://github.com/huggingface/safetensors). Nothing in such a file is executed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, mapped from the file and read when they are used, and the texts stored beside them.

    Raises:
        ValueError: a file of another kind, or a truncated one.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError(f"{path} is not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise ValueError(f"{path} is truncated: {name} must end at byte {end}; the file has {size}")
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, which is none of {', '.join(_DTYPES)}")
        storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=end)
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)[begin:end]
        if begin % _DTYPES[entry["dtype"]].itemsize:  # other programs may not have aligned it
            flat = flat.clone()
        tensors[name] = flat.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors, metadata


class Writer:
    """Writes tensors of known shapes in pieces, in the order they were named, into a file that appears when it is
    whole.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Writer(folder + "/x.safetensors", {"weight": (torch.float32, (3, 2))}) as writer:
    ...         writer.write("weight", [torch.zeros(1, 2), torch.ones(2, 2)])
    ...     read(folder + "/x.safetensors")[0]["weight"].sum()
    tensor(4.)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: dict[str, str] | None = None,
    ) -> None:
        self._path, self._partial = Path(path), Path(f"{os.fspath(path)}.partial")
        self._expected = [(name, dtype, math.prod(shape)) for name, (dtype, shape) in tensors.items()]
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
        self._file = self._partial.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """The next tensor, as pieces of its first dimension in order; converted to the dtype it was named with."""
        expected, dtype, remaining = self._expected.pop(0)
        if name != expected:
            raise ValueError(f"the next tensor must be {expected}; got {name}")
        for piece in pieces:
            flat = piece.detach().to("cpu", dtype).contiguous().flatten()
            remaining -= flat.numel()
            self._file.write(flat.view(torch.uint8).numpy().tobytes())
        if remaining != 0:
            raise ValueError(f"{name} must be written in full; {remaining} elements are missing")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None and not self._expected:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self._path)
        else:
            self._file.close()
            self._partial.unlink()
