"""Reader of checkpoints of format 1, which torch.distributed.checkpoint has pickled. It does not run the pickles.

``.metadata`` is a pickle. A pickle is a program: it names functions, and its reader calls them.
:mod:`fused_arcface.base.pickles` calls nothing: a name stays a name, and a call becomes a record of its name and
arguments. Each value and each part of a tensor is a zip archive as ``torch.save`` writes it. After the checks of
:mod:`fused_arcface.base.torch_files` torch's own reader of weights takes tensors and plain values from it. Values with
other objects need trust.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..base import pickles, torch_files
from ..base.pickles import Admitted, Damaged, Name
from .storage import METADATA, CheckpointError, FileRecord, Part, TensorReader, bytes_of, numbers, to_metadata
from .structure import _Stored

_MOST_VALUES = 1_000_000  # in one value, and one more for each byte: references can repeat a value without end


class NeedsTrust(CheckpointError):
    """A checkpoint holds a value that only running its code can bring back."""


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


ADMITTED = Admitted(
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
    """Read a checkpoint of format 1.

    Args:
        directory: directory of the checkpoint.
        files: its files, with their sizes on disk.
        trust: run the code that its values may hold.

    Raises:
        ValueError, TypeError, KeyError and others: if ``.metadata`` is damaged or does not fit the files.
    """

    def __init__(self, directory: Path, files: dict[str, FileRecord], trust: bool) -> None:
        self._directory, self._trust = directory, trust
        table = (directory / METADATA).read_bytes()
        saved = _state(pickles.read_pickle(io.BytesIO(table), len(table), ADMITTED), "Metadata")
        places = {}
        for index, info in saved["storage_data"].items():
            key, info = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
            start, length = numbers([info["offset"], info["length"]])
            offset = None if key.get("offset") is None else _size(key["offset"])
            places[(_text(key["fqn"]), offset)] = (str(info["relative_path"]), start, length)
        tensors: dict[str, Any] = {}
        self._values: dict[str, Part] = {}
        for key, stored in saved["state_dict_metadata"].items():
            if stored.name.name == "BytesStorageMetadata":
                self._values[key] = Part(*places[(key, None)], torch.uint8, ())
                continue
            table, parts = _state(stored, "TensorStorageMetadata"), []
            for chunk in table["chunks"]:
                state = _state(chunk, "ChunkStorageMetadata")
                offsets, sizes = _size(state["offsets"]), _size(state["sizes"])
                file, start, length = places[(key, offsets)]
                parts.append({"offsets": offsets, "sizes": sizes, "file": file, "start": start, "length": length})
            dtype = _state(table["properties"], "TensorProperties")[0].name
            tensors[key] = {"dtype": dtype, "size": _size(table["size"]), "parts": parts}
        self.metadata, self.names = to_metadata(tensors, files, self._values.values()), set(self._values)

    def value(self, name: str) -> Any:
        place = self._values[name]
        value = self._load(name, place, self._trust)
        count, most, waiting = 1, _MOST_VALUES + place.length, [value]
        while waiting:  # go through all parts, as a user of the value will
            each = waiting.pop()
            if isinstance(each, _Stored) and not isinstance(vars(each).get("key"), str):
                raise ValueError(f"{name} has something else in the place of a tensor's name")  # a key of any depth
            inner = [*each.keys(), *each.values()] if isinstance(each, dict) else each
            if isinstance(inner, list | tuple | set | frozenset):
                count += len(inner)
                if count > most:
                    raise ValueError(f"{name} repeats a value without end")
                waiting.extend(inner)
        return value

    def check(self) -> None:
        for name in self.names:
            self.value(name)
        for part in self.metadata.storage_data.values():
            self._load(part.file, part)

    def pieces(self, part: Part, begin: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes of a part, which is read to its end: an archive has one checksum for all of it."""
        tensor = self._load(part.file, part)
        if not isinstance(tensor, Tensor) or tensor.dtype != part.dtype or tuple(tensor.shape) != part.sizes:
            raise ValueError(f"a tensor in {part.file} is another than {METADATA} says")
        torch_files.check_stored(part.file, "a tensor", tensor)
        yield bytes_of(tensor)[begin:end]

    def _load(self, name: str, place: Part, trust: bool = False) -> Any:
        """Return the object that ``torch.save`` wrote into a part of a file. Errors name it ``name``."""
        with (self._directory / place.file).open("rb") as file, safe_globals([_Stored, frozenset]):
            window: Any = io.BufferedReader(_Window(file, place.start, place.length))
            if not trust:
                torch_files.check_archive(name, window, place.length)
            torch_files.check_sums(name, window)
            if not trust:
                window.seek(0)
                objects = sorted(get_unsafe_globals_in_checkpoint(window))
                if objects:
                    raise NeedsTrust(f"{name} holds {', '.join(objects)}, which only running its code can bring back")
            window.seek(0)
            return torch.load(window, map_location="cpu", weights_only=not trust)


def _state(made: Any, name: str) -> Any:
    if not isinstance(made, _Made) or made.name.name != name:
        raise ValueError(f"it has something else in the place of {name}")
    return made.state


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the name of a tensor is a {type(value).__name__}")
    return value


def _size(made: Any) -> tuple[int, ...]:
    if not isinstance(made, _Made) or made.name != Name("torch", "Size"):
        raise ValueError("it has something else in the place of a size")
    return numbers(made.arguments[0])
