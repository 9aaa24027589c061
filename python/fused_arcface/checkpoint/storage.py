"""Tensors of a checkpoint on disk, written and read as bytes, as torch.distributed.checkpoint plans it.

Each rank writes one file, ``__RANK_0.distcp``, with its parts of the tensors one after another. The first rank writes
``.metadata``: JSON of every tensor's dtype, size and parts, and of the values beside the tensors. Reading it runs no
code. Each 16 MiB of a file have a CRC-32, which is compared with the bytes when they are read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from .structure import DTYPES, from_json

BLOCK = 16 << 20
"""Bytes with one checksum: large enough to read at full speed, small enough to read little more than a shard needs."""
METADATA = ".metadata"
ALIGNMENT = 64  # of each part of a tensor in its file, so that no element lies in two blocks


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: damaged, foreign, or of another head. Nothing has been loaded from it.

    Also raised if a checkpoint cannot be written; the checkpoints before it are unchanged.
    """


@dataclass
class FileRecord:
    """Size and checksums of one file of a checkpoint."""

    size: int = 0
    crc32: list[int] = field(default_factory=list)
    """One for each block, of :data:`BLOCK` bytes when it is written."""


@dataclass(frozen=True)
class Part:
    """The place of a part of a tensor."""

    file: str
    start: int
    """First byte in the file."""
    length: int
    """In bytes."""
    dtype: torch.dtype
    sizes: tuple[int, ...]


def _append(file: BinaryIO, data: memoryview, record: FileRecord) -> None:
    """Write data at the end of a file, and bring the file's record up to date."""
    while data:
        if record.size % BLOCK == 0:
            record.crc32.append(0)
        part, data = data[: BLOCK - record.size % BLOCK], data[BLOCK - record.size % BLOCK :]
        file.write(part)
        record.crc32[-1] = zlib.crc32(part, record.crc32[-1])
        record.size += len(part)


class _AsPlanned:
    """Methods of torch's storage that do nothing here: the plans stay as they are."""

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Writer(_AsPlanned, StorageWriter):
    """Write into an existing directory.

    ``rank`` names this process's file. The first rank stores the JSON ``values`` beside the tensors.
    """

    def __init__(self, directory: Path, rank: int, values: dict[str, Any]) -> None:
        self._directory, self._rank, self._values = directory, rank, values
        self.files: dict[str, FileRecord] = {}
        """Files that this process has written, by name."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @contextlib.contextmanager
    def _new_file(self, name: str) -> Iterator[tuple[BinaryIO, FileRecord]]:
        """Open a new file with an empty record. It is on disk at the end of the block."""
        record = self.files[name] = FileRecord()
        with (self._directory / name).open("xb") as file:
            yield file, record
            file.flush()
            os.fsync(file.fileno())

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            name = f"__{self._rank}_0.distcp"
            with self._new_file(name) as (file, record):
                for item in plan.items:
                    data = bytes_of(planner.resolve_data(item))
                    _append(file, memoryview(bytes(-record.size % ALIGNMENT)), record)
                    results.append(WriteResult(item.index, len(data), (name, record.size)))
                    _append(file, data, record)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for each in results for result in each}
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)  # values are not the planner's
            parts = []
            for chunk in tensor.chunks:
                file, start = places[MetadataIndex(key, chunk.offsets)]
                parts.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": file, "start": start})
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            tensors[key] = {"dtype": dtype, "size": list(tensor.size), "parts": parts}
        text = json.dumps({"tensors": tensors, "values": self._values}, allow_nan=False)
        with self._new_file(METADATA) as (opened, record):
            _append(opened, memoryview(text.encode("ascii")), record)


def bytes_of(tensor: Any) -> memoryview:
    """Return a tensor's elements in order, as they are stored."""
    if tensor.layout != torch.strided or str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise TypeError(f"a checkpoint holds dense tensors; got {tensor.layout} of {tensor.dtype}")
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


