"""Reader of checkpoints of format 1, which torch.distributed.checkpoint has pickled. It does not run the pickles.

``.metadata`` is a pickle. Each value and each part of a tensor is a zip archive as ``torch.save`` writes it. A pickle
is a program: it names functions, and its reader calls them. :mod:`fused_arcface.base.pickles` calls nothing: a name
stays a name, and a call becomes a record of its name and arguments. Values are made of these records afterwards, for
the few names that such checkpoints need. Other objects need :class:`TrustedReader`.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from ..base import pickles
from ..base.pickles import Admitted, Damaged, Name, Refused
from .storage import (
    BLOCK,
    METADATA,
    CheckpointError,
    FileRecord,
    Part,
    TensorReader,
    bytes_of,
    check_places,
    check_tensors,
    numbers,
)
from .structure import DTYPES, _Stored

_MOST_VALUES = 1_000_000  # in one pickle, and one more for each byte: references can repeat a value without end
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


class NeedsTrust(CheckpointError):
    """A checkpoint holds an object that only running its code can bring back."""


@dataclass(eq=False)
class _Made:
    """The object that a pickle makes by calling ``name`` with ``arguments``, and the state that it then sets."""

    name: Name
    arguments: Any
    state: Any = None


def _made(name: Any, arguments: tuple[Any, ...]) -> _Made:
    if not isinstance(name, Name):
        raise Damaged("it calls something that is not a name")
    return _Made(name, arguments)


def _build(made: Any, state: Any) -> None:
    if not isinstance(made, _Made):
        raise Damaged("attributes of something that has none")
    made.state = state


_ADMITTED = Admitted(
    kind="checkpoint",
    instructions=pickles.VALUES | pickles.OBJECTS,
    name=lambda name: name,
    call=_made,
    build=_build,
    persistent=lambda reference: _Made(Name("torch", "storage"), reference),
    most_instructions=20_000_000,  # 100,000 parts of tensors have some 5 million
    most_objects=10_000_000,
    most_int_bytes=255,
    room=4 << 30,
)


def _unpickle(data: bytes, what: str) -> Any:
    try:
        return pickles.read_pickle(io.BytesIO(data), len(data), _ADMITTED)
    except Refused as refused:
        raise NeedsTrust(f"{what} needs code to be read: {refused}") from None


class _Values:
    """Make values of a pickle's records, of at most ``most`` parts. Errors call the pickle ``what``."""

    def __init__(self, what: str, most: int) -> None:
        self._what, self._left = what, most

    def of(self, value: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise NeedsTrust(f"{self._what} repeats a value without end")
        if isinstance(value, list | tuple | set | frozenset):
            return type(value)(self.of(item) for item in value)
        if isinstance(value, dict):
            return {self.of(key): self.of(item) for key, item in value.items()}
        if isinstance(value, Name):
            if value.module == "torch" and value.name in DTYPES:
                return DTYPES[value.name]
            raise self._refusal(value)
        if isinstance(value, _Made):
            make = _CALLS.get((value.name.module, value.name.name))
            if make is None:
                raise self._refusal(value.name)
            return make(self.of(value.arguments), self.of(value.state))
        return value

    def _refusal(self, name: Name) -> NeedsTrust:
        return NeedsTrust(f"{self._what} holds {name.module}.{name.name}, which only running its code can bring back")


def _encoded(arguments: Any, _: Any) -> bytes:
    text, encoding = arguments
    if encoding != "latin1":
        raise ValueError(f"bytes are encoded as {encoding!r}")
    return bytes(str(text), "latin1")


def _calling(make: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda arguments, _: make(*arguments)


_CALLS: dict[tuple[str, str], Callable[[Any, Any], Any]] = {
    ("_codecs", "encode"): _encoded,
    ("collections", "OrderedDict"): _calling(dict),
    ("collections", "Counter"): _calling(Counter),
    **{
        (module, kind.__name__): _calling(kind)
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, complex)
    },
    ("torch", "Size"): lambda arguments, _: torch.Size(numbers(arguments[0])),
    ("torch", "device"): _calling(torch.device),
    (_Stored.__module__, _Stored.__name__): lambda _, state: _Stored(str(state["key"])),
}


class _Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Reader(TensorReader):
    """Read a checkpoint of format 1 without running code.

    Args:
        directory: directory of the checkpoint.
        files: its files, with their sizes on disk.

    Raises:
        NeedsTrust: if ``.metadata`` names something that no checkpoint needs.
        CheckpointError, ValueError, TypeError, KeyError and others: if it is damaged or does not fit the files.
    """

    def __init__(self, directory: Path, files: dict[str, FileRecord]) -> None:
        self._directory = directory
        saved = _state(_unpickle((directory / METADATA).read_bytes(), METADATA), "Metadata")
        places = {}
        for index, info in saved["storage_data"].items():
            key, info = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
            start, length = numbers([info["offset"], info["length"]])
            offset = None if key.get("offset") is None else _size(key["offset"])
            places[(_text(key["fqn"]), offset)] = (str(info["relative_path"]), start, length)
        tensors: dict[str, Any] = {}
        parts: dict[MetadataIndex, Part] = {}
        self.names: set[str] = set()
        self._values: dict[str, tuple[str, int, int]] = {}
        for key, stored in saved["state_dict_metadata"].items():
            if stored.name.name == "BytesStorageMetadata":
                self.names.add(key)
                self._values[key] = places[(key, None)]
                continue
            table = _state(stored, "TensorStorageMetadata")
            dtype = DTYPES[_state(table["properties"], "TensorProperties")[0].name]
            chunks = []
            for chunk in table["chunks"]:
                state = _state(chunk, "ChunkStorageMetadata")
                offsets, sizes = _size(state["offsets"]), _size(state["sizes"])
                file, start, length = places[(key, offsets)]
                if math.prod(sizes) * dtype.itemsize > length:
                    raise ValueError(f"{key} does not fit into {length} bytes")
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                parts[MetadataIndex(key, torch.Size(offsets))] = Part(file, start, length, dtype, sizes)
            tensors[key] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(_size(table["size"])), chunks
            )
        values = [Part(*place, torch.uint8, ()) for place in self._values.values()]
        check_places([*parts.values(), *values], files)
        check_tensors(tensors, len(parts))
        self.metadata = Metadata(tensors, storage_data=parts)

    def value(self, name: str) -> Any:
        with self._archive(*self._values[name]) as archive:
            data = archive.read(_member(archive, "data.pkl"))
        return _Values(name, _MOST_VALUES + len(data)).of(_unpickle(data, name))

    def check(self) -> None:
        for name in self.names:
            self.value(name)
        for part in self.metadata.storage_data.values():
            for _ in self.pieces(part, 0, math.prod(part.sizes) * part.dtype.itemsize):
                pass

    def pieces(self, part: Part, begin: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes of a part, read to its end: an archive has one checksum for all of it."""
        with self._archive(part.file, part.start, part.length) as archive:
            made = _unpickle(archive.read(_member(archive, "data.pkl")), part.file)
            if not isinstance(made, _Made) or made.name != Name("torch._utils", "_rebuild_tensor_v2"):
                raise NeedsTrust(f"{part.file} has a tensor of another kind than format 1 was written with")
            storage, offset, size, stride = made.arguments[:4]
            _, kind, key, _, _ = storage.arguments
            if _STORAGES.get(kind.name) != part.dtype or tuple(size) != part.sizes or offset != 0:
                raise ValueError(f"a tensor in {part.file} is another than {METADATA} says")
            data = _member(archive, f"data/{key}")
            length = math.prod(part.sizes) * part.dtype.itemsize
            if data.file_size < length:
                raise ValueError(f"a tensor in {part.file} has {data.file_size} bytes; it must have {length}")
            if not torch.empty_strided(part.sizes, numbers(stride), device="meta").is_contiguous():
                yield from _reordered(archive.read(data), part, tuple(stride), begin, end)
                return
            with archive.open(data) as stream:
                position = 0
                while block := bytearray(stream.read(BLOCK)):
                    first, last = max(begin - position, 0), min(end - position, len(block))
                    if first < last:
                        yield memoryview(block)[first:last]
                    position += len(block)

    @contextlib.contextmanager
    def _archive(self, file: str, start: int, length: int) -> Iterator[zipfile.ZipFile]:
        with (self._directory / file).open("rb") as stream:
            window: Any = io.BufferedReader(_Window(stream, start, length))
            with zipfile.ZipFile(window) as archive:
                if archive.read(_member(archive, "byteorder")).decode() != sys.byteorder:
                    raise ValueError(f"{file} was written on a machine of the other byte order")
                yield archive


class TrustedReader(FileSystemReader):
    """Read a checkpoint of format 1 as torch.distributed.checkpoint does: this runs the pickles."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.metadata = self.read_metadata()
        tables = self.metadata.state_dict_metadata
        self.names = {key for key, value in tables.items() if not isinstance(value, TensorStorageMetadata)}

    def value(self, name: str) -> Any:
        state: dict[str, Any] = {name: None}
        dcp_load(
            state,
            storage_reader=self,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
        return state[name]

    def check(self) -> None:
        for name in self.names:
            self.value(name)


def _state(made: Any, name: str) -> Any:
    if not isinstance(made, _Made) or made.name.name != name:
        raise NeedsTrust(f"{METADATA} has something else in the place of {name}")
    return made.state


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the name of a tensor is a {type(value).__name__}")
    return value


def _size(made: Any) -> tuple[int, ...]:
    if not isinstance(made, _Made) or made.name != Name("torch", "Size"):
        raise NeedsTrust(f"{METADATA} has something else in the place of a size")
    return numbers(made.arguments[0])


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return the member ``name`` of the archive's only folder.

    It must be stored uncompressed, so that it has no more bytes than it takes.
    """
    for each in archive.infolist():
        if each.filename.partition("/")[2] == name:
            if each.compress_type != zipfile.ZIP_STORED or each.flag_bits & 1 or each.compress_size != each.file_size:
                raise ValueError(f"{name} is compressed or encrypted")
            return each
    raise ValueError(f"{name} is missing")


def _reordered(data: bytes, part: Part, strides: tuple[int, ...], begin: int, end: int) -> Iterator[memoryview]:
    """Yield a part with elements that were saved in another order, as a channels-last convolution has them."""
    stored = torch.frombuffer(bytearray(data), dtype=part.dtype)
    rows = stored.as_strided(part.sizes, numbers(strides)).contiguous()
    yield bytes_of(rows)[begin:end]
