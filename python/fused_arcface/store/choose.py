"""The argument ``center_storage`` of a head: check it, and make the store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..parallel.ranks import Ranks
from .centers import CenterStore, FileCenters, HostCenters
from .columns import Columns, Tensors
from .file import FileRows
from .folder import Layout
from .records import unavailable

CenterStorage = str | os.PathLike[str]
"""``"device"``, ``"host"``, or the path of a folder."""


def check_storage(center_storage: object, sample_rate: float, fused: bool) -> str:
    """Check the place of a head's class centers, ``"device"``, ``"host"`` or a path, and return it as text.

    Raises:
        TypeError: if it is neither a text nor a path.
        ValueError: if the head's options do not go with it.
    """
    if not isinstance(center_storage, str | os.PathLike):
        kind = type(center_storage).__name__
        raise TypeError(f"center_storage must be 'device', 'host' or the path of a folder; got {kind}")
    storage = os.fspath(center_storage)
    if storage == "":
        raise ValueError("center_storage must be 'device', 'host' or the path of a folder; got ''")
    if storage == "device":
        return storage
    if not fused:
        raise ValueError(
            "center_storage must be 'device' without a CenterSGD as center_optimizer: another optimizer needs all "
            f"class centers, and their gradient, on one device; got {storage!r}"
        )
    if sample_rate == 1:
        raise ValueError(
            "center_storage must be 'device' with sample_rate=1: each step uses all class centers, so all would have "
            f"to be on the computing device in each step; got {storage!r}"
        )
    return storage


def weight_device(storage: str, device: torch.device | str | None) -> torch.device | str | None:
    """Return the device of a head's ``weight``, which is ``meta`` if a file has the rows."""
    return {"device": device, "host": "cpu"}.get(storage, "meta")


def make_store(
    storage: str,
    held: Tensors,
    device: torch.device | str | None,
    num_rows: int,
    row_start: int,
    seed: int,
    ranks: Ranks,
) -> CenterStore | None:
    """Return the store of a head's shard, None for ``"device"``. A collective.

    ``storage`` is as :func:`check_storage` returned it, ``held`` are the head's weight and momentum. The shard's rows
    begin at ``row_start`` of the ``num_rows`` over all ranks. Steps are computed on ``device``, torch's default device
    if None.
    """
    if storage == "device":
        return None
    # "cuda" becomes "cuda:0": devices are compared with their number.
    computing: Any = torch.empty(0, device=device).device
    count = held["weight"].shape[0]
    if storage == "host":
        return HostCenters(computing, count, row_start)
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"center_storage must be 'device' or 'host' here: {reason}")
    layout = Layout(Columns.of(held), num_rows, seed)
    return FileCenters(computing, FileRows(Path(storage), layout, row_start, count, ranks))