class TensorReader(_AsPlanned, StorageReader):
    """Base class of the formats' readers: fill tensors with the bytes of stored parts."""

    metadata: Metadata
    """``storage_data`` has a :class:`Part` for each part of a tensor."""
    names: set[str]
    """Names of the values beside the tensors."""

    @abstractmethod
    def value(self, name: str) -> Any:
        """Return a structure for :func:`fused_arcface.checkpoint.structure.join`."""

    @abstractmethod
    def check(self) -> None:
        """Read everything; raise CheckpointError if something is damaged."""

    @abstractmethod
    def pieces(self, part: Part, begin: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes of a part from ``begin`` to ``end``, in order, after they have been checked."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        found = [(self.metadata.storage_data[item.storage_index], item) for item in plan.items]
        # In the order of the files, so that a block that two parts share is read once.
        for part, item in sorted(found, key=lambda each: (each[0].file, each[0].start, each[1].storage_offsets)):
            target = planner.resolve_tensor(item).detach()
            self._fill(target, part, tuple(item.storage_offsets), tuple(item.lengths))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, target: Tensor, part: Part, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        """Fill ``target`` with a box of a part. The rows that the box covers are read; if possible, into ``target``."""
        first, count = (offsets[0], lengths[0]) if part.sizes else (0, 1)
        row = math.prod(part.sizes[1:]) * part.dtype.itemsize
        whole = lengths[1:] == part.sizes[1:] and target.dtype == part.dtype
        direct = whole and target.device.type == "cpu" and target.is_contiguous()
        rows = target if direct else torch.empty((count, *part.sizes[1:])[: len(part.sizes)], dtype=part.dtype)
        flat, position = rows.view(-1).view(torch.uint8), 0
        for piece in self.pieces(part, first * row, (first + count) * row):
            flat[position : position + len(piece)] = torch.frombuffer(piece, dtype=torch.uint8)
            position += len(piece)
        if position != flat.numel():
            raise CheckpointError(f"{part.file} ends {flat.numel() - position} bytes early")
        if not direct:
            for dim in range(1, len(part.sizes)):
                rows = rows.narrow(dim, offsets[dim], lengths[dim])
            target.copy_(rows)


class Reader(TensorReader):
    """Read the files of :class:`Writer`.

    Args:
        directory: directory of the checkpoint.
        files: its files as the manifest has them, of these sizes on disk.
        block: bytes with one checksum, a multiple of 64.

    Raises:
        CheckpointError, ValueError, TypeError, KeyError: if ``.metadata`` is damaged, or does not fit the files.
    """

    def __init__(self, directory: Path, files: dict[str, FileRecord], block: int) -> None:
        self._directory, self._files, self._size = directory, files, block
        self._held: tuple[str, int, bytearray] = ("", -1, bytearray())
        count = len(files[METADATA].crc32)
        text = b"".join(self._block(METADATA, number) for number in range(count))
        stored = json.loads(text)
        self.metadata = to_metadata(stored["tensors"], files)
        self._values: dict[str, Any] = stored["values"]
        self.names = set(self._values)

    def value(self, name: str) -> Any:
        return from_json(self._values[name])

    def check(self) -> None:
        for name, record in self._files.items():
            for number in range(len(record.crc32)):
                self._block(name, number)

    def pieces(self, part: Part, begin: int, end: int) -> Iterator[memoryview]:
        position, stop = part.start + begin, part.start + end
        while position < stop:
            number = position // self._size
            base, upto = number * self._size, min(stop, (number + 1) * self._size)
            yield memoryview(self._block(part.file, number))[position - base : upto - base]
            position = upto

    def _block(self, name: str, number: int) -> bytearray:
        """Return a block of a file, checked. The last block is kept for the next call."""
        if self._held[:2] != (name, number):
            record, first = self._files[name], number * self._size
            block = bytearray(min(self._size, record.size - first))
            with (self._directory / name).open("rb") as file:
                file.seek(first)
                length = file.readinto(block)
            if length != len(block) or zlib.crc32(block) != record.crc32[number]:
                raise CheckpointError(
                    f"{self._directory} is damaged: the checksum of {name} differs in bytes {first} to "
                    f"{first + len(block) - 1}"
                )
            self._held = (name, number, block)
        return self._held[2]


def to_metadata(tensors: dict[str, Any], files: dict[str, FileRecord], values: Iterable[Part] = ()) -> Metadata:
    """Check the table of tensors, and return it in torch.distributed.checkpoint's form.

    A part has a ``length`` if it is longer than its numbers. ``values`` are the places of values beside the tensors.
    """
    found: dict[str, Any] = {}
    places: dict[MetadataIndex, Part] = {}
    for key, tensor in tensors.items():
        dtype, chunks = DTYPES[tensor["dtype"]], []
        for part in tensor["parts"]:
            offsets, sizes = numbers(part["offsets"]), numbers(part["sizes"])
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            size = math.prod(sizes) * dtype.itemsize
            start, length = numbers([part["start"], part.get("length", size)])
            if size > length:
                raise ValueError(f"{key} does not fit into {length} bytes")
            index = MetadataIndex(key, torch.Size(offsets))
            if index in places:  # the other one would be read without a check of its place
                raise ValueError(f"two parts of {key} begin at {offsets}")
            places[index] = Part(part["file"], start, length, dtype, sizes)
        found[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(numbers(tensor["size"])), chunks)
        _check_chunks(key, found[key])
    _check_places([*places.values(), *values], files)
    return Metadata(found, storage_data=places)


def numbers(values: Any) -> tuple[int, ...]:
    """Return sizes or places as a tuple.

    Raises:
        ValueError: if they are not a list of integers from 0 to 2⁶³ − 1.
    """
    if not isinstance(values, list | tuple) or not all(type(each) is int and 0 <= each < 2**63 for each in values):
        raise ValueError(f"sizes must be integers >= 0; got {str(values)[:80]}")
    return tuple(values)


def _check_places(parts: list[Part], files: dict[str, FileRecord]) -> None:
    """Check that parts lie in their files and do not overlap, so that they have no more bytes than the files."""
    ends: dict[str, int] = {}
    for part in sorted(parts, key=lambda each: (each.file, each.start, each.length)):
        end = part.start + part.length
        if part.file not in files or part.start < ends.get(part.file, 0) or end > files[part.file].size:
            raise ValueError(f"nothing can lie in bytes {part.start} to {end} of {part.file}")
        ends[part.file] = end


def _check_chunks(key: str, tensor: TensorStorageMetadata) -> None:
    """Check that the parts of a tensor make it up."""
    for chunk in tensor.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(tensor.size)
        if not inside or any(
            offset + size > whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
        ):
            raise ValueError(f"a part of {key} lies outside of its size {tuple(tensor.size)}")
    if not _make_up(tensor):
        raise ValueError(f"the parts of {key} do not make up its size {tuple(tensor.size)}")


def _make_up(tensor: TensorStorageMetadata) -> bool:
    """Return whether the parts, which lie inside the tensor, have each of its elements exactly once.

    Shards are a grid: each dimension is cut into ranges, and each combination of ranges is a part. A tensor without
    elements has any parts.
    """
    if math.prod(tensor.size) == 0:
        return sum(math.prod(chunk.sizes) for chunk in tensor.chunks) == 0
    parts = [chunk for chunk in tensor.chunks if math.prod(chunk.sizes) > 0]
    count = 1
    for dim, size in enumerate(tensor.size):
        ranges = sorted({(chunk.offsets[dim], chunk.offsets[dim] + chunk.sizes[dim]) for chunk in parts})
        ends = [0, *(end for _, end in ranges)]
        if [start for start, _ in ranges] != ends[:-1] or ends[-1] != size:
            return False
        count *= len(ranges)
    return count == len(parts) == len({tuple(chunk.offsets) for chunk in parts})
