"""The cost model of class centers beyond the device: the bytes that a step moves, and how many identities fit.

The computation on a sample takes the time of :func:`fused_arcface.app.benchmark.cost_model.predict`. A step also reads
the sample's rows and writes them back, over the bus to host memory or to a disk. On a disk the journal writes the rows
once more. Reading, computing and writing overlap, so the longest of them is the time of a step. The rates are nominal,
and nothing here is measured.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fused_arcface.store.estimate import estimate

from ..measure import machine
from .capacity import Capacity
from .cost_model import FUSED_BF16_INT8, H200, predict


@dataclass(frozen=True)
class Link:
    """The way between the computing device and the rows at rest."""

    read_bytes_per_second: float
    write_bytes_per_second: float
    together: bool
    """If true, both directions share one rate."""
    times_written: int = 1
    """Number of times that a changed row is written; 2 with a journal."""


# PCIe 5.0 x16 at four fifths of its 63 GB/s, each direction; an NVMe drive's random reads and writes of 4 KiB.
PCIE = Link(50e9, 50e9, together=False)
NVME = Link(4e9, 2e9, together=True, times_written=2)


@dataclass(frozen=True)
class StoredStep:
    """One modeled step, in seconds and bytes."""

    seconds: float
    read_bytes: float
    written_bytes: float
    limit: str
    """``compute`` or ``transfer``."""


def row_bytes(D: int) -> int:
    """Return the bytes of a center in bf16 and its momentum in int8."""
    return round(D * (2 + 17 / 16))


def predict_stored(identities: int, sample_rate: float, link: Link, *, batch: int = 1024) -> StoredStep:
    """Predict a step of centers of 512 dimensions that are not on the device, an H200.

    >>> step = predict_stored(10**8, 0.01, PCIE)
    >>> f"{step.seconds * 1e3:.1f} ms, {step.read_bytes / 1e9:.2f} GB each way, {step.limit}"
    '31.4 ms, 1.57 GB each way, transfer'
    """
    sample = round(identities * sample_rate)
    compute = predict(H200, sample, 1, batch=batch, D=512, storage=FUSED_BF16_INT8).seconds
    read = sample * row_bytes(512)
    written = read * link.times_written
    ways = read / link.read_bytes_per_second, written / link.write_bytes_per_second
    transfer = sum(ways) if link.together else max(ways)
    limit = "compute" if compute > transfer else "transfer"
    return StoredStep(max(compute, transfer), read, written, limit)


def most_identities(host_bytes: float, device_bytes: float, sample_rate: float) -> int:
    """Return the most identities of 512 dimensions in host memory, whose samples fit on the device as well.

    >>> most_identities(0.25e12, 24e9, 0.01)
    143494897
    """
    row = row_bytes(512)
    buffers = estimate(10**6, round(10**6 * sample_rate), row).device_bytes / 10**6  # for each identity
    return int(min(0.9 * host_bytes / row, 0.9 * device_bytes / buffers))


def computed_rows(device: torch.device, budget_bytes: int, N: int, D: int, folder: Path) -> list[dict[str, Any]]:
    """Return rows of ``bench --budget`` for centers in host memory and in a file; computed, not measured.

    The budget counts as host memory for ``host``, the free room of the folder's disk for ``file``.
    """
    row = row_bytes(D)
    record = estimate(1, 0, row).file_bytes
    context = machine.context(device)
    found = {"host": (budget_bytes // row, row), "file": (shutil.disk_usage(folder).free // record, record)}
    return [
        Capacity(most, each, "computed").row(
            (f"fused_arcface + CenterSGD, {where}", "auto", "bfloat16", "int8"), N, D, budget_bytes, context
        )
        for where, (most, each) in found.items()
    ]
