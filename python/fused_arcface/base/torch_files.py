"""Tensors from torch's ``.pt`` files of any version. Nothing but tensors and plain containers is taken from them."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import pickles
from .pickles import Admitted, Damaged, Name, Refused
from .reading import DataError, check_regular, open_regular

_ITEM_BYTES = {
    "Short": 2,
    "Half": 2,
    "BFloat16": 2,
    "Int": 4,
    "QInt32": 4,
    "Float": 4,
    "Long": 8,
    "Double": 8,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
}
"""Bytes of an element of torch's kinds of storage; 1 for all others."""


class TensorFileError(DataError):
    """Raised if a file is not a file of tensors, or does not hold the tensors that are wanted."""


def load(path: str | os.PathLike[str]) -> Any:
    """Return what a ``.pt`` file holds: tensors, mapped from the file where torch can do that, in plain containers.

    Raises:
        DataError: if it cannot be opened, or is a Git LFS pointer.
        TensorFileError: if it is a file of another kind, or holds other objects.
    """
    check_regular(path)
    try:
        archived = zipfile.is_zipfile(path)  # the format from before torch 1.6 is no archive, and cannot be mapped
        if archived:
            check_archive(path, path, os.path.getsize(path))
        else:
            _check_old_file(path)
        mapped = archived and not re.search("[\ud800-\udfff]", os.fspath(path))  # torch maps only names in UTF-8
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except TensorFileError:
        raise
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error) or "Unsupported operand" in str(error):  # the latter: bytes of no pickle
            raise TensorFileError(f"{path} cannot be read as a file of tensors: another kind, or damaged") from None
        raise TensorFileError(
            f"{path} holds other objects than tensors, which are not loaded: save the state_dict() of what is in it"
        ) from None
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise TensorFileError(f"{path} cannot be read as a file of tensors: {lines[0]}") from None


def check_archive(path: str | os.PathLike[str], file: str | os.PathLike[str] | BinaryIO, size: int) -> None:
    """Check that an archive unpacks to no more than its size, as torch writes it, and check its pickles.

    Errors name it ``path``. The archive itself is ``file``, of ``size`` bytes.

    Raises:
        TensorFileError: if torch's reader might take more memory than the archive has bytes, or crash.
    """
    with zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise TensorFileError(f"{path} must have its tensors uncompressed, as torch.save writes them")
        sizes: dict[str, int] = {}
        for entry in archive.infolist():
            name = entry.filename.partition("/")[2].lower()  # torch's reader finds a name in either case
            sizes[name] = min(entry.file_size, sizes.get(name, size))
        admitted = replace(_ADMITTED, persistent=partial(_seen, sizes))
        for entry in archive.infolist():
            if entry.filename.endswith("data.pkl"):
                unchecked: Any = entry
                unchecked.CRC = entry.CRC or None  # torch.serialization.set_crc32_options(False)
                with archive.open(entry) as stream:
                    _check_pickle(path, stream, entry.file_size, admitted)


def _check_old_file(path: str | os.PathLike[str]) -> None:
    """Check the five pickles of a file from before torch 1.6: number, version, machine, content and keys."""
    with open_regular(path) as file:
        for _ in range(5):
            _check_pickle(path, file, os.path.getsize(path) - file.tell(), _ADMITTED)


def _check_pickle(path: str | os.PathLike[str], stream: Any, size: int, admitted: Admitted) -> None:
    """Go through a pickle as torch's reader will. A key with 100,000 levels would end the reader by a signal."""
    try:
        pickles.read_pickle(stream, size, admitted)
    except Refused as refused:
        raise TensorFileError(f"{path} cannot be read as a file of tensors: {refused}") from None
    except Damaged:
        raise TensorFileError(f"{path} cannot be read as a file of tensors: another kind, or damaged") from None


def _seen(sizes: dict[str, int], reference: Any) -> dict[Any, Any]:
    """Check a reference to numbers of a tensor. ``sizes`` are those of an archive's entries; other files have none.

    An older torch takes the number from the reference alone, and reads past the entry's end.
    """
    pickles.check_keys([reference])
    if sizes and isinstance(reference, tuple) and len(reference) == 5:
        _, kind, key, _, count = reference
        if not isinstance(kind, Name) or not isinstance(key, str) or not isinstance(count, int):
            raise Refused("it refers to numbers in another way than torch does")
        length = count * _ITEM_BYTES.get(kind.name.removesuffix("Storage"), 1)
        stored = sizes.get(f"data/{key}".lower(), length)
        if length > stored:
            raise Refused(f"a tensor must have {length} bytes; the file has {stored}")
    return {}


def _call(function: Any, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """Refuse bytes that a number makes: torch's reader knows them, and some bytes of a file would take any memory."""
    is_number = bool(arguments) and isinstance(arguments[0], int)
    if is_number and isinstance(function, Name) and function.name == "bytearray":
        raise Refused("it makes bytes in another way than pickle does")
    _check_hashed(*arguments)
    return {}


def _check_hashed(*values: Any) -> None:
    """Check what a function may use as keys: each value, each item of a list, the first item of each pair in it."""
    items = [item for each in values if isinstance(each, list) for item in each]
    pickles.check_keys([*values, *items, *(key for item in items if isinstance(item, list) for key in item[:1])])


# Nothing is made of a call or a reference: the instructions alone are checked, all that torch's own reader knows.
_ADMITTED = Admitted(
    kind="file of tensors",
    instructions=pickles.VALUES | pickles.OLD_VALUES | pickles.OBJECTS,
    name=lambda name: name,
    call=_call,
    build=lambda value, state: _check_hashed(state),
    persistent=partial(_seen, {}),
    most_instructions=20_000_000,
    most_objects=10_000_000,
    most_int_bytes=255,
    room=1 << 30,
)


def check_sums(path: str | os.PathLike[str], file: BinaryIO | None = None) -> None:
    """Check the checksums that ``torch.save`` writes into an archive; a file from before torch 1.6 has none.

    torch itself does not compare them. This reads the whole archive, which is ``file`` if it is a part of another one.

    Raises:
        TensorFileError: if a part of the file has changed since it was written.
    """
    if not zipfile.is_zipfile(file or path):
        return
    try:
        with zipfile.ZipFile(file or path) as archive:
            for entry in archive.infolist():
                if entry.CRC == 0:  # torch.serialization.set_crc32_options(False)
                    continue
                with archive.open(entry) as part:
                    while part.read(1 << 20):
                        pass
    except Exception as error:  # zipfile and zlib have errors of many kinds
        raise TensorFileError(f"{path} is damaged: {error}") from None


def check_stored(path: str | os.PathLike[str], name: str, tensor: Tensor) -> None:
    """Check that a tensor is dense, and that the file has an element for each one of its shape.

    By strides of 0 a file of some bytes can claim any size.

    Raises:
        TensorFileError: if it is another one: sparse, quantized, or without values.

    >>> check_stored("a.pt", "weight", torch.zeros(1, 4).expand(10**12, 4))
    Traceback (most recent call last):
    ...
    fused_arcface.base.torch_files.TensorFileError: a.pt: weight is (1000000000000, 4), of which the file has 16 bytes
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantized" if tensor.is_quantized else "without values" if tensor.is_meta else str(tensor.layout)
        raise TensorFileError(f"{path}: {name} must be a dense tensor; it is {kind}")
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        raise TensorFileError(f"{path}: {name} is {tuple(tensor.shape)}, of which the file has {stored} bytes")
