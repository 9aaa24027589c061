"""The buffer in which the ranks gather a step's rows: for each rank a header, columns of numbers, and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .agreement import Header

_ALIGNMENT = 16  # bytes: each part of the buffer is viewed with a dtype of its own


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


HEADER_BYTES = _aligned(8 * len(Header._fields))


class Room(NamedTuple):
    """The size of a rank's part of the buffer. All ranks compute it from the same headers."""

    rows: int = 0
    dim: int = 0
    dtype: torch.dtype = torch.float32
    numbers: int = 0
    """Numbers of each row beside its label."""

    def grown(self, headers: Sequence[Header], embeddings: Tensor) -> Room:
        """Return the room for the largest batch so far, of embeddings (n, D) like these."""
        rows, numbers = (max(getattr(each, name) for each in headers) for name in ("rows", "numbers"))
        dim, dtype = embeddings.shape[1], embeddings.dtype
        return Room(max(rows, self.rows), dim, dtype, max(numbers, self.numbers))

    @property
    def length(self) -> int:
        """Bytes of a rank's part."""
        return sum(map(_aligned, self._sizes()))

    def _sizes(self) -> tuple[int, int, int]:
        columns = 8 * self.rows * (1 + self.numbers)
        return 8 * len(Header._fields), columns, self.dtype.itemsize * self.rows * self.dim

    def parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parts of a buffer (W, bytes) uint8 of W ranks, in its memory.

        Returns:
            Headers (W, 7) int64, columns (W, rows, 1 + numbers) int64 and embeddings (W, rows, D).
        """
        found, start = [], 0
        for size, dtype in zip(self._sizes(), (torch.int64, torch.int64, self.dtype), strict=True):
            found.append(buffer[:, start : start + size].view(dtype))
            start += _aligned(size)
        header, columns, rows = found
        return header, columns.unflatten(1, (self.rows, 1 + self.numbers)), rows.unflatten(1, (self.rows, self.dim))

    def fill(self, buffer: Tensor, own: Header, embeddings: Tensor, columns: Tensor | None) -> None:
        """Put a rank's header, and its rows if there is room for them, into its part of zeros (1, bytes)."""
        header, all_columns, rows = self.parts(buffer)
        # One number at a time: copying a tensor from the host would wait for the device.
        for column, value in enumerate(own):
            if value != 0:
                header[:, column] = value
        fits = own.rows <= self.rows and own.numbers <= self.numbers and embeddings.dtype == self.dtype
        if columns is not None and own.rows > 0 and fits:
            all_columns[0, : own.rows, : columns.shape[1]] = columns
            rows[0, : own.rows] = embeddings
