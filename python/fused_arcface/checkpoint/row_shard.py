"""Rows of a tensor that is split over processes, stored by their global position."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from .centers import Rows

_PIECE_BYTES, _MOST_PIECES = 64 << 20, 1000  # torch's planner compares each piece with others


class RowShard(Tensor):
    """Rows ``[start, start + len(rows))`` of a tensor of ``total`` rows that is held in parts.

    It shares the memory of ``rows``, and has the methods that torch.distributed.checkpoint asks for.
    """

    # An ordinary tensor to every operation.
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    pieces: list[tuple[int, Tensor]]
    """(first row, rows): one piece, except in :class:`StreamedRows`."""
    total: int

    def __new__(cls, rows: Tensor, start: int, total: int) -> RowShard:
        shard: RowShard = Tensor._make_subclass(cls, rows.detach())
        shard.pieces, shard.total = [(start, rows.detach())], total
        return shard

    @property
    def rows(self) -> Tensor:
        return self.pieces[0][1]

    def size(self) -> torch.Size:  # type: ignore[override]
        """Return the whole tensor's size: torch.distributed.checkpoint compares it with the stored one."""
        return torch.Size([self.total, *self.rows.shape[1:]])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size([start] + [0] * (rows.dim() - 1)), sizes=rows.shape)
            for start, rows in self.pieces
        ]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.rows)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
            if chunk.sizes.numel() > 0
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        first = index.offset[0] if index.offset else 0
        return next(rows for start, rows in self.pieces if start == first)


class StreamedRows(RowShard):
    """A whole tensor that comes in pieces while it is saved. One piece is in memory at a time."""

    _stream: Iterator[tuple[int, Tensor]]

    def __new__(cls, source: Rows) -> StreamedRows:
        dtype, shape = source.dtype, source.shape
        total, row_bytes = shape[0], dtype.itemsize * math.prod(shape[1:])
        step = max(1, _PIECE_BYTES // max(row_bytes, 1), -(-total // _MOST_PIECES))
        starts = range(0, total, step)
        sizes = [min(step, total - start) for start in starts]
        shapes = [torch.empty(size, *shape[1:], dtype=dtype, device="meta") for size in sizes]
        shard: StreamedRows = Tensor._make_subclass(cls, shapes[0])
        shard.pieces, shard.total = list(zip(starts, shapes, strict=True)), total
        shard._stream = zip(starts, cut_rows(source, sizes), strict=True)
        return shard

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        start, rows = next(self._stream)
        assert index.offset is not None and start == index.offset[0]  # they are written in the order of the plan
        return rows


def cut_rows(source: Rows, sizes: Iterable[int]) -> Iterator[Tensor]:
    """Yield rows in pieces of other sizes."""
    stream, held = source.pieces(), list[Tensor]()
    for size in sizes:
        while sum(map(len, held)) < size:
            held.append(next(stream))
        rows = held[0] if len(held) == 1 else torch.cat(held)
        yield rows[:size].to(source.dtype).contiguous()
        held = [rows[size:]]
