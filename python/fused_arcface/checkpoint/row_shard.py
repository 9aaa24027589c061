"""Rows of a tensor that no process holds whole, stored by their global position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class RowShard(Tensor):
    """Rows ``[start, start + len(rows))`` of a tensor of ``total`` rows that is held in parts.

    It shares the memory of ``rows``, and has the methods that torch.distributed.checkpoint asks for.
    """

    # An ordinary tensor to every operation.
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    pieces: list[tuple[int, Tensor]]
    """(first row, rows): one, unless the shard has been put together."""
    total: int

    def __new__(cls, rows: Tensor, start: int, total: int) -> RowShard:
        shard: RowShard = Tensor._make_subclass(cls, rows.detach())
        shard.pieces, shard.total = [(start, rows.detach())], total
        return shard

    @classmethod
    def of_pieces(cls, pieces: list[Tensor]) -> RowShard:
        """Make a whole tensor of pieces of some rows each."""
        shard = cls(pieces[0], 0, sum(len(piece) for piece in pieces))
        shard.pieces, start = [], 0
        for piece in pieces:
            shard.pieces.append((start, piece))
            start += len(piece)
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
