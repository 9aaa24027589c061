"""The agreement of the ranks: values that must be the same on all of them are compared before each step.

Each rank sends a :class:`Header`, a few numbers, along with its rows. All ranks read the same headers, so all go on or
all raise the same error. :mod:`fused_arcface.parallel.ranks` sends the headers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.dtypes import FLOAT_DTYPES

Agreement = dict[str, str]
"""The text of each value that must be the same on every rank, by its name."""

REFUSED = -1
"""Value of :attr:`Header.rows` on a rank that raises because its arguments are wrong."""

# Number of rows of a shard that are compared. A broadcast makes all rows equal, so a few are enough.
_COMPARED_ROWS = 64


class Header(NamedTuple):
    """The numbers of one rank, each an int64."""

    rows: int
    """Number of rows of the batch, or :data:`REFUSED`."""
    requires_grad: int = 0
    """1 if this rank needs the gradient by its embeddings."""
    return_stats: int = 0
    """1 if this rank asks for the statistics of its rows."""
    dtype: int = -1
    """Index of the embeddings' dtype in ``FLOAT_DTYPES``; -1 without embeddings."""
    agreement: int = 0
    """:func:`digest` of the agreement."""
    shard: int = 0
    """:func:`digest_of_shard`, or 0 if the shard is not to be compared."""
    numbers: int = 0
    """Numbers that each row has beside its label."""


def digest(agreement: Agreement) -> int:
    """Return a signed number of 64 bits. It differs if a name or a value of the agreement does."""
    return _digest(repr(agreement).encode())


def digest_of_shard(weight: Tensor) -> int:
    """Return a signed number of 64 bits that depends on the first rows of a shard (C, D).

    It is 0 where equal shards are no sign of a fault: for fewer than two rows, and if all rows are the same.
    """
    rows = weight.detach()[:_COMPARED_ROWS].cpu()
    if rows.shape[0] < 2 or bool((rows == rows[0]).all()):
        return 0
    return _digest(rows.contiguous().view(torch.uint8).numpy().tobytes())


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def check_headers(headers: Sequence[Header]) -> None:
    """Check the headers of all ranks. Every rank raises the same error.

    Raises:
        RuntimeError: if a rank has refused its arguments.
        TypeError: if the embeddings' dtypes differ.
    """
    refused = [rank for rank, header in enumerate(headers) if header.rows == REFUSED]
    if refused:
        listed = ", ".join(map(str, refused))
        raise RuntimeError(f"rank(s) {listed} refused the arguments of this step: see the error there")
    dtypes = [FLOAT_DTYPES[header.dtype] for header in headers if header.dtype >= 0]
    if len(set(dtypes)) > 1:
        raise TypeError(f"embeddings must have the same dtype on every rank; got {', '.join(map(str, dtypes))}")


def check_agreements(owner: str, agreements: Sequence[Agreement]) -> None:
    """Raise ValueError, the same on every rank, for the first name whose value differs."""
    for name in dict.fromkeys(name for each in agreements for name in each):
        values = [each.get(name) for each in agreements]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise ValueError(f"{owner}: {name} must be the same on every rank; got {listed}")


def equal_shards(headers: Sequence[Header]) -> list[int]:
    """Return the first ranks that hold the same class centers, bit for bit; empty if there are none."""
    ranks: dict[int, list[int]] = {}
    for rank, header in enumerate(headers):
        if header.shard != 0:
            ranks.setdefault(header.shard, []).append(rank)
    return next((same for same in ranks.values() if len(same) > 1), [])
