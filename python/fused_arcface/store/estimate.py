"""The memory and the disk space that class centers take in each kind of storage."""

from __future__ import annotations

from dataclasses import dataclass

from .records import MARKER_BYTES

_GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes of one shard."""

    all_bytes: int
    """Size of all rows, which ``"host"`` keeps in host memory."""
    device_bytes: int
    """Size of the buffers on the computing device: two samples, and the rows that are fetched ahead."""
    file_bytes: int
    """Size of a file after each row has been used. At first it is 0."""
    journal_bytes: int
    """Most bytes that a step adds to the journal of a file, before the next checkpoint."""

    def describe(self, storage: str) -> str:
        """Return the estimate as a line, for ``"host"`` or a path."""
        device = f"{_size(self.device_bytes)} for the samples on each rank's device"
        if storage == "host":
            return f"class centers in host memory: {_size(self.all_bytes)} of it for each rank; {device}"
        return (
            f"class centers in {storage}: up to {_size(self.file_bytes)} on disk for each rank, as more rows are used, "
            f"and up to {_size(self.journal_bytes)} a step until the next checkpoint; {device}"
        )


def estimate(rows: int, sample: int, row_bytes: int) -> Estimate:
    """Return the estimate for one shard.

    Args:
        rows: rows of weight in the shard.
        sample: rows of weight that a step uses there.
        row_bytes: bytes of a row's center and momentum.

    >>> print(estimate(10**9, 10**4, 1568).describe("host"))
    class centers in host memory: 1460.3 GiB of it for each rank; 44.9 MiB for the samples on each rank's device
    """
    record = row_bytes + MARKER_BYTES
    return Estimate(rows * row_bytes, 3 * sample * row_bytes, rows * record, sample * (record + 8))


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.3g} MiB"
