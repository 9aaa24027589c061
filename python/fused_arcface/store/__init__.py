"""Class centers beyond the memory of the computing device: in host memory or in a file, read and written by the sample.

:class:`fused_arcface.PartialFC` makes one of these with its argument ``center_storage``.
"""

from __future__ import annotations

from .centers import CenterStore, CenterView, FileCenters, HostCenters, waits
from .choose import CenterStorage, check_storage, make_store, weight_device
from .pipeline import SampledRows, StepRows
from .records import StoreError

__all__ = [
    "CenterStorage",
    "CenterStore",
    "CenterView",
    "FileCenters",
    "HostCenters",
    "SampledRows",
    "StepRows",
    "StoreError",
    "check_storage",
    "make_store",
    "waits",
    "weight_device",
]
